"""The engines that `timm-halonet bench --deploy` runs models in: what each needs, and how a model gets into it.

An engine that reads a file has `export`, which writes that file; the others take the model itself. Every engine
computes in float32 with the same number of threads.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops import backend_for, use_backend
from .case import Skip

LEAST_OPSET = 18  # of PyTorch's exporter that is built on torch.export
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Engine:
    """A way to run a model."""

    name: str
    load: Callable[[Any, int], Run]  # the file or, without `export`, the model; threads
    export: Callable[[nn.Module, torch.Tensor, Path, int | None], None] | None = None  # model, images, file, opset
    suffix: str = ""  # of the file
    dynamic: bool = False  # one file for all sizes and batches
    needs: dict[str, str] = field(default_factory=dict)  # distribution -> the least version
    imports: str = ""  # module that is imported before memory is measured


def missing(engine: Engine) -> str | None:
    """None, or what has to be installed for an engine, in a line."""
    for name, least in engine.needs.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"needs {name} {least} or newer, which is not installed: pip install 'timm_halonet[deploy]'"
        if _numbers(version) < _numbers(least):
            return f"needs {name} {least} or newer, and {version} is installed: pip install 'timm_halonet[deploy]'"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first numbers of a version, to compare: (1, 22) of 1.22.0.dev3"""
    parts = (part for part in version.split("+")[0].split(".")[:2])
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def check_opset(opset: int | None) -> None:
    """Check the ONNX opset that is asked for.

    Raises:
        ValueError: it is older than what PyTorch's exporter writes.
    """
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(
            f"--opset {opset} is too old: PyTorch's exporter needs {LEAST_OPSET} or newer (for 17, torch.onnx.export"
            " with dynamo=False exports these models too)"
        )


# ---- PyTorch -----------------------------------------------------------------------------------------------------


def _load_eager(model: nn.Module, threads: int) -> Run:
    return model


def _load_compiled(model: nn.Module, threads: int) -> Run:
    return torch.compile(model, dynamic=False)


def _export_aoti(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    """Halo attention stays this package's op."""
    with use_backend(backend_for(images)):
        _export_aoti_plain(model, images, file, opset)


def _export_aoti_plain(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(torch.export.export(model, (images,)), package_path=str(file))


def _load_aoti(file: Path, threads: int) -> Run:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(file))


# ---- ONNX Runtime ------------------------------------------------------------------------------------------------


def _export_onnx(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    torch.onnx.export(
        model,
        (images,),
        str(file),
        dynamo=True,
        opset_version=opset,
        input_names=["x"],
        external_data=False,
        verbose=False,
    )


def _export_dynamic_onnx(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    """By PyTorch's older exporter: with sizes that vary, the newer one takes minutes for a large model."""
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        model,
        (images,),
        str(file),
        dynamo=False,
        opset_version=opset or LEAST_OPSET,
        input_names=["x"],
        dynamic_axes=axes,
    )


def _load_onnx(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # threads that wait for work would take time from what is measured in turns
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        if "opset" in str(e).lower():
            version = onnxruntime.__version__
            raise Skip(f"onnxruntime {version} is too old for this opset: {str(e).splitlines()[0][:200]}") from e
        raise
    return lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


# ---- OpenVINO ----------------------------------------------------------------------------------------------------


def _export_openvino(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    import openvino

    converted = openvino.convert_model(torch.export.export(model, (images,)), input=images.shape)
    openvino.save_model(converted, str(file), compress_to_fp16=False)


def _export_dynamic_openvino(model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(model, example_input=images), str(file), compress_to_fp16=False)


def _load_openvino(file: Path, threads: int) -> Run:
    import openvino

    # without the hint it may compute in bfloat16
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


ENGINES = (
    Engine("eager", _load_eager),
    Engine(
        "ONNX Runtime, fixed size",
        _load_onnx,
        _export_onnx,
        ".onnx",
        needs={"onnxruntime": "1.22", "onnx": "1.18", "onnxscript": "0.5"},
        imports="onnxruntime",
    ),
    Engine(
        "ONNX Runtime, dynamic size",
        _load_onnx,
        _export_dynamic_onnx,
        ".onnx",
        True,
        needs={"onnxruntime": "1.22", "onnx": "1.18", "onnxscript": "0.5"},
        imports="onnxruntime",
    ),
    Engine("OpenVINO", _load_openvino, _export_openvino, ".xml", needs={"openvino": "2025.0"}, imports="openvino"),
    Engine(
        "OpenVINO, dynamic size",
        _load_openvino,
        _export_dynamic_openvino,
        ".xml",
        True,
        needs={"openvino": "2025.0"},
        imports="openvino",
    ),
    Engine("AOTInductor", _load_aoti, _export_aoti, ".pt2", imports="torch._inductor"),
    Engine("AOTInductor, export form", _load_aoti, _export_aoti_plain, ".pt2", imports="torch._inductor"),
    Engine("torch.compile", _load_compiled, imports="torch._inductor"),
)


def export(engine: Engine, model: nn.Module, images: torch.Tensor, file: Path, opset: int | None) -> None:
    """Write the engine's file for images of this size.

    Raises:
        Exception: whatever the exporter says.
    """
    assert engine.export is not None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # exporters deprecate parts of themselves
        engine.export(model, images, file, opset)


def import_engine(engine: Engine) -> None:
    """Import what the engine needs, so that its memory is not that of a model."""
    if engine.imports:
        importlib.import_module(engine.imports)

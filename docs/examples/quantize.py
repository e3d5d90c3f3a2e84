"""A HaloNet in int8 by ONNX Runtime, static and dynamic: size, time and top-1 next to the float model.

    python docs/examples/quantize.py --train imagenette160-train.tar --val imagenette160-val.tar --out int8

Needs `pip install 'timm_halonet[deploy]'`. The static model (QDQ) is calibrated on photos of the training split. Files
stay in --out: float.onnx, static.onnx, dynamic.onnx. All models see each photo once, one photo at a time.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.data import create_dataset, create_loader, resolve_data_config

# Convolutions and the classifier hold nearly all weights and most of the work. The products of attention stay in float:
# both of their factors are activations, and a relative logit is 40 lower at the border of the photo than inside, so
# one scale for all of them leaves few steps for what distinguishes two keys.
INT8 = ("Conv", "Gemm")


class Photos(CalibrationDataReader):
    """One photo at a time, as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: Iterator[np.ndarray]):
        self.images = images

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The model's input, None after the last."""
        image = next(self.images, None)
        return None if image is None else {"x": image}


def photos(root: str, split: str, model: torch.nn.Module, img_size: int, count: int | None) -> Iterator:
    """((1, 3, img_size, img_size) float32, label) of photos of a split, resized whole: `count`, evenly spread."""
    dataset = create_dataset("", root=root, split=split)
    config = {**resolve_data_config({}, model=model), "input_size": (3, img_size, img_size), "crop_pct": 1.0}
    options = {k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    loader = create_loader(
        dataset, batch_size=1, num_workers=0, use_prefetcher=False, persistent_workers=False, **options
    )
    chosen = range(len(dataset))
    if count is not None and count < len(dataset):
        chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    for i in chosen:
        image, label = loader.dataset[int(i)]
        yield image[None].numpy(), int(label)


def export(model: torch.nn.Module, file: Path, img_size: int) -> None:
    """Write the float model for one image, batch norm folded and shapes inferred, as quantisation wants it."""
    x = torch.randn(1, 3, img_size, img_size)
    torch.onnx.export(model, (x,), str(file), dynamo=True, input_names=["x"], external_data=False, verbose=False)
    quant_pre_process(str(file), str(file), skip_symbolic_shape=True)


def quantise(file: Path, out: Path, images: Iterator[np.ndarray], types: tuple[str, ...] = INT8) -> dict[str, Path]:
    """Write static.onnx and dynamic.onnx; name -> file, the float one first."""
    static, dynamic = out / "static.onnx", out / "dynamic.onnx"
    quantize_static(
        str(file),
        str(static),
        Photos(images),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(types),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    # ONNX Runtime's convolution with scales found on the way takes unsigned weights only
    quantize_dynamic(str(file), str(dynamic), op_types_to_quantize=list(types), weight_type=QuantType.QUInt8)
    return {"float": file, "static int8": static, "dynamic int8": dynamic}


def integer_share(file: Path) -> float:
    """The part of a model's weights, by number, that are 8-bit integers."""
    sizes = {True: 0, False: 0}
    for x in onnx.load(str(file)).graph.initializer:
        if x.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT):
            sizes[x.data_type != onnx.TensorProto.FLOAT] += int(np.prod(x.dims))
    return sizes[True] / (sizes[True] + sizes[False])


def evaluate(files: dict[str, Path], images: Iterator, threads: int) -> dict[str, tuple[int, int, float]]:
    """Name -> (right ones, photos, median seconds of a photo), all models on each photo before the next."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        name: onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    right, seconds, count = dict.fromkeys(files, 0), {name: [] for name in files}, 0
    for image, label in images:
        count += 1
        for name, session in sessions.items():
            start = time.perf_counter()
            logits = session.run(None, {"x": image})[0]
            seconds[name].append(time.perf_counter() - start)
            right[name] += int(logits.argmax()) == label
    return {name: (right[name], count, float(np.median(seconds[name]))) for name in files}


def table(files: dict[str, Path], found: dict[str, tuple[int, int, float]]) -> str:
    """The figures as Markdown."""
    lines = ["| | top-1, % | photos | file, MB | weights in int8 | ms a photo |", "|---|---|---|---|---|---|"]
    for name, (right, count, seconds) in found.items():
        size, share = files[name].stat().st_size / 1e6, integer_share(files[name])
        lines.append(
            f"| {name} | {100 * right / count:.2f} | {count:,} | {size:.1f} | {share:.0%} | {1e3 * seconds:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="halonet_h0.imagenette_r128")
    parser.add_argument("--train", required=True, help="photos to calibrate on, a folder or a .tar of class folders")
    parser.add_argument("--val", required=True, help="photos to measure accuracy on")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--calibrate", type=int, default=200, metavar="N", help="photos, evenly spread")
    parser.add_argument("--photos", type=int, metavar="N", help="of --val, evenly spread (default: all)")
    parser.add_argument("--types", nargs="+", default=INT8, help="ONNX operators in int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("int8"))
    parser.add_argument("--random", action="store_true", help="random weights, to try this script")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = {"num_classes": 10} if args.random else {"pretrained": True}
    model = timm.create_model(args.model, **weights).eval().requires_grad_(False)
    export(model, args.out / "float.onnx", args.img_size)
    calibration = (x for x, _ in photos(args.train, "train", model, args.img_size, args.calibrate))
    files = quantise(args.out / "float.onnx", args.out, calibration, tuple(args.types))
    found = evaluate(files, photos(args.val, "validation", model, args.img_size, args.photos), args.threads)
    print(table(files, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

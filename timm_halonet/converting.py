"""From a checkpoint as its authors published it to a checkpoint folder of this package: `timm-halonet convert`."""

import json
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from . import publishing
from .hub import CONFIG_NAME, WEIGHTS_NAME, check_state_dict, describe_weights

# where training scripts put the weights in what they save; a moving average goes before what it averages
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
SHOWN = 5  # names in a message


class _Ignored:
    """Stands for an object in a pickle that holds no weights; takes whatever the real one would, and keeps nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts save beside the weights, and what is made of it: neither the real classes nor any other code is
# called. Everything else in a pickle is refused by PyTorch's weights_only.
STAND_INS: dict[str, type] = {
    "argparse.Namespace": _Ignored,
    "yacs.config.CfgNode": OrderedDict,
    "numpy.dtype": _Ignored,
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
}


def convert(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], architecture: str, *, force: bool = False
) -> Iterator[tuple[str, str]]:
    """Write the folder `destination` with model.safetensors and a config.json that `timm-halonet verify` accepts.

    Everything is written and verified beside the destination first, and then moved, the config last: a full disk, a
    broken source or an interrupt leaves what was there. The number of classes is that of the checkpoint.

    Args:
        source: a safetensors file or a pickle of torch.save, as the architecture's authors publish it, or with the
            names of this package. Pickles are read by weights_only, with stand-ins for `STAND_INS`.
        destination: a folder, made if it does not exist; other files in it stay.
        architecture: name in timm of one of this package's models.
        force: replace model.safetensors and config.json that are there.

    Yields:
        (step, what was found), as soon as it has been.

    Raises:
        ValueError: an architecture of another package, a source that cannot be read or is of another model, a
            destination that has weights (without `force`) or is no folder.
        RuntimeError, OSError: it cannot be written.
    """
    destination = Path(destination)
    _check_destination(destination, force)
    filter_fn = _filter_fn(architecture)
    state_dict, where = unwrap(read_checkpoint(source))
    yield "read", f"{len(state_dict)} tensors of {source}{f', {where}' if where else ''}"
    model, state_dict = _fit(state_dict, architecture, filter_fn, str(source))
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as name:
        folder = Path(name)
        _write(folder, model, state_dict, architecture)
        yield from publishing.verify(publishing.write_check(publishing.find_checkpoint(f"local-dir:{folder}")))
        _check_destination(destination, force)
        destination.mkdir(exist_ok=True)
        for file in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(folder / file, destination / file)
    yield "written", str(destination)


def _check_destination(destination: Path, force: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is no folder")
    if not destination.absolute().parent.is_dir():
        raise ValueError(f"cannot write {destination}: there is no folder {destination.absolute().parent}")
    there = [file for file in (WEIGHTS_NAME, CONFIG_NAME) if (destination / file).exists()]
    if there and not force:
        raise ValueError(f"{destination} has {' and '.join(there)} already; --force replaces them")


def _filter_fn(architecture: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """The architecture's own way from its authors' names to its own; none is needed where there are no others."""
    import timm

    from .registry import image_sizes

    if architecture not in image_sizes():
        raise ValueError(f"{architecture!r} is no architecture of this package; those are {', '.join(image_sizes())}")
    module = import_module(timm.model_entrypoint(architecture).__module__)
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: state_dict)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint file holds, tensors on the CPU. Nothing in a pickle is executed.

    Raises:
        ValueError: there is no such file, it is broken, or a pickle that holds classes other than tensors and
            `STAND_INS`, which are named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise ValueError(f"cannot read {path}: {describe_weights(path)} ({e})") from None
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"cannot read {path}: {_refusal(path, str(e))}") from None
    except Exception as e:  # whatever bytes that are no pickle look like to the unpickler
        raise ValueError(f"cannot read {path}: no checkpoint, or a broken one ({type(e).__name__}: {e})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def _refusal(path: Path, message: str) -> str:
    found = set(re.findall(r"GLOBAL ([\w.]+)", message))
    with suppress(Exception):  # it names all of them, but in files of torch.save's newer format only
        found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found -= set(STAND_INS)
    if not found:
        return f"no checkpoint, or a broken one ({message.strip().splitlines()[-1]})"
    return (
        f"its pickle holds {', '.join(sorted(found))}, and to load a class may run code of whoever made the file. Only "
        f"tensors, plain containers and {', '.join(STAND_INS)} are read. Where you trust it, save its tensors alone: "
        "torch.save(torch.load(SRC, weights_only=False)['state_dict'], DST)"
    )


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict inside what a training script saved, without "module." before its names, and where it was.

    Raises:
        ValueError: there is none.
    """
    path = []
    while key := next((k for k in WRAPPERS if isinstance(checkpoint.get(k), Mapping) and checkpoint[k]), None):
        checkpoint = checkpoint[key]
        path.append(key)
    where = "".join(f"[{key!r}]" for key in path)
    other = [f"{name} ({type(x).__name__})" for name, x in checkpoint.items() if not isinstance(x, torch.Tensor)]
    if other or not checkpoint:
        raise ValueError(
            f"no state dict{f' in {where}' if where else ''}: expected tensors by name, alone or under one of "
            f"{', '.join(WRAPPERS)}; found {_some(other) if other else 'nothing'}"
        )
    state_dict = dict(checkpoint)
    while all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): x for name, x in state_dict.items()}
    return state_dict, where


# ---- fitting and writing -----------------------------------------------------------------------------------------


def _fit(
    state_dict: dict[str, torch.Tensor], architecture: str, filter_fn: Callable, source: str
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The architecture with the checkpoint's number of classes, on the meta device, and its state dict."""
    import timm

    # on the meta device, so that what the filter takes from the model instead of the checkpoint shows
    model = timm.create_model(architecture, device="meta")
    try:
        converted = filter_fn(state_dict, model)
    except Exception as e:  # it met names or shapes that it was not written for
        raise ValueError(f"{source} is not of {architecture}: {type(e).__name__}: {e}") from e
    invented = [name for name, x in converted.items() if x.is_meta]
    if invented:
        raise ValueError(f"{source} is of another model than {architecture}: it has nothing for {_some(invented)}")
    head = converted.get(f"{model.pretrained_cfg['classifier']}.weight")
    if head is not None and len(head) != model.num_classes:
        model = timm.create_model(architecture, num_classes=len(head), device="meta")
    own = model.state_dict()
    check_state_dict(converted, own, architecture)
    problems = {
        "missing": [name for name in own if name not in converted],
        "unexpected": [name for name in converted if name not in own],
        "of another shape": [
            f"{name} {tuple(converted[name].shape)}, expected {tuple(x.shape)}"
            for name, x in own.items()
            if name in converted and converted[name].shape != x.shape
        ],
    }
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} is not of {architecture}; {'; '.join(found)}")
    return model, {name: _tensor(converted[name], x.dtype) for name, x in own.items()}


def _tensor(x: torch.Tensor, own: torch.dtype) -> torch.Tensor:
    keep = own.is_floating_point and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    # a copy of its own: safetensors takes no tensors that share memory
    return x.detach().to(x.dtype if keep else own).clone(memory_format=torch.contiguous_format)


def _write(folder: Path, model: nn.Module, state_dict: dict[str, torch.Tensor], architecture: str) -> None:
    from safetensors.torch import save_file
    from timm.models._pretrained import filter_pretrained_cfg

    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    for key in ("architecture", "tag", "custom_load", "state_dict"):
        cfg.pop(key, None)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {**cfg, "num_classes": model.num_classes},
    }
    try:
        save_file(state_dict, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as e:
        raise RuntimeError(f"cannot write {WEIGHTS_NAME} to {folder.parent}: {e}") from None
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

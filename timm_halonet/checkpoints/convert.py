"""From a checkpoint as its authors published it to a checkpoint folder of this package: `timm-halonet convert`."""

import json
import os
import pickle
import re
import shutil
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

from ..files import whole_file
from ..hub import CONFIG_NAME, WEIGHTS_NAME, check_state_dict, describe_weights
from ..weights_file import is_plain, what_is_wrong
from .verify import find_checkpoint, verify, write_check

# where training scripts put the weights in what they save; a moving average goes before what it averages
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
SHOWN = 5  # names in a message


class _Ignored:
    """Stands for an object in a pickle that holds no weights; takes whatever the real one would, and keeps nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts save next to the weights, and what is made of it: neither the real classes nor any other code is
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

    Everything is written and verified in a temporary folder first, and then moved, the config last: a full disk, a
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
            destination that has weights (without `force`) or is not a folder.
        RuntimeError, OSError: it cannot be written.
    """
    destination = Path(destination)
    _check_destination(destination, force)
    filter_fn = _filter_fn(architecture)
    state_dict, where = unwrap(read_checkpoint(source))
    yield "read", f"{len(state_dict)} tensors of {source}{f', {where}' if where else ''}"
    model, state_dict = _fit(state_dict, architecture, filter_fn, str(source))
    # on the destination's file system, so that moving is renaming
    place = destination if destination.is_dir() else destination.absolute().parent
    try:
        temporary = tempfile.TemporaryDirectory(dir=place, prefix=f".{destination.name}.")
    except OSError as e:
        raise OSError(f"cannot write {destination}: {e.strerror or e}") from None
    with temporary as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        _write(folder, model, state_dict, architecture, destination)
        yield from verify(write_check(find_checkpoint(f"local-dir:{folder}")))
        _check_destination(destination, force)
        _move(folder, destination)
    yield "written", str(destination)


def _check_destination(destination: Path, force: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is not a folder")
    if not destination.absolute().parent.is_dir():
        raise ValueError(f"cannot write {destination}: there is no folder {destination.absolute().parent}")
    there = [file for file in (WEIGHTS_NAME, CONFIG_NAME) if os.path.lexists(destination / file)]
    folders = [str(destination / file) for file in there if (destination / file).is_dir()]
    if folders:
        raise ValueError(f"cannot write {' and '.join(folders)}: a folder is there")
    if there and not force:
        raise ValueError(f"{destination} has {' and '.join(there)} already; --force replaces them")


def _move(folder: Path, destination: Path) -> None:
    """Both files to where they belong, or none: what was there comes back where the second one fails."""
    if not destination.exists():
        folder.rename(destination)
        return
    kept = folder / "kept"
    old = destination / WEIGHTS_NAME
    if os.path.lexists(old):
        try:
            os.link(old, kept, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(old, kept, follow_symlinks=False)
    os.replace(folder / WEIGHTS_NAME, old)
    try:
        os.replace(folder / CONFIG_NAME, destination / CONFIG_NAME)
    except OSError as e:
        if os.path.lexists(kept):
            os.replace(kept, old)
        else:
            old.unlink()
        raise OSError(f"cannot write {destination / CONFIG_NAME}: {e.strerror or e}") from None


def _filter_fn(architecture: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """The function that turns an architecture's foreign names into its own; the identity where it has none."""
    import timm

    from ..registry import image_sizes

    if architecture not in image_sizes():
        raise ValueError(f"{architecture!r} is not an architecture of this package; it has {', '.join(image_sizes())}")
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
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    wrong = what_is_wrong(path)
    if wrong:
        raise ValueError(f"cannot read the checkpoint: {wrong}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, LookupError, ValueError) as e:  # the last two for a type unknown here
            raise ValueError(f"cannot read the checkpoint: {describe_weights(path)} ({e})") from None
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"cannot read {path}: {_refusal(path, str(e))}") from None
    except Exception as e:  # the unpickler raises many kinds for bytes that are not a pickle
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        raise ValueError(f"cannot read {path}: not a checkpoint, or a broken one ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def _refusal(path: Path, message: str) -> str:
    found = set(re.findall(r"GLOBAL ([\w.]+)", message))
    with suppress(Exception):  # it names all of them, but in files of torch.save's newer format only
        found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found -= set(STAND_INS)
    if not found:
        return f"not a checkpoint, or a broken one ({message.strip().splitlines()[-1]})"
    return (
        f"its pickle holds {', '.join(sorted(found))}, and to load a class may run code of whoever made the file. Only "
        f"tensors, plain containers and {', '.join(STAND_INS)} are read. Where you trust it, save its tensors alone: "
        "torch.save(torch.load(SRC, weights_only=False)['state_dict'], DST)"
    )


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict inside what a training script saved, without what wrappers add to its names, and where it was.

    Wrappers are DistributedDataParallel and moving averages ("module."), torch.compile ("_orig_mod.", also around a
    part of the model), FSDP and activation checkpointing; around each other in any order.

    Raises:
        ValueError: there is none, it refers to itself, or two of its names are the same without wrappers.
    """
    path: list[str] = []
    seen = {id(checkpoint)}
    while key := next((k for k in WRAPPERS if isinstance(checkpoint.get(k), Mapping) and checkpoint[k]), None):
        checkpoint = checkpoint[key]
        path.append(key)
        if id(checkpoint) in seen:
            raise ValueError(f"no state dict: {_place(path)} refers to itself")
        seen.add(id(checkpoint))
    where = _place(path)
    tensors = {name: x for name, x in checkpoint.items() if isinstance(name, str) and is_plain(x)}
    other = [f"{name} ({_kind(x)})" for name, x in checkpoint.items() if name not in tensors]
    if other or not checkpoint:
        raise ValueError(
            f"no state dict{f' in {where}' if where else ''}: expected tensors by name, alone or under one of "
            f"{', '.join(WRAPPERS)}; found {_some(other) if other else 'nothing'}"
        )
    if any(name.startswith("module.") for name in tensors):
        tensors.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    state_dict = {_unwrapped(name): x for name, x in tensors.items()}
    if len(state_dict) < len(tensors):
        names = [_unwrapped(name) for name in tensors]
        twice = [name for name in tensors if names.count(_unwrapped(name)) > 1]
        raise ValueError(f"two state dicts in one{f', in {where}' if where else ''}: {_some(twice)} are the same names")
    return state_dict, where


def _place(path: list[str]) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _kind(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    layout = "" if x.layout == torch.strided else f" of layout {x.layout}"
    return f"{'quantized ' if x.is_quantized else ''}{type(x).__name__}{layout}"


def _unwrapped(name: str) -> str:
    name = re.sub(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    return re.sub(r"^(module\.)+", "", name)


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


def _write(
    folder: Path, model: nn.Module, state_dict: dict[str, torch.Tensor], architecture: str, destination: Path
) -> None:
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
        with whole_file(folder / WEIGHTS_NAME) as temporary:
            save_file(state_dict, temporary, metadata={"format": "pt"})
        with whole_file(folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (SafetensorError, OSError) as e:
        reason = str(e).removeprefix(f"cannot write {folder / WEIGHTS_NAME}: ")
        raise OSError(f"cannot write {WEIGHTS_NAME} to {destination}: {reason}") from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

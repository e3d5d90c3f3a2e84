"""Is a checkpoint what its config.json says: `timm-halonet verify`."""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..config_file import LARGEST_CHECK, explain_model_args
from ..files import whole_file
from ..hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_hash,
    check_state_dict,
    config_of,
    describe_weights,
    download,
    file_hash,
    hub_configs_dir,
    read_config,
    stored_hash,
)
from ..ops import use_backend

STORED_LOGITS = 10
TOLERANCE = 1e-3  # of a logit; float32 kernels of different machines differ by about 1e-5


@dataclass(frozen=True)
class Checkpoint:
    """A config.json and where the two files lie: in one folder, or the weights in the Hub's cache."""

    config: dict[str, Any]
    config_path: Path
    weights_path: Path


def find_checkpoint(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The checkpoint of a folder, `local-dir:FOLDER`, `hf-hub:ORG/NAME[@REVISION]` or a name that this package carries.

    Raises:
        ValueError: there is none, or its config.json cannot be read.
        RuntimeError: it cannot be downloaded.
    """
    from timm.models._registry import get_pretrained_cfg

    from .. import registry as _registry  # noqa: F401  registers, wherever this is called from

    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or folder.is_dir():
        return Checkpoint(read_config(folder), folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    found = config_of(name, cache_dir)
    if found:
        repo_id, _, revision = found[0].removeprefix("hf-hub:").partition("@")
        config_path = download(repo_id, CONFIG_NAME, revision, cache_dir)
        return Checkpoint(found[1], config_path, download(repo_id, WEIGHTS_NAME, revision, cache_dir))
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as e:  # a tag that does not exist
        raise ValueError(f"{name!r}: {e}") from None
    folder = hub_configs_dir() / f"{name.partition('.')[0]}.{cfg.tag if cfg else ''}"
    if cfg is None or not folder.is_dir():
        names = ", ".join(sorted(path.parent.name for path in hub_configs_dir().glob(f"*/{CONFIG_NAME}"))) or "none"
        raise ValueError(f"{name!r} is neither a folder nor a checkpoint of this package; those are: {names}")
    weights_path = folder / WEIGHTS_NAME
    if not weights_path.is_file() and cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        weights_path = download(repo_id, WEIGHTS_NAME, revision, cache_dir)
    return Checkpoint(read_config(folder), folder / CONFIG_NAME, weights_path)


def verify(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Check a checkpoint step by step: config, hash, tensors, values, logits.

    Yields:
        (step, what was found), as soon as it has been.

    Raises:
        ValueError, RuntimeError: at the first step that fails, with the file and the offending values.
    """
    config, path = checkpoint.config, checkpoint.config_path
    yield "config", _check_config(checkpoint)
    expected = stored_hash(path)
    if not expected or config.get("check") is None:
        raise ValueError(f"{path} lacks sha256 or check; `timm-halonet verify FOLDER --write-check` adds them")
    check_hash(checkpoint.weights_path, expected, path)
    yield "hash", expected
    state_dict = _load(checkpoint.weights_path)
    yield "tensors", _check_tensors(checkpoint, state_dict)
    yield "values", "all finite"
    stored = config["check"]
    model = _model(checkpoint)
    model.load_state_dict(state_dict)
    found = _logits(model, stored["seed"], stored["input_size"], len(stored["logits"]))
    difference = _difference(found, stored["logits"])
    if not difference <= stored["tolerance"]:
        raise ValueError(
            f"logits of the input of seed {stored['seed']} are {_numbers(found)}, {path} has "
            f"{_numbers(stored['logits'])}: they differ by up to {difference:.2g}, allowed is {stored['tolerance']:g}"
        )
    yield "logits", f"{len(found)}, within {difference:.1e} of the stored ones (allowed {stored['tolerance']:g})"


def write_check(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """Write the hash of the weights, and logits on an input made from `seed`, into config.json, over what it had.

    Raises:
        ValueError, RuntimeError: config or tensors are not right.
    """
    config = dict(checkpoint.config)
    _check_config(replace(checkpoint, config={key: v for key, v in config.items() if key not in ("sha256", "check")}))
    state_dict = _load(checkpoint.weights_path)
    _check_tensors(checkpoint, state_dict)
    model = _model(checkpoint)
    model.load_state_dict(state_dict)
    size = list(config["pretrained_cfg"]["input_size"])
    if math.prod(size) > LARGEST_CHECK:
        raise ValueError(
            f"{checkpoint.config_path}: pretrained_cfg.input_size {size} is too large for stored logits, which are of "
            f"up to {LARGEST_CHECK} values"
        )
    logits = [round(x, 6) for x in _logits(model, seed, size, STORED_LOGITS)]
    config["sha256"] = file_hash(checkpoint.weights_path)
    config["check"] = {"seed": seed, "input_size": size, "logits": logits, "tolerance": TOLERANCE}
    with whole_file(checkpoint.config_path) as temporary:
        temporary.write_bytes(config_bytes(config))
    return replace(checkpoint, config=config)


def _check_config(checkpoint: Checkpoint) -> str:
    import timm

    config, path = checkpoint.config, checkpoint.config_path
    architecture, cfg = config["architecture"], config["pretrained_cfg"]
    if not timm.is_model(architecture):
        raise ValueError(f"{path} names the architecture {architecture!r}, which timm does not know")
    fixed = sorted({"num_classes", "in_chans"} & set(config.get("model_args") or {}))
    if fixed:
        raise ValueError(
            f"{path} has {', '.join(fixed)} in model_args, on which transformers fails: they belong to "
            "num_classes and pretrained_cfg's input_size"
        )
    size = cfg.get("input_size")
    if size is None:
        raise ValueError(f"{path}: pretrained_cfg needs input_size [channels, height, width]")
    classes = config.get("num_classes", cfg.get("num_classes"))
    if classes is None or cfg.get("num_classes", classes) != classes:
        raise ValueError(
            f"{path}: num_classes is {config.get('num_classes')} at the top, {cfg.get('num_classes')} in pretrained_cfg"
        )
    labels = config.get("label_names")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{path} has {len(labels)} label_names for {classes} classes")
    check = config.get("check")
    if check is not None and check["input_size"][0] != size[0]:
        raise ValueError(
            f"{path}: check.input_size has {check['input_size'][0]} channels, pretrained_cfg.input_size {size[0]}"
        )
    return f"{architecture}, {classes} classes, {' x '.join(map(str, size[1:]))} px"


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, LookupError, ValueError) as e:  # the last two where it has a type unknown here
        raise RuntimeError(f"cannot read the weights: {describe_weights(path)} ({e})") from None


def _model(checkpoint: Checkpoint, device: str = "cpu") -> nn.Module:
    import timm

    config = checkpoint.config
    cfg, args = config["pretrained_cfg"], config.get("model_args") or {}
    kwargs = {**args, "in_chans": cfg["input_size"][0], "device": device}
    classes = config.get("num_classes", cfg.get("num_classes"))
    with explain_model_args(config["architecture"], args, checkpoint.config_path):
        return timm.create_model(config["architecture"], num_classes=classes, **kwargs).eval()


def _check_tensors(checkpoint: Checkpoint, state_dict: dict[str, torch.Tensor]) -> str:
    path, own = checkpoint.weights_path, _model(checkpoint, "meta").state_dict()
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} is not of {checkpoint.config['architecture']}: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} have no place in it ({', '.join(unexpected[:3])})"
        )
    for key, x in own.items():
        y = state_dict[key]
        if y.shape != x.shape:
            raise ValueError(f"{path}: {key} has shape {tuple(y.shape)}, expected {tuple(x.shape)}")
        allowed = (torch.float32, torch.float16, torch.bfloat16) if x.is_floating_point() else (x.dtype,)
        if y.dtype not in allowed:
            raise ValueError(f"{path}: {key} is {y.dtype}, expected {' or '.join(map(str, allowed))}")
    check_state_dict(state_dict, own, checkpoint.config["architecture"])
    kinds = Counter(str(x.dtype).removeprefix("torch.") for x in state_dict.values())
    return f"{len(own)} of the right name and shape ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})"


@torch.inference_mode()
def _logits(model: nn.Module, seed: int, input_size: list[int], count: int) -> list[float]:
    """The first `count` outputs for one input of the seed, by plain PyTorch operators on the CPU in float32."""
    channels, height, width = input_size
    generator = random.Random(seed)  # Python documents that its sequence stays the same, unlike PyTorch's
    values = [generator.random() * 4 - 2 for _ in range(channels * height * width)]
    x = torch.tensor(values, dtype=torch.float32).view(1, channels, height, width)
    with use_backend("reference"):
        return model(x)[0, :count].tolist()


def _difference(a: list[float], b: list[float]) -> float:
    if len(a) != len(b):
        return float("inf")
    return (torch.tensor(a) - torch.tensor(b)).abs().max().item()  # NaN stays NaN, unlike with max()


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in values) + "]"


def config_bytes(config: dict[str, Any]) -> bytes:
    """A config.json as it is written."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

"""From hub_configs/<architecture>.<tag>/ to timm's pretrained configs, and clear errors for what cannot be loaded.

A checkpoint's config.json is the one source of truth: the same file goes to the Hub. This room imports no model.
"""

import json
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def hub_configs_dir() -> Path:
    """The folder of checkpoint folders: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).parent
    inside = package / "hub_configs"
    return inside if inside.is_dir() else package.parent / "hub_configs"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder (timm's format).

    Raises:
        ValueError: it is missing, cannot be read, is no JSON, or lacks `architecture` or `pretrained_cfg`.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint folder holds {CONFIG_NAME} and {WEIGHTS_NAME}") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no JSON: {e}") from None
    for key, kind in (("architecture", str), ("pretrained_cfg", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise ValueError(f"{path} has no {key!r} ({kind.__name__}): not a timm model config")
    return config


def pretrained_cfgs(architecture: str, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """timm pretrained configs of an architecture by name: `base` alone, and one for every tag that has weights.

    Weights exist where the folder holds them or config.json names a Hub repository (`hf_hub_id`). A folder without a
    readable config.json is left out with a RuntimeWarning: half a copy of one must not take every model out of timm.

    Raises:
        ValueError: a config.json names another architecture, or has model_args.
    """
    cfgs = {}
    for folder in sorted(hub_configs_dir().glob(f"{architecture}.*")):
        try:
            config = read_config(folder)
        except ValueError as error:
            warnings.warn(f"checkpoint folder {folder} is left out: {error}", RuntimeWarning, stacklevel=2)
            continue
        if config["architecture"] != architecture:
            raise ValueError(
                f"{folder / CONFIG_NAME} names the architecture {config['architecture']!r}, its folder {architecture!r}"
            )
        if config.get("model_args"):
            raise ValueError(
                f"{folder / CONFIG_NAME} has model_args {config['model_args']}: a registered checkpoint is its "
                "architecture's default model; give another model a name of its own"
            )
        cfg = {**base, **config["pretrained_cfg"]}
        for key in ("num_classes", "label_names", "label_descriptions"):
            if key in config:
                cfg[key] = config[key]
        cfg.pop("tag", None)
        weights = folder / WEIGHTS_NAME
        if weights.is_file():
            cfg["file"] = str(weights)
        if cfg.get("file") or cfg.get("hf_hub_id"):
            cfgs[folder.name] = cfg
    return cfgs or {architecture: base}


def check_state_dict(state_dict: Mapping[str, Any], own: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a state dict that is another model's or broken, before it is loaded.

    Args:
        state_dict: what is to be loaded.
        own: the model's own tensors.
        name: of the model, for the message.

    Raises:
        ValueError: no tensor of it belongs to the model, or one holds NaN or infinity.
    """
    if state_dict and not any(key in own for key in state_dict):
        some = ", ".join(list(state_dict)[:3])
        raise ValueError(
            f"foreign state dict: none of its {len(state_dict)} tensors ({some}, ...) belongs to {name}, "
            f"which has {len(own)} ({next(iter(own))}, ...)"
        )
    for key, x in state_dict.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type != "meta":
            bad = int((~torch.isfinite(x)).sum())
            if bad:
                raise ValueError(f"checkpoint tensor {key} {tuple(x.shape)}: {bad} values are NaN or infinite")


@contextmanager
def explain_load_errors(architecture: str, pretrained_cfg: Any) -> Iterator[None]:
    """Turn safetensors' errors while a model is built into one that names the file and its sizes.

    Raises:
        RuntimeError: in place of SafetensorError.
    """
    try:
        yield
    except SafetensorError as e:
        path = _weights_path(architecture, pretrained_cfg)
        raise RuntimeError(f"cannot read the weights of {architecture}: {describe_weights(path)} ({e})") from None


def _weights_path(architecture: str, pretrained_cfg: Any) -> Path | None:
    from timm.models._registry import get_pretrained_cfg

    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        pretrained_cfg = get_pretrained_cfg(f"{architecture}.{pretrained_cfg}" if pretrained_cfg else architecture)
    file = pretrained_cfg.get("file") if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, "file", None)
    if not file:
        return None
    path = Path(file)
    return path / WEIGHTS_NAME if path.is_dir() else path


def describe_weights(path: Path | None) -> str:
    """What is wrong with a safetensors file as far as its sizes tell."""
    if path is None:
        return "the downloaded file is broken"
    if not path.is_file():
        return f"{path} does not exist"
    size = path.stat().st_size
    if size < 8:
        return f"{path} has {size} bytes: truncated"
    with path.open("rb") as f:
        (header,) = struct.unpack("<Q", f.read(8))
        if header > min(size, 100_000_000):
            return f"{path} ({size} bytes) is truncated or no safetensors file: its header would have {header} bytes"
        try:
            tensors = json.loads(f.read(header))
            end = max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{path} ({size} bytes) is no safetensors file: its header is no JSON"
    expected = 8 + header + end
    state = "truncated" if size < expected else "damaged"
    return f"{path} is {state}: {size} bytes where its header says {expected}"

"""What a checkpoint's config.json may hold, whoever wrote it: read within limits, and every key that is used checked.

Nothing in such a file may make timm load, fetch or build anything but the model that it describes.
"""

import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

CONFIG_NAME = "config.json"
LARGEST_FILE = 16 << 20  # bytes; the names of 22,000 classes with descriptions take 2 million
DEEPEST = 32  # levels of lists and objects
LARGEST_SIDE = 4096  # of an image, in pixels
LARGEST_CHECK = 1 << 22  # values of the image that stored logits are of
LARGEST_ARGUMENT = 65_536  # of a model: widths, sizes
MOST_LAYERS = 1000  # where an argument counts blocks

# ---- JSON from anywhere --------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, is not JSON, is larger than 16 MiB, is nested more than 32 levels deep, or has a
            key twice; with the path, and the key where there is one.
    """
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise ValueError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as f:
            data = f.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected at most {LARGEST_FILE}")
        text = data.decode()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _Twice as e:
        raise ValueError(f"{path} has the key {e} twice in one object") from None
    except RecursionError:
        raise ValueError(f"{path}: {_key_of_depth(text)} is nested more than {DEEPEST} levels deep") from None
    except ValueError as e:  # a number of too many digits as well
        raise ValueError(f"{path} is not JSON: {e}") from None
    _check_depth(value, path)
    return value


class _Twice(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _Twice(_short(next(key for key, _ in pairs if key in seen or seen.add(key))))  # type: ignore[func-returns-value]
    return found


def _key_of_depth(text: str) -> str:
    """The key of the outermost object below which the text goes too deep; what Python's parser could not finish."""
    depth, key = 0, "the content"
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif depth == 1:
            key = token[0].strip('"')
        if depth > DEEPEST:
            break
    return key


def _check_depth(value: Any, path: Path) -> None:
    level = [("the content", value)]
    for _ in range(DEEPEST):
        level = [child for name, x in level for child in _children(name, x)]
    if level:
        raise ValueError(f"{path}: {level[0][0]} is nested more than {DEEPEST} levels deep")


def _children(name: str, x: Any) -> list[tuple[str, Any]]:
    """Those below one value, by the name of the outermost key that leads there."""
    if isinstance(x, dict):
        return [(key if name == "the content" else name, child) for key, child in x.items()]
    return [(name, child) for child in x] if isinstance(x, list) else []


def check_finite(value: Any, name: str, path: str | os.PathLike[str]) -> None:
    """Refuse NaN and infinity, which Python's parser takes, anywhere in what was read.

    Raises:
        ValueError: with the path and the key.
    """
    todo = [(name, value)]
    while todo:
        name, x = todo.pop()
        if isinstance(x, dict):
            todo += [(f"{name}.{key}" if name else key, child) for key, child in x.items()]
        elif isinstance(x, list):
            todo += [(name, child) for child in x]
        elif isinstance(x, float) and not math.isfinite(x):
            raise ValueError(f"{path}: {name} has the value {x}, expected finite numbers")


def _short(value: Any) -> str:
    return reprlib.repr(value)


# ---- the keys of a config.json -------------------------------------------------------------------------------------

Kind = tuple[Callable[[Any], bool], str]  # whether a value is one, and how it is called


def _whole(low: int, high: int) -> Kind:
    return lambda x: type(x) is int and low <= x <= high, f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> Kind:
    return lambda x: type(x) in (int, float) and low <= x <= high, f"a number from {low:g} to {high:g}"


def _list_of(kind: Kind, least: int, most: int) -> Kind:
    count = f"{least}" if least == most else f"{least} to {most}"
    check = kind[0]
    return (
        lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(check, x)),
        f"a list of {count}, each {kind[1]}",
    )


def _either(*kinds: Kind) -> Kind:
    return lambda x: any(check(x) for check, _ in kinds), " or ".join(what for _, what in kinds)


def _one_of(*texts: str) -> Kind:
    return lambda x: isinstance(x, str) and x in texts, f"one of {', '.join(texts)}"


def _is_size(x: Any) -> bool:
    return (
        isinstance(x, list)
        and len(x) == 3
        and all(type(n) is int and n >= 1 for n in x)
        and x[0] <= 1024
        and max(x[1:]) <= LARGEST_SIDE
    )


_TEXT: Kind = (lambda x: isinstance(x, str), "a text")
_FLAG: Kind = (lambda x: isinstance(x, bool), "true or false")
_OBJECT: Kind = (lambda x: isinstance(x, dict), "an object")
_TEXTS = _either(_TEXT, _list_of(_TEXT, 0, 1000))
_SIZE: Kind = (_is_size, f"[channels, height, width], up to 1024 channels and {LARGEST_SIDE} pixels")
_CLASSES = _whole(0, 1_000_000)
_CHANNELS = _list_of(_number(-1e6, 1e6), 1, 1024)
_POOL = _either(_whole(1, LARGEST_SIDE), _list_of(_whole(1, LARGEST_SIDE), 1, 2))
_CROP = _number(0.1, 4)

_LABELS: dict[str, Kind] = {
    "num_classes": _CLASSES,
    "label_names": _list_of(_TEXT, 0, 1_000_000),
    "label_descriptions": (
        lambda x: isinstance(x, dict) and all(isinstance(text, str) for text in x.values()),
        "an object of texts",
    ),
}

# A value that is null counts as missing, but for model_args, which timm looks into.
_TOP: dict[str, Kind] = {
    **_LABELS,
    "num_features": _whole(0, 1_000_000),
    "model_args": _OBJECT,
    "default": _FLAG,
    "check": _OBJECT,
    "sha256": (lambda x: isinstance(x, str) and bool(re.fullmatch("[0-9a-fA-F]{64}", x)), "64 hexadecimal digits"),
}

_PRETRAINED: dict[str, Kind] = {
    **_LABELS,
    "url": _TEXTS,
    "file": _TEXT,
    "state_dict": (lambda x: False, "nothing: weights lie in a file of their own"),
    "hf_hub_id": _TEXT,
    "hf_hub_filename": _TEXT,
    "source": _TEXT,
    "architecture": _TEXT,
    "tag": _TEXT,
    "custom_load": _either(_FLAG, _one_of("hf")),
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "min_input_size": _SIZE,
    "fixed_input_size": _FLAG,
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_pct": _CROP,
    "test_crop_pct": _CROP,
    "crop_mode": _one_of("center", "squash", "border"),
    "mean": _CHANNELS,
    "std": _list_of(_number(1e-6, 1e6), 1, 1024),
    "label_offset": _whole(0, 1_000_000),
    "pool_size": _POOL,
    "test_pool_size": _POOL,
    "first_conv": _TEXTS,
    "classifier": _TEXTS,
    "license": _TEXT,
    "description": _TEXT,
    "origin_url": _TEXT,
    "paper_name": _TEXT,
    "paper_ids": _TEXTS,
    "notes": _TEXTS,
}

_CHECK: dict[str, Kind] = {
    "seed": _whole(0, 2**63 - 1),
    "input_size": (
        lambda x: _is_size(x) and math.prod(x) <= LARGEST_CHECK,
        f"{_SIZE[1]}, and up to {LARGEST_CHECK} values",
    ),
    "logits": _list_of(_number(-3.4e38, 3.4e38), 1, 100_000),
    "tolerance": _number(0, 1),
}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint folder (timm's format), its values of the kinds that they are to be.

    Raises:
        ValueError: it is missing, cannot be read, is not JSON, or a key is missing or has a value that does not fit;
            with the path and the key. So it is for `model_args` that are not the model's (see `check_model_args`).
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; a checkpoint folder holds {CONFIG_NAME} and model.safetensors"
        ) from None
    for key, kind in (("architecture", str), ("pretrained_cfg", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise ValueError(f"{path} has no {key!r} ({kind.__name__}): not a timm model config")
    check_finite(config, "", path)
    _check_keys(config, _TOP, "", path)
    _check_keys(config["pretrained_cfg"], _PRETRAINED, "pretrained_cfg.", path)
    if isinstance(config.get("check"), dict):
        missing = sorted(_CHECK.keys() - config["check"].keys())
        if missing:
            raise ValueError(
                f"{path}: check needs seed, input_size, logits and tolerance, it lacks {', '.join(missing)}"
            )
        _check_keys(config["check"], _CHECK, "check.", path, null=False)
    _check_names(config, path)
    return config


def _check_keys(found: dict[str, Any], kinds: dict[str, Kind], where: str, path: Path, null: bool = True) -> None:
    for key, value in found.items():
        check, what = kinds.get(key, (None, ""))
        if check and not (value is None and null and key != "model_args") and not check(value):
            raise ValueError(f"{path}: {where}{key} is {_short(value)} ({type(value).__name__}), expected {what}")


def _check_names(config: dict[str, Any], path: Path) -> None:
    """The names in it: of the architecture, of timm's fields, and of the model's arguments."""
    from timm.models._pretrained import PretrainedCfg

    unknown = sorted(config["pretrained_cfg"].keys() - {field.name for field in fields(PretrainedCfg)})
    if unknown:
        raise ValueError(f"{path}: pretrained_cfg.{unknown[0]} is not a field of this timm's pretrained configs")
    cfg = config["pretrained_cfg"]
    channels = (cfg.get("input_size") or [3])[0]
    for key in ("mean", "std"):
        if cfg.get(key) and len(cfg[key]) not in (1, channels):
            raise ValueError(f"{path}: pretrained_cfg.{key} has {len(cfg[key])} values for {channels} channels")
    if not is_plain_name(config["architecture"]):
        raise ValueError(
            f"{path}: architecture is {_short(config['architecture'])}, expected a plain name in timm, without a tag "
            "or source"
        )
    check_model_args(config["architecture"], config.get("model_args") or {}, f"{path}: model_args")


# ---- the model's arguments -----------------------------------------------------------------------------------------

# Arguments that timm's functions between a name and its model's class take out on the way.
_ON_THE_WAY = {"bn_eps", "bn_momentum", "bn_tf", "norm_eps", "pad_type", "act_layer", "norm_layer", "aa_layer"}
# Neither of the model's, though its module may hold a class or function that has an argument of this name: what runs
# where, and what wraps a model.
_NOT_THE_MODELS = {
    *(
        "self",
        "args",
        "kwargs",
        "cfg",
        "base_cfg",
        "device",
        "dtype",
        "pruned",
        "jit",
        "fn",
        "model",
        "module",
        "checkpoint_fn",
    ),
    *("features_only", "feature_cls", "out_indices", "out_map", "flatten_sequential", "feature_concat"),
}


def is_plain_name(architecture: str) -> bool:
    """Whether a text can be an architecture's name, without a tag and without a source such as hf-hub:."""
    return bool(re.fullmatch("[A-Za-z0-9_]{1,200}", architecture))


def check_model_args(architecture: str, args: Any, where: str, also: Collection[str] = ()) -> None:
    """Refuse what a file hands to timm.create_model and is not an argument of the model itself.

    Only what the classes of the model's module take is let through, with plain values of sensible sizes: nothing that
    loads weights or fetches them. An architecture that timm does not know has no arguments; saying so is left to who
    builds it.

    Args:
        architecture: name in timm, without a tag.
        args: a dict of arguments, as it was read.
        where: the file and the key, for the message.
        also: names of arguments that are let through as well.

    Raises:
        ValueError: with `where` and the argument.
    """
    if not isinstance(args, dict):
        raise ValueError(f"{where} is {_short(args)}, expected an object of the model's arguments")
    known = {*also, *model_arguments(architecture)} if args else set()
    foreign = [name for name in args if name not in known]
    if foreign and not _is_known(architecture):
        return
    if foreign:
        raise ValueError(
            f"{where} has {', '.join(map(repr, foreign))}: not an argument of the model {architecture}, and nothing "
            "else is taken from a file"
        )
    for name, value in args.items():
        layers = any(part in name for part in ("depth", "layers", "repeat"))
        most = MOST_LAYERS if layers else LARGEST_ARGUMENT if name != "num_classes" else 1_000_000
        if not _is_plain(value, most):
            raise ValueError(
                f"{where}: {name} is {_short(value)}, expected plain values: numbers up to {most}, true, false, short "
                "texts, and short lists and objects of them"
            )


def _is_plain(value: Any, most: int, levels: int = 4) -> bool:
    if isinstance(value, (dict, list, tuple)):
        children = list(value.values()) if isinstance(value, dict) else value
        return levels > 0 and len(children) <= 256 and all(_is_plain(x, most, levels - 1) for x in children)
    if isinstance(value, str):
        return len(value) <= 200
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= most)  # NaN is not


def model_arguments(architecture: str) -> set[str]:
    """Names of the arguments that the classes of an architecture's module take, without those of timm's loading.

    An architecture that timm does not know has none.
    """
    import timm
    from timm.models._builder import build_model_with_cfg
    from timm.models._pretrained import PretrainedCfg

    if not _is_known(architecture):
        return set()
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    names = set(_ON_THE_WAY)
    for x in vars(module).values():
        if isinstance(x, type) and x is not PretrainedCfg and (issubclass(x, nn.Module) or is_dataclass(x)):
            inits = [vars(base)["__init__"] for base in x.__mro__ if "__init__" in vars(base)]
            names.update(name for init in inits[: -1 if issubclass(x, nn.Module) else None] for name in _names_of(init))
        elif callable(x) and not isinstance(x, type) and "variant" in _names_of(x):  # makes the module's models
            names.update(_names_of(x))
    loading = {*_names_of(timm.create_model), *_names_of(build_model_with_cfg), *_NOT_THE_MODELS}
    return names - loading


@contextmanager
def explain_model_args(architecture: str, args: dict[str, Any], path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a model's class raises about arguments from a file into one line with the file.

    Raises:
        ValueError: in place of TypeError, AssertionError and the like; others pass.
    """
    try:
        yield
    except (TypeError, AssertionError, LookupError, AttributeError, ArithmeticError, ValueError) as e:
        if not args or str(path) in str(e):
            raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path}: {architecture} cannot be built with model_args {_short(args)}: {reason}") from None


def _is_known(architecture: str) -> bool:
    import timm

    return is_plain_name(architecture) and timm.is_model(architecture)


def _names_of(function: Any) -> list[str]:
    try:
        return list(signature(function).parameters)
    except (TypeError, ValueError):  # of C, or without a signature
        return []

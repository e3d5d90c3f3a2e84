"""From hub_configs/<architecture>.<tag>/ to timm's pretrained configs, to weights whose hash is checked.

A checkpoint's config.json is the one source of truth: the same file goes to the Hub. This room imports no model.
"""

import hashlib
import json
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
HUB_ORG = "TIMM_HALONET_HUB_ORG"  # environment variable: an organisation, such as a company's mirror


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
    config = _parse(path)
    for key, kind in (("architecture", str), ("pretrained_cfg", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise ValueError(f"{path} has no {key!r} ({kind.__name__}): not a timm model config")
    return config


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint folder holds {CONFIG_NAME} and {WEIGHTS_NAME}") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no JSON: {e}") from None


def pretrained_cfgs(architecture: str, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """timm pretrained configs of an architecture by name: `base` alone, and one for every tag that has weights.

    The first tag is the one that timm takes when none is named: that of the folder whose config.json has
    `"default": true`, which is to be the best one, else the first in the alphabet.

    Weights exist where the folder holds them or config.json names a Hub repository (`hf_hub_id`, ORG/NAME@REVISION).
    TIMM_HALONET_HUB_ORG in the environment names another organisation, which then has a repository of each folder's
    name; its revisions are its own, so that its main branch is taken, and the hash in config.json pins the content. A
    folder without a readable config.json is left out with a RuntimeWarning: half a copy of one must not take every
    model out of timm.

    Raises:
        ValueError: a config.json names another architecture, or has model_args; two folders are the default.
    """
    cfgs: dict[str, dict[str, Any]] = {}
    default = None
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
        if hub_id := _hub_id(folder.name, config):
            cfg["hf_hub_id"] = hub_id
        weights = folder / WEIGHTS_NAME
        if weights.is_file():
            cfg["file"] = str(weights)
        if not (cfg.get("file") or cfg.get("hf_hub_id")):
            continue
        if not config.get("default"):
            cfgs[folder.name] = cfg
        elif default:
            raise ValueError(f'both {default} and {folder.name} have "default": true in {CONFIG_NAME}; one may')
        else:
            default = folder.name
            cfgs = {default: cfg, **cfgs}
    return cfgs or {architecture: base}


def _hub_id(name: str, config: dict[str, Any]) -> str | None:
    organisation = os.environ.get(HUB_ORG)
    return f"{organisation}/{name}" if organisation else config["pretrained_cfg"].get("hf_hub_id")


def checked_weights(architecture: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `build_model_with_cfg` is to be called with so that it loads weights whose hash has been checked.

    Weights from the Hub are downloaded here, and timm is pointed at the very commit that they came from. The hash is
    the `sha256` of the config.json beside the weights or, for a registered name, of the package's own. Weights without
    one (another URL or file that the user names, a repository that timm itself wrote) are left to timm.

    Args:
        architecture: name in timm, without a tag.
        kwargs: its pretrained_cfg, pretrained_cfg_overlay and cache_dir count.

    Raises:
        RuntimeError: the hash differs, the weights do not exist or cannot be downloaded.
        ValueError: a config.json that cannot be read.
    """
    from timm.models._builder import resolve_pretrained_cfg

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(architecture, kwargs.get("pretrained_cfg"), overlay)
    if cfg.source == "local-dir" or (cfg.source != "hf-hub" and cfg.file and not cfg.state_dict):
        path = Path(cfg.file)
        path = path / WEIGHTS_NAME if path.is_dir() else path
        config_path = path.parent / CONFIG_NAME
        expected = stored_hash(config_path) if path.name == WEIGHTS_NAME and config_path.is_file() else None
        if expected:
            check_hash(path, expected, config_path)
        return kwargs
    if cfg.state_dict or not cfg.hf_hub_id or cfg.hf_hub_filename not in (None, WEIGHTS_NAME):
        return kwargs
    repo_id, _, revision = cfg.hf_hub_id.partition("@")
    cache_dir = kwargs.get("cache_dir")
    if cfg.source == "hf-hub":
        config_path = download(repo_id, CONFIG_NAME, revision, cache_dir)
        revision = config_path.parent.name  # the commit: weights of another one are not what this config describes
        expected = stored_hash(config_path)
    else:
        name = f"{architecture}.{cfg.tag}"
        config_path = hub_configs_dir() / name / CONFIG_NAME
        if not config_path.is_file() or _hub_id(name, read_config(config_path.parent)) != cfg.hf_hub_id:
            return kwargs
        expected = stored_hash(config_path)
    if not expected:
        return kwargs
    path = download(repo_id, WEIGHTS_NAME, revision, cache_dir)
    check_hash(path, expected, config_path)
    # a commit that is in the cache is read from there, without a request that could be answered otherwise
    return {**kwargs, "pretrained_cfg_overlay": {**overlay, "hf_hub_id": f"{repo_id}@{path.parent.name}"}}


def stored_hash(config_path: Path) -> str | None:
    """The `sha256` in a config.json, in lower case, or None.

    Raises:
        ValueError: it is no SHA-256, or the file no JSON.
    """
    config = _parse(config_path)
    value = config.get("sha256") if isinstance(config, dict) else None
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{64}", value)):
        raise ValueError(f"{config_path}: sha256 is {value!r}, expected 64 hexadecimal digits")
    return value.lower() if value else None


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path, expected: str, source: Path) -> None:
    """Refuse weights that are not the ones that the config.json `source` describes.

    A file of the Hub's cache that is not even what the Hub said it was is deleted, so that the next try downloads it.

    Raises:
        RuntimeError: the file's hash is another one, or there is no such file; with the path and both hashes.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} does not exist; {source} describes it with sha256 {expected}")
    found = file_hash(path)
    if found == expected:
        return
    wrong = _wrong_size(path)
    advice = "get the file again, or if you replaced it, `timm-halonet verify FOLDER --write-check` stores the new hash"
    if _forget_broken_download(path, found):
        advice = "it was deleted from the cache, try again"
    raise RuntimeError(
        f"{path} is not the file that {source} describes: expected sha256 {expected}, found {found}"
        f"{f' ({wrong})' if wrong else ''}; nothing of it was loaded; {advice}"
    )


def _forget_broken_download(path: Path, found: str) -> bool:
    if not path.is_symlink():
        return False
    blob = path.parent / os.readlink(path)  # blobs/<the SHA-256 that the Hub announced>
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.name == found:
        return False
    with suppress(OSError):  # a cache that is not ours to write
        blob.unlink()
        path.unlink()
        return True
    return False


def download(repo_id: str, filename: str, revision: str | None = None, cache_dir: Any = None) -> Path:
    """A file of a Hub repository, from the cache where it is there: <cache>/.../snapshots/<commit>/<filename>.

    HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and the like count as everywhere in huggingface_hub.

    Raises:
        RuntimeError: it cannot be had, with the reason and what would help; its cause is huggingface_hub's error.
    """
    from huggingface_hub import hf_hub_download

    try:
        # a half file never counts: the client writes to a temporary name and moves it when the size is right
        path = hf_hub_download(
            repo_id, filename, revision=revision or None, cache_dir=cache_dir, library_name="timm_halonet"
        )
    except Exception as e:  # the HTTP library's own errors among them, which are of no common kind
        what = f"{filename} of {repo_id}{f' at revision {revision}' if revision else ''}"
        raise RuntimeError(f"cannot get {what} from the Hub: {explain_hub_error(e, cache_dir)}") from e
    return Path(path)


def explain_hub_error(error: Exception, cache_dir: Any = None) -> str:
    """What went wrong between here and the Hub, and what would help, in one line."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{endpoint} has no such revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository on {endpoint} has no such file"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{endpoint} says {status}: there is no such repository, or your token may not use it "
            "(set HF_TOKEN or run `hf auth login`)"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, and the cache {cache} has no copy"
        reason = _first_line(error.__cause__ or error)
        return f"{endpoint} could not be asked ({reason}), and the cache {cache} has no copy"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, errors.HfHubHTTPError):
        return (
            f"the cache {cache} could not be written ({error.strerror}); name another folder with cache_dir= or HF_HOME"
        )
    return f"{_first_line(error)} ({type(error).__name__}, from {endpoint})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def names_with_weights() -> list[str]:
    """The names architecture.tag of this package that have weights."""
    from timm.models._registry import list_pretrained, model_entrypoint

    package = __name__.partition(".")[0] + "."
    return [n for n in list_pretrained() if model_entrypoint(n.partition(".")[0]).__module__.startswith(package)]


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

    timm's errors about weights that do not exist are followed by the names that have some.

    Raises:
        RuntimeError: in place of SafetensorError, or timm's own with the list.
    """
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith(("No pretrained weights exist", "Invalid pretrained tag")):
            raise
        names = ", ".join(names_with_weights()) or "none"
        raise RuntimeError(f"{e} With weights, of timm_halonet: {names}") from None
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
    wrong = _wrong_size(path)
    if wrong:
        return wrong
    size = path.stat().st_size
    return f"{path} is damaged: {size} bytes where its header says {size}"


def _wrong_size(path: Path) -> str | None:
    """Why this is not a whole safetensors file, by its header and its size."""
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
    if size == expected:
        return None
    state = "truncated" if size < expected else "damaged"
    return f"{path} is {state}: {size} bytes where its header says {expected}"

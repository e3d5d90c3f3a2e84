"""From hub_configs/<architecture>.<tag>/ to timm's pretrained configs, to weights whose hash is checked.

A checkpoint's config.json is the one source of truth: the same file goes to the Hub. This module imports no model.
"""

import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError

from . import environment
from .config_file import CONFIG_NAME as CONFIG_NAME
from .config_file import read_config as read_config
from .config_file import read_json
from .weights_file import WEIGHTS_NAME as WEIGHTS_NAME
from .weights_file import check_state_dict as check_state_dict
from .weights_file import describe_weights as describe_weights
from .weights_file import what_is_wrong

CacheDir = str | os.PathLike[str] | None
_NOTE = "pretrained weights: sha256 "  # of a pretrained config's notes: the hash that its file has to have


def hub_configs_dir() -> Path:
    """The folder of checkpoint folders: inside the package when installed, next to it in a source tree."""
    package = Path(__file__).parent
    inside = package / "hub_configs"
    return inside if inside.is_dir() else package.parent / "hub_configs"


def pretrained_cfgs(architecture: str, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """timm pretrained configs of an architecture by name: `base` alone, and one for every tag that has weights.

    The first tag is the one that timm takes when none is named: that of the folder whose config.json has
    `"default": true`, which is to be the best one, else the first in the alphabet.

    Weights exist where the folder holds them or config.json names a Hub repository (`hf_hub_id`, ORG/NAME@REVISION).
    TIMM_HALONET_HUB_ORG in the environment names another organisation with a repository of each folder's name. Its
    revisions differ, so its main branch is taken; the hash in config.json pins the content. The variable is read here
    only: the id and the hash that count from then on are those of the returned configs. A folder without a readable
    config.json is left out with a RuntimeWarning: half a copy of one must not take every model out of timm.

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
        # timm's own sizes are tuples, and its ONNX export adds one to another
        told = {key: tuple(x) if isinstance(x, list) else x for key, x in config["pretrained_cfg"].items()}
        cfg = {**base, **told}
        for key in ("num_classes", "label_names", "label_descriptions"):
            if key in config:
                cfg[key] = config[key]
        # the weights are model.safetensors of the folder or of the repository, and nothing else
        for key in ("tag", "architecture", "source", "url", "file", "state_dict", "hf_hub_filename", "custom_load"):
            cfg.pop(key, None)
        if organisation := environment.hub_organisation():
            cfg["hf_hub_id"] = f"{organisation}/{folder.name}"
        if config.get("sha256"):
            notes = cfg.get("notes") or ()
            cfg["notes"] = (*((notes,) if isinstance(notes, str) else notes), _NOTE + config["sha256"].lower())
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


def checked_weights(architecture: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `build_model_with_cfg` with which it loads weights whose hash has been checked.

    Weights from the Hub are downloaded here, and timm is pointed at the very commit that they came from. The hash is
    the `sha256` of the config.json next to the weights or, for a registered name, the one of its pretrained config.
    Weights without one (another URL or file that the user names, a repository that timm itself wrote) are left to
    timm, unless their first bytes say that they are something else.

    Args:
        architecture: name in timm, without a tag.
        kwargs: its pretrained_cfg, pretrained_cfg_overlay and cache_dir count.

    Raises:
        RuntimeError: the hash differs, a registered name of the Hub has none, the file is not a checkpoint, the
            weights do not exist or cannot be downloaded.
        ValueError: a config.json that cannot be read.
    """
    cfg = _resolved(architecture, kwargs)
    if cfg.source == "local-dir" or (cfg.source != "hf-hub" and cfg.file and not cfg.state_dict):
        path = Path(cfg.file)
        path = path / WEIGHTS_NAME if path.is_dir() else path
        config_path = path.parent / CONFIG_NAME
        expected = stored_hash(config_path) if path.name == WEIGHTS_NAME and config_path.is_file() else None
        if expected:
            check_hash(path, expected, config_path)
        elif cfg.source != "local-dir" or path.is_file():  # timm takes other names in a folder as well
            wrong = what_is_wrong(path)
            if wrong:
                raise RuntimeError(f"cannot read the weights of {architecture}: {wrong}")
        return kwargs
    if cfg.source != "hf-hub" and not cfg.hf_hub_id:
        _check_cached_url(architecture, cfg, kwargs)
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
        registered = _registered(architecture, cfg.hf_hub_id)
        if registered is None:
            return kwargs
        config_path = hub_configs_dir() / f"{architecture}.{registered.tag}" / CONFIG_NAME
        expected = next((note.removeprefix(_NOTE) for note in registered.notes or () if note.startswith(_NOTE)), None)
        if not expected:
            raise RuntimeError(
                f"{config_path} has no sha256, and weights that it does not describe are not downloaded: "
                "`timm-halonet verify FOLDER --write-check` adds it where the weights are"
            )
    if not expected:
        return kwargs
    path = download(repo_id, WEIGHTS_NAME, revision, cache_dir)
    check_hash(path, expected, config_path)
    # a commit that is in the cache is read from there, without a request that could be answered otherwise
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    return {**kwargs, "pretrained_cfg_overlay": {**overlay, "hf_hub_id": f"{repo_id}@{path.parent.name}"}}


def _resolved(architecture: str, kwargs: dict[str, Any]) -> Any:
    """The pretrained config that timm will take."""
    from timm.models._builder import resolve_pretrained_cfg

    return resolve_pretrained_cfg(architecture, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))


def _registered(architecture: str, hub_id: str) -> Any:
    """The registered pretrained config of an architecture whose weights are those of this id, or None."""
    from timm.models._registry import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(architecture).values()
    return next((cfg for cfg in cfgs if cfg.tag and cfg.hf_hub_id == hub_id), None)


def config_of(name: str, cache_dir: CacheDir = None) -> tuple[str, dict[str, Any]] | None:
    """The config.json behind `local-dir:FOLDER` or `hf-hub:ORG/NAME[@REVISION]`, checked before timm reads it.

    Returns:
        The name to give to timm, at the very commit that the config is of, and the config; None for other names.

    Raises:
        ValueError: a config.json that is missing, or has values that do not fit.
        RuntimeError: it cannot be downloaded.
    """
    source, colon, place = name.partition(":")
    source = source.lower().replace("_", "-") if colon else ""
    if source == "local-dir":
        return f"{source}:{place}", read_config(place)
    if source != "hf-hub":
        return None
    repo_id, _, revision = place.partition("@")
    folder = download(repo_id, CONFIG_NAME, revision, cache_dir).parent
    return f"{source}:{repo_id}@{folder.name}", read_config(folder)


def stored_hash(config_path: Path) -> str | None:
    """The `sha256` in a config.json, in lower case, or None.

    Raises:
        ValueError: it is not a SHA-256, or the file is not JSON.
    """
    config = read_json(config_path)
    value = config.get("sha256") if isinstance(config, dict) else None
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{64}", value)):
        raise ValueError(f"{config_path}: sha256 is {value!r}, expected 64 hexadecimal digits")
    return value.lower() if value else None


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    from huggingface_hub.utils.sha import sha_fileobj

    with open(path, "rb") as f:
        return sha_fileobj(f).hex()


def check_hash(path: Path, expected: str, source: Path) -> None:
    """Refuse weights that are not the ones that the config.json `source` describes.

    A file of the Hub's cache that is not even what the Hub said it was is deleted, so that the next try downloads it.

    Raises:
        RuntimeError: the file's hash differs, or the file does not exist; with the path and both hashes.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} does not exist; {source} describes it with sha256 {expected}")
    found = file_hash(path)
    if found == expected:
        return
    wrong = what_is_wrong(path)
    advice = "get the file again, or if you replaced it, `timm-halonet verify FOLDER --write-check` stores the new hash"
    if _forget_broken_download(path, found):
        advice = "it was deleted from the cache, try again"
    raise RuntimeError(
        f"{path} is not the file that {source} describes: expected sha256 {expected}, found {found}"
        f"{f' ({wrong})' if wrong else ''}; nothing of it was loaded; {advice}"
    )


def _forget_broken_download(path: Path, found: str) -> bool:
    """Delete a file of the Hub's cache, unless its hash, `found`, is the one that the Hub announced."""
    if path.is_symlink():
        blob = path.parent / os.readlink(path)  # blobs/<the SHA-256 that the Hub announced>
        if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.name == found:
            return False
        files = [blob, path]
    else:
        # a cache without symlinks, as on Windows: what the Hub announced is not kept
        commit, snapshots, repository = path.parent.name, path.parent.parent.name, path.parent.parent.parent.name
        if (
            not re.fullmatch("[0-9a-f]{40}", commit)
            or snapshots != "snapshots"
            or not repository.startswith("models--")
        ):
            return False
        files = [path]
    with suppress(OSError):  # a cache that is not ours to write
        for file in files:
            file.unlink()
        return True
    return False


def download(repo_id: str, filename: str, revision: str | None = None, cache_dir: CacheDir = None) -> Path:
    """A file of a Hub repository, from the cache where it is there: <cache>/.../snapshots/<commit>/<filename>.

    HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and the like count as everywhere in huggingface_hub.

    Raises:
        RuntimeError: the download failed; with the reason and what would help. Its cause is huggingface_hub's error.
    """
    from huggingface_hub import hf_hub_download

    try:
        # a half file never counts: the client writes to a temporary name and moves it when the size is right
        folder = None if cache_dir is None else os.fspath(cache_dir)
        path = hf_hub_download(
            repo_id, filename, revision=revision or None, cache_dir=folder, library_name="timm_halonet"
        )
    except Exception as e:  # the HTTP library's own errors among them, which are of no common kind
        what = f"{filename} of {repo_id}{f' at revision {revision}' if revision else ''}"
        raise RuntimeError(f"cannot get {what} from the Hub: {explain_hub_error(e, cache_dir)}") from e
    return Path(path)


def explain_hub_error(error: Exception, cache_dir: CacheDir = None) -> str:
    """What went wrong between here and the Hub, and what would help, in one line."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    if not re.match(r"https?://[^/\s]", endpoint, re.IGNORECASE):
        return f"HF_ENDPOINT is {endpoint!r}, expected an address with https://, such as https://{endpoint or 'HOST'}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{endpoint} has no such revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository on {endpoint} has no such file"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{endpoint} says {status}: the repository does not exist, or your token may not use it "
            "(set HF_TOKEN or run `hf auth login`)"
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return f"HF_HUB_OFFLINE is set, and the cache {cache} has no copy"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = _first_line(error.__cause__ or error)
        return f"{endpoint} could not be asked ({reason}), and the cache {cache} has no copy"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, errors.HfHubHTTPError):
        return (
            f"the cache {cache} could not be written ({error.strerror}); name another folder with cache_dir= or HF_HOME"
        )
    return f"{_first_line(error)} ({type(error).__name__}, from {endpoint})"


@contextmanager
def explain_downloads(name: str, cache_dir: Any = None) -> Iterator[None]:
    """Turn what the Hub's client raises while timm gets the weights of one of its own models into one line.

    Raises:
        RuntimeError: with the model, the reason and what would help.
    """
    try:
        yield
    except Exception as e:  # of no common kind
        if type(e).__module__.partition(".")[0] not in ("huggingface_hub", "httpx", "httpcore", "requests"):
            raise
        raise RuntimeError(f"cannot get the weights of {name} from the Hub: {explain_hub_error(e, cache_dir)}") from e


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def names_with_weights() -> list[str]:
    """The names architecture.tag of this package that have weights."""
    from timm.models._registry import list_pretrained, model_entrypoint

    package = __name__.partition(".")[0] + "."
    return [n for n in list_pretrained() if model_entrypoint(n.partition(".")[0]).__module__.startswith(package)]


@contextmanager
def explain_load_errors(architecture: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn errors about weights while a model is built into one that names the file and what is wrong with it.

    timm's errors about weights that do not exist are followed by the names that have some.

    Args:
        architecture: name in timm, without a tag.
        kwargs: as `checked_weights` takes them.

    Raises:
        RuntimeError: in place of SafetensorError and of what a download by URL raises, or timm's own with the list.
    """
    try:
        yield
    except SafetensorError as e:
        file = _resolved(architecture, kwargs).file
        path = Path(file) / WEIGHTS_NAME if file and Path(file).is_dir() else file
        raise RuntimeError(f"cannot read the weights of {architecture}: {describe_weights(path)} ({e})") from None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        if str(e).startswith(("No pretrained weights exist", "Invalid pretrained tag")):
            names = ", ".join(names_with_weights()) or "none"
            raise RuntimeError(f"{e} With weights, of timm_halonet: {names}") from None
        cfg = _resolved(architecture, kwargs)
        url = _url_of(cfg)
        if url is None:
            raise
        _check_cached_url(architecture, cfg, kwargs)
        if not isinstance(e, OSError):
            raise
        path, name = _cached_url(url, kwargs), ".".join(filter(None, (architecture, cfg.tag)))
        reason = getattr(e, "reason", None) or e
        raise RuntimeError(
            f"cannot download {path.name}, the weights of {name}, from {url}: "
            f"{getattr(reason, 'strerror', None) or _first_line(e)}; get the file where there is a connection, and put "
            f"it at {path} or name it with pretrained_cfg_overlay=dict(file={path.name!r})"
        ) from e


def _url_of(cfg: Any) -> str | None:
    """The address that timm will download the weights of a pretrained config from, if it will."""
    elsewhere = cfg.source in ("hf-hub", "local-dir") or cfg.state_dict or cfg.file or cfg.hf_hub_id
    return cfg.url if isinstance(cfg.url, str) and not elsewhere else None


def _cached_url(url: str, kwargs: dict[str, Any]) -> Path:
    """Where torch.hub keeps what it downloads from there."""
    folder = Path(kwargs.get("cache_dir") or Path(torch.hub.get_dir()) / "checkpoints")
    return folder / Path(urlparse(url).path).name


def _check_cached_url(architecture: str, cfg: Any, kwargs: dict[str, Any]) -> None:
    """Delete a copy of weights with an address that cannot be one, such as a login page, and say so."""
    url = _url_of(cfg)
    path = _cached_url(url, kwargs) if url else None
    if path is None or not path.is_file():
        return
    wrong = what_is_wrong(path)
    if wrong:
        with suppress(OSError):
            path.unlink()
        advice = "delete it" if path.exists() else "it was deleted from the cache, try again"
        raise RuntimeError(f"cannot read the weights of {architecture}, downloaded from {url}: {wrong}; {advice}")

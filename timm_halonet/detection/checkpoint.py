"""The state of a training run in a file: torch's format, with the SHA-256 of all of it at its end.

The hash stands in the comment that a zip archive may end with: `torch.load` reads the file as any other, and file and
hash cannot come apart when a process is killed.
"""

import hashlib
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import whole_file

CHECKPOINT_NAME = "checkpoint.pt"
KEYS = ("identity", "model", "ema", "optimizer", "progress")
_MARK = b"timm_halonet sha256 "
_COMMENT = len(_MARK) + 64  # bytes


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes the state of a run, the whole file or nothing.

    Raises:
        OSError: it cannot be written; with the path and the reason.
    """
    with whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # of torch's writer; a full disk is found out by `whole_file`
            raise OSError(str(e).splitlines()[0]) from None
        with open(temporary, "rb+") as f:
            f.seek(-2, 2)
            f.write(_COMMENT.to_bytes(2, "little"))
            f.seek(0)
            digest = _hash(f)
            f.seek(0, 2)
            f.write(_MARK + digest.encode())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a run from its file, on the CPU: a dict of KEYS.

    Raises:
        ValueError: it is empty, damaged, of another program, or holds more than tensors and plain values; with the path
            and what is wrong.
    """
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty (0 bytes): remove it to start again, or put a copy in its place")
    with open(path, "rb") as f:
        f.seek(max(0, size - _COMMENT))
        end = f.read()
        sealed = size > _COMMENT and end.startswith(_MARK)
        f.seek(0)
        if sealed and _hash(f, size - _COMMENT).encode() != end[len(_MARK) :]:
            raise ValueError(f"{path} is damaged ({size} bytes): it does not have the hash that was written with it")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a readable checkpoint: its {size} bytes are cut short or of another kind")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's reader raises a dozen kinds for a broken file
        raise ValueError(f"{path} is not a readable checkpoint: {str(e).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the state of a run of `detect train`")
    check_keys(state, KEYS, str(path))
    for key, value in state.items():
        if not isinstance(value, dict) and (key, value) != ("ema", None):
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, not the state of a run of `detect train`")
    if not sealed:
        raise ValueError(f"{path} has no hash at its end: damaged, or written by an earlier version or another program")
    return state


def check_keys(found: dict[Any, Any], expected: Collection[str], where: str) -> None:
    """Refuses a dict that has other keys.

    Raises:
        ValueError: with the keys that are missing and those that are unknown.
    """
    missing = [repr(key) for key in expected if key not in found]
    unknown = sorted(repr(key) for key in found if key not in expected)
    if missing or unknown:
        parts = [f"{what} {', '.join(keys[:5])}" for what, keys in (("no", missing), ("unknown", unknown)) if keys]
        raise ValueError(f"{where} has {' and '.join(parts)}: not the state of a run of `detect train`")


def _hash(f: BinaryIO, count: int | None = None) -> str:
    """SHA-256 of the next `count` bytes, or of all that follow."""
    digest, left = hashlib.sha256(), count
    while block := f.read(1 << 20 if left is None else min(left, 1 << 20)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()

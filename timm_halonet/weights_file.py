"""What a file of weights is, told from its first bytes and its size, and whether a state dict is a model's."""

import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WEIGHTS_NAME = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

# how files begin that are taken for weights, and what they are
_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, which Keras writes; its weights would have to be saved by torch.save"),
    (b"\x93NUMPY", "a NumPy array; expected a state dict"),
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x7fELF", "a program or library"),
    (b"MZ", "a program for Windows"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<script", b"<!--", b"<?xml", b"<error")


def describe_weights(path: str | os.PathLike[str] | None) -> str:
    """What is wrong with a file of weights that could not be read; by its name, safetensors or torch.save."""
    if path is None:
        return "the downloaded file is broken"
    path = Path(path)
    found = what_is_wrong(path)
    if found:
        return found
    return f"{path} is damaged: its size of {path.stat().st_size} bytes is right, what it holds is not"


def what_is_wrong(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not what its name says, safetensors or a file of torch.save; None where nothing shows.

    Little of it is read: its beginning, a safetensors header, a zip archive's list of names. Nothing is executed.
    """
    path = Path(path)
    if not path.is_file():
        return f"{path} is not a file" if path.exists() else f"{path} does not exist"
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(1024)
    except OSError as e:
        return f"{path} cannot be read: {e.strerror or e}"
    if size == 0:
        return f"{path} is empty: 0 bytes"
    is_safetensors = start[5:9] == b"\0\0\0{"  # eight bytes of the header's size, then JSON
    what = None if is_safetensors else _by_beginning(start, size)
    if what:
        return f"{path} ({size} bytes) is not a checkpoint but {what}"
    named_safetensors = path.suffix == ".safetensors"
    if start.startswith(b"PK"):
        what = _by_zip(path, size)
        if what:
            return f"{path} {what}"
    if named_safetensors and (start.startswith(b"PK") or (start[:1] == b"\x80" and 2 <= start[1] <= 5)):
        return f"{path} is not a safetensors file but one of torch.save or pickle: give it the suffix .pth"
    if named_safetensors:
        return _wrong_size(path)
    if is_safetensors:
        return f"{path} is a safetensors file under another name: give it the suffix .safetensors"
    return None


def _by_beginning(start: bytes, size: int) -> str | None:
    if start.startswith(b"version https://git-lfs"):
        lines = dict(line.partition(b" ")[::2] for line in start.splitlines())
        real = lines.get(b"size", b"").decode(errors="replace")[:20]
        return f"the pointer of Git LFS to a file of {real} bytes; run `git lfs pull`, or download the file itself"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "a web page (HTML or XML), such as a download page or an error message; download the file itself"
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            return what
    if start[257:262] == b"ustar" and not start.startswith(b"sys_info"):  # torch.save's first format was a tar
        return "a tar archive; unpack it first"
    if not start.strip(b"\0"):
        return "a file that begins with zeros, which a download that stopped leaves" if size > 8 else None
    if start.lstrip()[:1] in b"{[" and _is_text(start):
        return f"a JSON text that begins with {start.lstrip()[:30].decode(errors='replace')!r}"
    if _is_text(start) and len(start) > 8 and start[:1] not in b"(c]}N.":  # a pickle of protocol 0 is a text too
        return f"a text that begins with {start[:30].decode(errors='replace')!r}"
    return None


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in start) and b"\x7f" not in start and _is_utf8(start)


def _is_utf8(start: bytes) -> bool:
    text = start.decode(errors="replace")
    return "\N{REPLACEMENT CHARACTER}" not in text[:-1]  # the last character may have been cut


def _by_zip(path: Path, size: int) -> str | None:
    """What a zip archive is, if not one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"is truncated or damaged: {size} bytes, an archive of torch.save without its end"
    if any(name.endswith(("/constants.pkl", "/code/")) or "/code/__torch__" in name for name in names):
        return "is a TorchScript program, not a state dict: save torch.jit.load(FILE).state_dict() with torch.save"
    if any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        return None
    if any(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays (.npz), not a checkpoint of PyTorch"
    if any(name.endswith(("archive_format", ".pt2")) for name in names):
        return "is a program of torch.export, not a state dict"
    some = ", ".join(names[:3]) or "nothing"
    return f"({size} bytes) is not a checkpoint but a zip archive of {some}{', ...' if len(names) > 3 else ''}"


def _wrong_size(path: Path) -> str | None:
    """Why this is not a whole safetensors file, by its header and its size."""
    size = path.stat().st_size
    if size < 8:
        return f"{path} has {size} bytes: truncated"
    with path.open("rb") as f:
        (header,) = struct.unpack("<Q", f.read(8))
        if header > min(size, LARGEST_HEADER):
            return f"{path} ({size} bytes) is truncated or no safetensors file: its header would have {header} bytes"
        try:
            tensors = json.loads(f.read(header))
            end = max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
            expected = 8 + header + int(end)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            return f"{path} ({size} bytes) is not a safetensors file: its header is not JSON of tensors"
    if size == expected:
        return None
    state = "truncated" if size < expected else "damaged"
    return f"{path} is {state}: {size} bytes where its header says {expected}"


def check_state_dict(state_dict: Mapping[str, Any], own: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a state dict that is another model's or broken, before it is loaded.

    Values of tensor subclasses (quantised weights, distributed ones) and of sparse tensors are left to whoever loads
    them: not all of these can do arithmetic.

    Args:
        state_dict: what is to be loaded.
        own: the model's own tensors.
        name: of the model, for the message.

    Raises:
        ValueError: no tensor of it belongs to the model, or one holds NaN or infinity.
    """
    if state_dict and not any(key in own for key in state_dict):
        some = ", ".join(map(str, list(state_dict)[:3]))
        raise ValueError(
            f"foreign state dict: none of its {len(state_dict)} tensors ({some}, ...) belongs to {name}, "
            f"which has {len(own)} ({next(iter(own), '')}, ...)"
        )
    for key, x in state_dict.items():
        bad = _not_finite(x)
        if bad:
            raise ValueError(f"checkpoint tensor {key} {tuple(x.shape)}: {bad} values are NaN or infinite")


def _not_finite(x: Any) -> int:
    """Values that are NaN or infinite, of those tensors whose values can be looked at."""
    if not (is_plain(x) and x.is_floating_point()) or x.device.type == "meta":
        return 0
    try:
        return int((~torch.isfinite(x.float() if x.itemsize == 1 else x)).sum())  # float8 has no isfinite
    except NotImplementedError:  # nor a way to float32, as float4
        return 0


def is_plain(x: Any) -> bool:
    """Whether this is a dense tensor of PyTorch's own class, which can do arithmetic."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_quantized

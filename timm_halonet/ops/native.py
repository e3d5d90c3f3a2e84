"""Halo attention by a small C++ kernel (native.cpp and its header), compiled on first use where a compiler is found.

The shared library is called through ctypes on data pointers: without PyTorch's headers it compiles in seconds. It is
kept in `$XDG_CACHE_HOME/timm_halonet` (or ~/.cache/timm_halonet), named by a hash of all that it depends on. Where
anything at all goes wrong, `can_run_native` says what, and another backend does the work.

Environment: TIMM_HALONET_NATIVE=0 turns the backend off; CXX names the compiler; TIMM_HALONET_CXXFLAGS are its last
arguments (-march=x86-64-v3 compiles for any CPU with AVX2, say).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from .options import Options

_SOURCE = Path(__file__).with_name("native.cpp")
_HEADER = Path(__file__).with_name("native_products.h")
# Not -ffast-math: NaN must stay NaN, and the exponential rounds by adding and subtracting a large number.
_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-w"]
_TIMEOUT = 300  # seconds for one run of the compiler
_DOUBLE, _BITS = struct.Struct("d"), struct.Struct("q")
_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FIELDS = (
    "batch height_q width_q heads dim height width dim_v block halo stride ring step scale_rel threads "
    "q_batch q_row q_col q_head k_batch k_row k_col k_head v_batch v_row v_col v_head"
)


# `struct Problem` of native.cpp: whole numbers, and last a double, whose bits go as one
_Problem = ctypes.c_int64 * (len(_FIELDS.split()) + 1)


def can_run_native(q: torch.Tensor) -> str | None:
    """None, or why the native backend cannot run on such tensors. The first call compiles the kernel."""
    if q.device.type != "cpu":
        return f"the native kernel runs on the CPU, not on {q.device.type}"
    if q.dtype not in _SUFFIX:
        return f"the native kernel computes in float32 or bfloat16, not in {q.dtype}"
    if os.environ.get("TIMM_HALONET_NATIVE") == "0":
        return "disabled by TIMM_HALONET_NATIVE=0"
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none; tried once a process."""
    try:
        return _load()
    except subprocess.TimeoutExpired:
        return f"the C++ compiler did not finish in {_TIMEOUT} s"
    except Exception as error:  # a reason, whatever it was: there are other backends
        return f"the native kernel could not be built or loaded: {type(error).__name__}: {error}"


def _load() -> ctypes.CDLL | str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next((words for words in map(shlex.split, names) if words and shutil.which(words[0])), None)
    if compiler is None:
        return f"no C++ compiler found (looked for {', '.join(names)})"
    flags = [*_FLAGS, *shlex.split(os.environ.get("TIMM_HALONET_CXXFLAGS", ""))]
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT).stdout
    source = _SOURCE.read_bytes() + _HEADER.read_bytes()
    name = hashlib.sha256(b"\0".join([source, " ".join(flags + compiler).encode(), version, _cpu()])).hexdigest()[:24]

    failure = ""
    for folder in _cache_folders():
        path = folder / f"halo_{name}.so"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                failure = _compile(compiler, flags, path)
                if failure:
                    break  # another folder would not help
            return ctypes.CDLL(str(path))
        except OSError as error:  # read-only, full, or mounted noexec
            failure = f"{folder}: {error}"
    return f"the native kernel could not be built: {failure}"


def _cache_folders():
    cache = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home directory
        yield (Path(cache) if cache else Path.home() / ".cache") / "timm_halonet"
    # own to this process: a shared temporary folder would let others plant a library
    yield Path(tempfile.mkdtemp(prefix="timm_halonet_"))


def _cpu() -> bytes:
    """What -march=native depends on, so that a home directory shared by different machines is safe."""
    text = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.lower().startswith(("flags", "features", "model name"))}))
    except OSError:
        text += platform.processor() + platform.node()
    return text.encode()


def _compile(compiler: list[str], flags: list[str], path: Path) -> str:
    """Empty, or the compiler's message. The library appears whole or not at all, whoever else compiles it too."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    message = ""
    try:
        # compilers of ARM machines know -mcpu=native, older ones do not know -march=native
        for arch in (["-march=native"], ["-mcpu=native"], []):
            command = [*compiler, *arch, *flags, "-o", temporary, str(_SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
            if done.returncode == 0 and os.path.getsize(temporary):
                os.chmod(temporary, 0o755)
                os.replace(temporary, path)
                return ""
            message = message or f"{shlex.join(command)} returned {done.returncode}: {done.stderr.strip()[-500:]}"
        return message
    finally:
        Path(temporary).unlink(missing_ok=True)


def _call(name: str, q, k, v, rel_height, rel_width, options: Options, *tensors) -> None:
    """Run one entry point. All tensors but q, k, v must be contiguous; those need only a dense last dimension.

    Raises:
        ValueError: tensors or options that the kernel cannot take.
        RuntimeError: no memory for what the kernel keeps beside its tensors.
    """
    block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step = options
    # the kernel trusts its pointers, and a compiled graph comes here without the checks of `halo_attention`
    grid = (k.shape[0], -(-k.shape[1] // query_stride), -(-k.shape[2] // query_stride), *k.shape[3:])
    rows = 2 * (block_size + 2 * halo_size) - 1
    if q.shape != grid or k.shape[:4] != v.shape[:4] or not q.dtype == k.dtype == v.dtype or 0 in k.shape + v.shape:
        raise ValueError(
            f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} with {query_stride=}, "
            f"in {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if any(tuple(x.shape) != (rows, q.shape[4]) for x in (rel_height, rel_width)):
        raise ValueError(f"tables must be ({rows}, {q.shape[4]}): {tuple(rel_height.shape)}, {tuple(rel_width.shape)}")
    _check(q, (q, k, v, rel_height, rel_width, *tensors), options)
    problem = _Problem(
        *q.shape, *k.shape[1:3], v.shape[4], block_size, halo_size, query_stride, 0 if mask_border else halo_size,
        rel_step, scale_rel, max(1, torch.get_num_threads()), *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        *_BITS.unpack(_DOUBLE.pack(scale)),
    )  # fmt: skip
    library = _library()
    if isinstance(library, str):
        raise ValueError(f"halo attention backend 'native' cannot run here: {library}")
    pointers = [x.data_ptr() for x in (q, k, v, rel_height, rel_width, *tensors)]
    entry = getattr(library, f"halo_{name}_{_SUFFIX[q.dtype]}")
    if entry.argtypes is None:
        entry.restype = ctypes.c_int64
        entry.argtypes = [ctypes.c_void_p] * (1 + len(pointers))
    missing = entry(ctypes.byref(problem), *pointers)
    if missing:
        raise RuntimeError(
            f"not enough memory: the native kernel needs {missing} bytes beside its tensors for the {name} of q "
            f"{tuple(q.shape)} with {block_size=}, {halo_size=}; a smaller batch or block_size does with less, or "
            "backend='blocked' may"
        )


def _check(q: torch.Tensor, tensors, options: Options) -> None:
    """What decides where the kernel reads and writes, apart from the shapes."""
    block, halo, stride, step = options.block_size, options.halo_size, options.query_stride, options.rel_step
    if block < 1 or halo < 0 or stride < 1 or block % stride or not 1 <= step <= stride:
        raise ValueError(
            "need block_size >= 1, halo_size >= 0, a query_stride that divides block_size and a rel_step from 1 to "
            f"query_stride, got {tuple(options)}"
        )
    if q.dtype not in _SUFFIX:
        raise ValueError(f"the native kernel computes in float32 or bfloat16, not in {q.dtype}")
    for x in tensors:
        if not x.is_cpu:
            raise ValueError(
                "the native kernel needs all tensors on the CPU, but they are on "
                f"{', '.join(sorted({x.device.type for x in tensors}))}"
            )


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and not x.is_neg() else x.resolve_neg().contiguous()


def _plain(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if x.dtype == dtype and x.is_contiguous() and not x.is_neg():  # most of the time, and small maps feel three calls
        return x
    return x.detach().to(dtype).resolve_neg().contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs beside inputs and output: of each query's logits the maximum, and the sum of their
    exponentials less the maximum. Not their logsumexp: its rounding would count once more for large logits.
    """
    return q.new_empty((*q.shape[:4], 2), dtype=torch.float32)


def native_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and what `native_backward` needs: (batch, query rows, query columns, heads, 2) in
        float32, see `saved_like`.

    Raises:
        ValueError: tensors or options that do not fit, with the numbers.
        RuntimeError: not enough memory, with the bytes.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    out = q.new_empty((*q.shape[:4], v.shape[4]))  # on the device of q, whatever the default is
    saved = saved_like(q)
    _call("forward", q, k, v, _plain(rel_height), _plain(rel_width), options, out, saved)
    return out, saved


def native_backward(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; `saved` is the forward's, `out` not needed.

    Raises:
        ValueError: tensors or options that do not fit, with the numbers.
        RuntimeError: not enough memory, with the bytes.
    """
    shape = (*q.shape[:4], v.shape[4])
    if grad.shape != shape or saved.shape != (*q.shape[:4], 2):
        raise ValueError(
            f"the output is {shape}, but its gradient {tuple(grad.shape)}, and the forward saved {tuple(saved.shape)}"
        )
    q, k, v = _dense(q), _dense(k), _dense(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tables = _plain(rel_height), _plain(rel_width)
    dh, dw = (x.new_empty(x.shape) for x in tables)
    grad, saved = _plain(grad, q.dtype), _plain(saved)
    _call("backward", q, k, v, *tables, options, saved, grad, dq, dk, dv, dh, dw)
    return dq, dk, dv, dh.to(rel_height.dtype), dw.to(rel_width.dtype)

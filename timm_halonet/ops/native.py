"""Halo attention by a small C++ kernel (native.cpp and its header), compiled on first use where a compiler is found.

The shared library is called through ctypes on data pointers: without PyTorch's headers it compiles in seconds. Where
anything at all goes wrong with it, `can_run_native` says what, warns once, and another backend does the work.

Environment: TIMM_HALONET_NATIVE=0 turns the backend off; CXX names the compiler; TIMM_HALONET_CXXFLAGS are its last
arguments (-march=x86-64-v3 compiles for any CPU with AVX2, say).
"""

import ctypes
import os
import struct

import torch

from . import native_build
from .native_build import library as _library
from .options import Options

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
    if isinstance(library, str):
        native_build.announce(library)
        return library
    return None


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    """PyTorch's number of threads, but one in a forked process.

    OpenMP's threads do not survive a fork, while its pool, which may be PyTorch's too, would wait for them for ever.
    """
    return 1 if _forked else max(1, torch.get_num_threads())


def _call(name: str, q, k, v, rel_height, rel_width, options: Options, *tensors) -> None:
    """Run one entry point. All tensors but q, k, v must be contiguous; those need only a dense last dimension."""
    block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step = options
    # the kernel trusts its pointers, and a compiled graph comes here without the checks of `halo_attention`
    grid = (k.shape[0], -(-k.shape[1] // query_stride), -(-k.shape[2] // query_stride), *k.shape[3:])
    rows = 2 * (block_size + 2 * halo_size) - 1
    if q.shape != grid or k.shape[:4] != v.shape[:4] or not q.dtype == k.dtype == v.dtype or 0 in k.shape:
        raise ValueError(
            f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} with {query_stride=}, "
            f"in {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if any(tuple(x.shape) != (rows, q.shape[4]) for x in (rel_height, rel_width)):
        raise ValueError(f"tables must be ({rows}, {q.shape[4]}): {tuple(rel_height.shape)}, {tuple(rel_width.shape)}")
    problem = _Problem(
        *q.shape, *k.shape[1:3], v.shape[4], block_size, halo_size, query_stride, 0 if mask_border else halo_size,
        rel_step, scale_rel, _threads(), *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        *_BITS.unpack(_DOUBLE.pack(scale)),
    )  # fmt: skip
    library = _library()
    if isinstance(library, str):
        raise ValueError(f"halo attention backend 'native' cannot run here: {library}")
    pointers = [x.data_ptr() for x in (q, k, v, rel_height, rel_width, *tensors)]
    entry = getattr(library, f"halo_{name}_{_SUFFIX[q.dtype]}")
    if entry.argtypes is None:
        entry.argtypes = [ctypes.c_void_p] * (1 + len(pointers))
    entry(ctypes.byref(problem), *pointers)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float32 and x.is_contiguous():  # most of the time, and small maps feel three calls
        return x
    return x.detach().to(torch.float32).contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs beside inputs and output: the logsumexp of each query's logits."""
    return q.new_empty(q.shape[:4], dtype=torch.float32)


def native_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and the logsumexp of each query's logits, (batch, query rows, query columns, heads) in
        float32.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    out = torch.empty(*q.shape[:4], v.shape[4], dtype=q.dtype)
    lse = saved_like(q)
    _call("forward", q, k, v, _table(rel_height), _table(rel_width), options, out, lse)
    return out, lse


def native_backward(
    grad, q, k, v, rel_height, rel_width, out, lse, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; `out` and `lse` are the forward's."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    tables = _table(rel_height), _table(rel_width)
    dh, dw = (torch.empty(x.shape, dtype=torch.float32) for x in tables)
    grad = grad.to(q.dtype).contiguous()
    _call("backward", q, k, v, *tables, options, out.contiguous(), lse.contiguous(), grad, dq, dk, dv, dh, dw)
    return dq, dk, dv, dh.to(rel_height.dtype), dw.to(rel_width.dtype)

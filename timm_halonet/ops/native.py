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

from .. import environment
from . import native_build
from .native_build import library as _library
from .options import Options
from .packed import gradients_like, slices_of_one

_DOUBLE, _BITS = struct.Struct("d"), struct.Struct("q")
_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FIELDS = (
    "batch height_q width_q heads dim height width dim_v block halo stride ring step scale_rel threads "
    "q_batch q_row q_col q_head k_batch k_row k_col k_head v_batch v_row v_col v_head "
    "dq_pixel dq_head dk_pixel dk_head dv_pixel dv_head"
)


# `struct Problem` of native.cpp: whole numbers, and last a double, whose bits go as one
_Problem = ctypes.c_int64 * (len(_FIELDS.split()) + 1)


def can_run_native(q: torch.Tensor) -> str | None:
    """None, or why the native backend cannot run on such tensors. The first call compiles the kernel."""
    if q.device.type != "cpu":
        return f"the native kernel runs on the CPU, not on {q.device.type}"
    if q.dtype not in _SUFFIX:
        return f"the native kernel computes in float32 or bfloat16, not in {q.dtype}"
    if not environment.native_allowed():
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


def _call(name: str, q, k, v, rel_height, rel_width, options: Options, *tensors, gradients=()) -> None:
    """Run one entry point. All tensors but q, k, v and their gradients must be contiguous; those need only a dense last
    dimension, and the gradients, which are among `tensors`, evenly spaced pixels.

    Shapes and options have passed `check_shapes` and `check_options`: the kernel trusts its pointers.

    Raises:
        ValueError: tensors of a device or dtype that the kernel does not have.
        RuntimeError: not enough memory for what the kernel keeps in addition to its tensors.
    """
    block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step = options
    everything = (q, k, v, rel_height, rel_width, *tensors)
    if not all(x.is_cpu for x in everything):
        devices = ", ".join(sorted({x.device.type for x in everything}))
        raise ValueError(f"the native kernel needs all tensors on the CPU, but they are on {devices}")
    if q.dtype not in _SUFFIX:
        raise ValueError(f"the native kernel computes in float32 or bfloat16, not in {q.dtype}")
    problem = _Problem(
        *q.shape, *k.shape[1:3], v.shape[4], block_size, halo_size, query_stride, 0 if mask_border else halo_size,
        rel_step, scale_rel, _threads(), *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        *(n for x in gradients for n in x.stride()[2:4]), *([0] * (6 - 2 * len(gradients))),
        *_BITS.unpack(_DOUBLE.pack(scale)),
    )  # fmt: skip
    library = _library()
    if isinstance(library, str):
        raise ValueError(f"halo attention backend 'native' cannot run here: {library}")
    pointers = [x.data_ptr() for x in everything]
    entry = getattr(library, f"halo_{name}_{_SUFFIX[q.dtype]}")
    if entry.argtypes is None:
        entry.restype = ctypes.c_int64
        entry.argtypes = [ctypes.c_void_p] * (1 + len(pointers))
    missing = entry(ctypes.byref(problem), *pointers)
    if missing:
        raise RuntimeError(
            f"not enough memory: the native kernel needs {missing} bytes on top of its tensors for the {name} of q "
            f"{tuple(q.shape)} with {block_size=}, {halo_size=}; a smaller batch or block_size does with less, or "
            "backend='blocked' may"
        )


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and not x.is_neg() else x.resolve_neg().contiguous()


def _plain(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if x.dtype == dtype and x.is_contiguous() and not x.is_neg():  # most of the time, and small maps feel three calls
        return x
    return x.detach().to(dtype).resolve_neg().contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs in addition to inputs and output: the maximum of each query's logits, and the sum of
    exp(logit - maximum). Not their logsumexp: its rounding would count once more for large logits.
    """
    return q.new_empty((*q.shape[:4], 2), dtype=torch.float32)


def native_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`, which has checked them.

    Returns:
        The output, contiguous, and what `native_backward` needs: (batch, query rows, query columns, heads, 2) in
        float32, see `saved_like`.

    Raises:
        ValueError: tensors of another device or dtype.
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
        ValueError: tensors of another device or dtype, or `grad` and `saved` of another shape.
        RuntimeError: not enough memory, with the bytes.
    """
    return _backward(grad, q, k, v, rel_height, rel_width, saved, options, 0)


def native_backward_packed(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`native_backward`; where q, k and v, or k and v, are slices of one tensor, so are their gradients."""
    return _backward(grad, q, k, v, rel_height, rel_width, saved, options, slices_of_one(q, k, v))


def _backward(grad, q, k, v, rel_height, rel_width, saved, options: Options, packed: int):
    shape = (*q.shape[:4], v.shape[4])
    if grad.shape != shape or saved.shape != (*q.shape[:4], 2):
        raise ValueError(
            f"the output is {shape}, but its gradient {tuple(grad.shape)}, and the forward saved {tuple(saved.shape)}"
        )
    gradients = gradients_like(q, k, v, packed)
    q, k, v = _dense(q), _dense(k), _dense(v)
    tables = _plain(rel_height), _plain(rel_width)
    dh, dw = (x.new_empty(x.shape) for x in tables)
    grad, saved = _plain(grad, q.dtype), _plain(saved)
    _call("backward", q, k, v, *tables, options, saved, grad, *gradients, dh, dw, gradients=gradients)
    return *gradients, dh.to(rel_height.dtype), dw.to(rel_width.dtype)

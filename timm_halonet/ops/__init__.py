"""Halo attention as one function on tensors: the contract, the checks, and the choice of who computes it."""

import os
from collections.abc import Callable

import torch

from . import blocked, native, triton
from .custom_op import as_custom_op
from .neighbourhood import blocked_attention
from .options import Options
from .reference import attention_weights_reference, halo_attention_reference

__all__ = ["BACKENDS", "backend_for", "blocked_attention", "halo_attention", "halo_attention_weights"]


def can_run_reference(q: torch.Tensor) -> str | None:
    """None, or why the reference cannot run on such tensors: it always can."""
    return None


# name -> (function, predicate), in order of preference
BACKENDS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], str | None]]] = {
    "native": (
        as_custom_op("native", native.native_forward, native.native_backward, native.saved_like),
        native.can_run_native,
    ),
    "triton": (
        as_custom_op("triton", triton.triton_forward, triton.triton_backward, triton.saved_like),
        triton.can_run_triton,
    ),
    "blocked": (
        as_custom_op("blocked", blocked.blocked_forward, blocked.blocked_backward, blocked.saved_like),
        blocked.can_run_blocked,
    ),
    "reference": (halo_attention_reference, can_run_reference),
}


def backend_for(q: torch.Tensor, backend: str | None = None, dim_v: int = 0) -> str:
    """The name of the backend that runs for queries like `q` (its device, dtype and last size count).

    Args:
        q: queries, as in `halo_attention`.
        backend: force this one; else the environment variable TIMM_HALONET_BACKEND does; else the first that can.
        dim_v: value channels of a head, where there are more than of queries.

    Raises:
        ValueError: the forced backend does not exist or cannot run, with the reason.
    """
    forced = backend or os.environ.get("TIMM_HALONET_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"unknown halo attention backend {forced!r}; there are {', '.join(BACKENDS)}")
    if _is_exporting() or torch.jit.is_tracing():
        return "reference"  # exporters need plain operators, and that outranks a preference
    dim = max(q.shape[-1], dim_v)
    if torch.compiler.is_compiling():  # a constant, where the size may be a symbol
        dim = triton.MAX_DIM + 1 if dim > triton.MAX_DIM else 1
    name, reason = _choose(q.device.type, q.dtype, dim, forced)
    if reason is not None:
        raise ValueError(f"halo attention backend {forced!r} cannot run here: {reason}")
    return name


@torch.compiler.assume_constant_result  # torch.compile in PyTorch 2.11 takes it for true wherever it meets it
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # torch.compile must not look into predicates that, say, run a compiler
def _choose(device: str, dtype: torch.dtype, dim: int, forced: str | None) -> tuple[str, str | None]:
    """The name of the first backend that can run, and None; or the forced one's, and why it cannot."""
    like = torch.empty(0, dim, device=device, dtype=dtype)
    if forced is not None:
        return forced, BACKENDS[forced][1](like)
    return next(name for name, (_, can_run) in BACKENDS.items() if can_run(like) is None), None


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    *,
    block_size: int,
    halo_size: int,
    query_stride: int = 1,
    scale: float | None = None,
    scale_rel: bool = False,
    mask_border: bool = True,
    strided_rel: str = "true",
    backend: str | None = None,
) -> torch.Tensor:
    """Halo attention (arXiv 2103.12731, section 2.2) with two-table relative positions.

    The map is cut into blocks of block_size x block_size pixels; the queries of a block attend to the keys of the
    block grown by halo_size pixels on each side. The logit is scale * q.k + q.r_h + q.r_w; the softmax runs in float32
    (float64 for float64 inputs). Under autocast everything but the softmax runs in the autocast dtype.

    Args:
        q: (batch, ceil(H / query_stride), ceil(W / query_stride), heads, d_qk).
        k: (batch, H, W, heads, d_qk), any H, W >= 1. Tensors need not be contiguous.
        v: (batch, H, W, heads, d_v).
        rel_height: (2 * (block_size + 2 * halo_size) - 1, d_qk); row u - y + block_size + 3 * halo_size - 1 serves a
            query in pixel row y and a key in pixel row u; shared by the heads.
        rel_width: the same for columns.
        block_size: pixels, >= 1.
        halo_size: pixels, >= 0.
        query_stride: queries stand on every query_stride-th pixel; must divide block_size.
        scale: factor of q.k; None for d_qk ** -0.5.
        scale_rel: multiply the relative logits by `scale` as well.
        mask_border: True: only pixels of the image are keys. False: a ring of halo_size zero keys and zero values
            around the image takes part in the softmax, as in `timm.layers.halo_attn.HaloAttn`.
        strided_rel: "true": a strided query's relative position counts from its pixel; "grid": from its place in the
            query grid of its block, as in `timm.layers.halo_attn.HaloAttn`.
        backend: name of a backend, see `backend_for`.

    Returns:
        (batch, ceil(H / query_stride), ceil(W / query_stride), heads, d_v), contiguous, in the dtype of v.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit; the message has the numbers.
        RuntimeError: for second derivatives, forward-mode derivatives and torch.func.grad, unless the reference runs.
    """
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    return scriptable_halo_attention(
        q, k, v, rel_height, rel_width,
        block_size, halo_size, query_stride, scale, scale_rel, mask_border, strided_rel, backend,
    )  # fmt: skip


def scriptable_halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    query_stride: int,
    scale: float,
    scale_rel: bool,
    mask_border: bool,
    strided_rel: str,
    backend: str | None = None,
) -> torch.Tensor:
    """`halo_attention` for layers: torch.jit.script takes no keyword-only arguments with defaults."""
    rel_step = query_stride if strided_rel == "true" else 1
    options = Options(block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step)
    if torch.jit.is_scripting():
        return halo_attention_reference(q, k, v, rel_height, rel_width, options)
    else:
        _check(q, k, v, rel_height, rel_width, block_size, halo_size, query_stride, strided_rel)
        q, k, v = _autocast(q, k, v)
        return BACKENDS[backend_for(q, backend, v.shape[4])][0](q, k, v, rel_height, rel_width, options)


def halo_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    *,
    block_size: int,
    halo_size: int,
    query_stride: int = 1,
    scale: float | None = None,
    scale_rel: bool = False,
    mask_border: bool = True,
    strided_rel: str = "true",
) -> torch.Tensor:
    """The softmax weights themselves, for looking at: memory for the whole map's logits. Arguments as above.

    Returns:
        (batch, blocks down, blocks across, heads, query rows, query columns, window rows, window columns); window row
        u of block i is pixel row i * block_size - halo_size + u, and weights outside the image are 0 where masked.
    """
    _check(q, k, k, rel_height, rel_width, block_size, halo_size, query_stride, strided_rel)
    scale = float(q.shape[4]) ** -0.5 if scale is None else scale
    rel_step = query_stride if strided_rel == "true" else 1
    options = Options(block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step)
    return attention_weights_reference(q, k, rel_height, rel_width, options)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check(q, k, v, rel_height, rel_width, block_size, halo_size, query_stride, strided_rel) -> None:
    """Everything a caller can get wrong, in one place."""
    if block_size < 1 or halo_size < 0 or query_stride < 1:
        raise ValueError(
            f"need block_size >= 1, halo_size >= 0, query_stride >= 1, got {block_size=}, {halo_size=}, {query_stride=}"
        )
    if block_size % query_stride:
        raise ValueError(
            f"query_stride must divide block_size, got {block_size=}, {query_stride=}; "
            "where it does not, attend at stride 1 and pool (HaloAttention does)"
        )
    if strided_rel not in ("true", "grid"):
        raise ValueError(f"strided_rel must be 'true' or 'grid', got {strided_rel!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 5:
            raise ValueError(f"{name} must be (batch, height, width, heads, dim), got shape {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device} but {name} is {x.dtype} on {x.device}")
    if k.shape[:4] != v.shape[:4] or k.shape[4] != q.shape[4]:
        raise ValueError(
            "k and v must agree but for their last size, and k with q in it, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    rows = 2 * (block_size + 2 * halo_size) - 1
    for name, x in (("rel_height", rel_height), ("rel_width", rel_width)):
        if tuple(x.shape) != (rows, q.shape[4]):
            raise ValueError(
                f"{name} must be ({rows}, {q.shape[4]}) for {block_size=}, {halo_size=}, got {tuple(x.shape)}"
            )
    if torch.compiler.is_compiling():
        return  # what follows would only become guards on sizes that the layers compute themselves
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"empty input: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    expected = (k.shape[0], -(-k.shape[1] // query_stride), -(-k.shape[2] // query_stride), k.shape[3])
    if tuple(q.shape[:4]) != expected:
        raise ValueError(
            f"q must be {expected} in its first four sizes for k {tuple(k.shape)} and {query_stride=}, "
            f"got {tuple(q.shape)}"
        )

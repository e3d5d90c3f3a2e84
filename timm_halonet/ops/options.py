"""What decides a halo attention next to its tensors, and the checks of both, once for all backends."""

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Options(NamedTuple):
    """See `timm_halonet.ops.halo_attention` for the first six; sizes in pixels. `make_options` checks them."""

    block_size: int
    halo_size: int
    query_stride: int
    scale: float
    scale_rel: bool
    mask_border: bool
    rel_step: int  # distance in pixels between neighbouring queries as the relative position sees it


def make_options(
    block_size: int,
    halo_size: int,
    query_stride: int,
    scale: float,
    scale_rel: bool,
    mask_border: bool,
    strided_rel: str,
) -> Options:
    """The options of a halo attention, as in `timm_halonet.ops.halo_attention`.

    Raises:
        ValueError: for values that do not fit; the message has them.
    """
    if strided_rel not in ("true", "grid"):
        raise ValueError(f"strided_rel must be 'true' or 'grid', got {strided_rel!r}")
    rel_step = query_stride if strided_rel == "true" else 1
    options = Options(block_size, halo_size, query_stride, scale, scale_rel, mask_border, rel_step)
    check_options(options)
    return options


def check_options(options: Options) -> None:
    """Raises a ValueError with the values if they do not fit."""
    block_size, halo_size, query_stride, scale, *_, rel_step = options
    check_integers(block_size=block_size, halo_size=halo_size, query_stride=query_stride, rel_step=rel_step)
    if block_size < 1 or halo_size < 0 or query_stride < 1:
        raise ValueError(
            f"need block_size >= 1, halo_size >= 0, query_stride >= 1, got {block_size=}, {halo_size=}, {query_stride=}"
        )
    if block_size % query_stride:
        raise ValueError(
            f"query_stride must divide block_size, got {block_size=}, {query_stride=}; "
            "where it does not, attend at stride 1 and pool (HaloAttention does)"
        )
    if not 1 <= rel_step <= query_stride:
        raise ValueError(f"need a rel_step from 1 to query_stride, got {rel_step=}, {query_stride=}")
    check_scale(scale)


def check_integers(**values: Any) -> None:
    """Raises a ValueError with name and value of the first that is not an integer; True and 8.0 are not."""
    for name, value in values.items():
        # in a compiled or exported program an integer may be symbolic
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
            raise ValueError(f"{name} must be an integer, got {name}={value!r}")


def check_scale(scale: Any) -> None:
    """Raises a ValueError if it is not a finite number."""
    number = isinstance(scale, (float, int, torch.SymFloat, Real)) and not isinstance(scale, bool)
    # a compiled graph may have it as a symbol; the op checks again when it has the value
    if not number or not (torch.compiler.is_compiling() or math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")


def check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> None:
    """Everything a caller can get wrong about the five tensors: type, layout, device, dtype and shape.

    `options` must have passed `check_options`.

    Raises:
        ValueError: for tensors that do not fit; the message has the numbers.
    """
    tensors = (("q", q), ("k", k), ("v", v), ("rel_height", rel_height), ("rel_width", rel_width))
    device = getattr(q, "device", None)
    for name, x in tensors:
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {x.layout}; .to_dense() makes one")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {', '.join(str(d)[6:] for d in DTYPES)}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"all tensors must be on one device, got q on {q.device} and {name} on {x.device}")
    for name, x in tensors[:3]:
        if x.ndim != 5:
            raise ValueError(f"{name} must be (batch, height, width, heads, dim), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
    (*queries, dim), (*keys, dim_k), (*values, dim_v) = q.shape, k.shape, v.shape
    if keys != values or dim_k != dim:
        raise ValueError(
            "k and v must agree except in their last size, and k with q in it, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    block_size, halo_size, query_stride = options[:3]
    rows = 2 * (block_size + 2 * halo_size) - 1
    for name, x in tensors[3:]:
        if tuple(x.shape) != (rows, dim):
            raise ValueError(f"{name} must be ({rows}, {dim}) for {block_size=}, {halo_size=}, got {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        return  # what follows would only become guards on sizes that the layers compute themselves; the op checks again
    if 0 in (*queries, dim, *keys, dim_v):
        raise ValueError(f"empty input: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    batch, height, width, heads = keys
    expected = [batch, -(-height // query_stride), -(-width // query_stride), heads]
    if queries != expected:
        raise ValueError(
            f"q must be {tuple(expected)} in its first four sizes for k {tuple(k.shape)} and {query_stride=}, "
            f"got {tuple(q.shape)}"
        )

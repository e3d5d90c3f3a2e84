"""Halo attention as functions on tensors: the contract and the checks."""

import torch

from .dispatch import backend_for, implementation
from .export import halo_attention_export
from .options import Options, check_shapes, make_options
from .reference import attention_weights_reference


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
        backend: name of a backend, see `backend_for` and `use_backend`.

    Returns:
        (batch, ceil(H / query_stride), ceil(W / query_stride), heads, d_v), contiguous, in the dtype of v.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit; the message has the numbers.
        RuntimeError: for second derivatives, forward-mode derivatives and torch.func.grad, unless the reference runs.
    """
    options = make_options(block_size, halo_size, query_stride, _scale(scale, q), scale_rel, mask_border, strided_rel)
    return scriptable_halo_attention(q, k, v, rel_height, rel_width, options, backend)


def scriptable_halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
    backend: str | None = None,
) -> torch.Tensor:
    """`halo_attention` for layers, which have their options ready, and for torch.jit.script."""
    if torch.jit.is_scripting():
        return halo_attention_export(q, k, v, rel_height, rel_width, options)
    else:
        _check_once(q, k, v, rel_height, rel_width, options)
        q, k, v = _autocast(q, k, v)
        return implementation(backend_for(q, backend, v.shape[4]))(q, k, v, rel_height, rel_width, options)


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
    options = make_options(block_size, halo_size, query_stride, _scale(scale, q), scale_rel, mask_border, strided_rel)
    check_shapes(q, k, k, rel_height, rel_width, options)
    return attention_weights_reference(q, k, rel_height, rel_width, options)


# what passed the checks, of all that they look at
_PASSED: set[tuple] = set()
_MOST_PASSED = 4096


def _check_once(q, k, v, rel_height, rel_width, options: Options) -> None:
    """`check_shapes`, which takes longer than a look at what has passed it before."""
    if torch.compiler.is_compiling():
        return check_shapes(q, k, v, rel_height, rel_width, options)
    try:
        what = (
            options[:3], q.shape, k.shape, v.shape, rel_height.shape, rel_width.shape,
            q.dtype, k.dtype, v.dtype, rel_height.dtype, rel_width.dtype,
            q.device, k.device, v.device, rel_height.device, rel_width.device,
            q.layout, k.layout, v.layout, rel_height.layout, rel_width.layout,
        )  # fmt: skip
        if what in _PASSED:
            return None
    except (AttributeError, TypeError):  # no tensors, or sizes that are symbols
        return check_shapes(q, k, v, rel_height, rel_width, options)
    check_shapes(q, k, v, rel_height, rel_width, options)
    if len(_PASSED) >= _MOST_PASSED:
        _PASSED.clear()
    _PASSED.add(what)
    return None


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    if scale is not None:
        return scale
    # queries without channels are refused later, with the other shapes
    return float(q.shape[4]) ** -0.5 if q.ndim == 5 and q.shape[4] else 1.0

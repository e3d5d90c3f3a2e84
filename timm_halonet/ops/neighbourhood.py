"""Blocked attention with any neighbourhood, in PyTorch operators: for layers whose function the fused op has not.

The fused op of `timm_halonet.ops.halo_attention` has one symmetric halo, two-table relative positions and no mask. This
one has a halo for each side, any bias, masks, keys from elsewhere and three borders, and leaves the attention itself to
`torch.nn.functional.scaled_dot_product_attention`. Windows are copied out of the map, so memory grows by
window / block for keys and values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .options import DTYPES, check_scale

PADDINGS = ("masked", "zeros", "circular")


def blocked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int | Sequence[int],
    halo: int | Sequence[int] = 0,
    *,
    bias: torch.Tensor | None = None,
    extra_keys: torch.Tensor | None = None,
    extra_values: torch.Tensor | None = None,
    extra_mask: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    padding: str = "masked",
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every block of queries to the keys of its window, and to extra keys of its own.

    The map is cut into blocks from the top left; the last ones may reach beyond the map. A block's window is the block
    grown by the halo. Blocks are counted row by row; blocks = ceil(height / block height) * ceil(width / block width).
    The queries of a block and the keys of a window are counted row by row too, and the extra keys come after those of
    the window. The logit is scale * q.k + bias. A query all of whose keys are masked gets zeros.

    Args:
        q: (batch, heads, height, width, dim), any height and width >= 1. Tensors need not be contiguous.
        k: the shape of q.
        v: (batch, heads, height, width, dim_v).
        block_size: pixels, or (height, width) in pixels, >= 1.
        halo: pixels by which a window reaches beyond its block, or (top, bottom, left, right), >= 0.
        bias: added to the logits; broadcasts to (batch, heads, blocks, queries of a block, keys of a window + n). One
            for all blocks is thus (heads, 1, queries, keys + n).
        extra_keys: (batch, heads, blocks, n, dim), n further keys a block.
        extra_values: (batch, heads, blocks, n, dim_v).
        extra_mask: True where an extra key takes part; broadcasts to (batch, heads, blocks, n).
        key_mask: (batch, height, width), True where a pixel takes part as a key.
        padding: what windows hold outside the map. "masked": nothing. "zeros": the halo around the map is keys and
            values of zeros, which take part; nothing beyond it. "circular": the map goes on at its other side; a
            window larger than the map meets pixels more than once.
        scale: factor of q.k; None for dim ** -0.5.

    Returns:
        (batch, heads, height, width, dim_v).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit; the message has the numbers.

    Source: this package's choice; the common ground of arXiv 2103.12731, 2107.00641 and 1909.05054.
    """
    high, wide = _numbers("block_size", block_size, 2, 1)
    block = (high, wide)
    top, bottom, left, right = _numbers("halo", halo, 4, 0)
    batch, heads, height, width = _check_maps(q, k, v, key_mask, padding)
    down, across = -(-height // block[0]), -(-width // block[1])
    below, beside = down * block[0] - height, across * block[1] - width  # what the last blocks have beyond the map
    window = (block[0] + top + bottom, block[1] + left + right)
    queries, keys = block[0] * block[1], window[0] * window[1]
    n = _check_extra(extra_keys, extra_values, extra_mask, (batch, heads, down * across), q, v)
    _check_bias(bias, (batch, heads, down * across, queries, keys + n), q)
    if scale is not None:
        check_scale(scale)

    def windows(x: torch.Tensor, ring: float = 0) -> torch.Tensor:
        """(batch, heads, height, width, dim) -> (batch, heads, blocks, keys, dim); `ring` fills the halo of the map."""
        if padding == "circular":
            rows = torch.arange(-top, height + below + bottom, device=x.device) % height
            cols = torch.arange(-left, width + beside + right, device=x.device) % width
            x = x.index_select(2, rows).index_select(3, cols)
        else:
            x = F.pad(F.pad(x, (0, 0, left, right, top, bottom), value=ring), (0, 0, 0, beside, 0, below))
        return cut_windows(x, window, block)

    k, v = windows(k), windows(v)
    mask = None
    outside = {"masked": any((top, bottom, left, right, below, beside)), "zeros": below or beside, "circular": False}
    if key_mask is not None or outside[padding]:
        inside = torch.ones(1, height, width, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
        mask = windows(inside[:, None, :, :, None].to(torch.uint8), float(padding == "zeros")).transpose(3, 4).bool()
    if extra_keys is not None and extra_values is not None:
        k, v = torch.cat([k, extra_keys], 3), torch.cat([v, extra_values], 3)
        if mask is not None or extra_mask is not None:
            mask = _join_masks(mask, keys, extra_mask, n, down * across)
    nothing = None
    if key_mask is not None and mask is not None:  # softmax over nothing is NaN in some kernels: attend, then discard
        nothing = ~mask.any(-1, keepdim=True)
        mask = mask | nothing
    q = cut_windows(F.pad(q, (0, 0, 0, beside, 0, below)), block, block)
    attend = _attend_for_engines if torch.compiler.is_exporting() or torch.jit.is_tracing() else _attend
    out = attend(q, k, v, None if bias is None else bias.to(q.dtype), mask, scale)
    if nothing is not None:
        out = out.masked_fill(nothing, 0.0)
    out = out.reshape(batch, heads, down, across, *block, v.shape[-1]).transpose(3, 4)
    if (across == 1 or block[0] == 1) and nothing is None and out.requires_grad:
        # the rest are views of what scaled_dot_product_attention keeps for its backward, which the caller may overwrite
        out = out.clone()
    return out.reshape(batch, heads, height + below, width + beside, v.shape[-1])[:, :, :height, :width]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """(batch, heads, blocks, queries or keys, dim), and what broadcasts to the logits -> like q, with v's channels."""
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    if mask is not None:  # one for the whole batch where it can be, which expand keeps without copies
        mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, q.shape[1], q.shape[2], 1, 1))).flatten(1, 2)
    out = F.scaled_dot_product_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask, scale=scale)
    return out.reshape(*q.shape[:4], v.shape[-1])


def _attend_for_engines(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """The same for exporters, without infinite or large constants: they ruin the scale of an int8 model.

    A masked key takes its query's smallest logit, which is not above the largest one of a key that takes part. Its
    weight is taken out behind the softmax.
    """
    logits = torch.matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(3, 4))
    if bias is not None:
        logits = logits + bias
    if logits.dtype != torch.float64:
        logits = logits.float()
    if mask is None:
        return torch.matmul(logits.softmax(-1).to(v.dtype), v)
    weights = torch.where(mask, logits, logits.amin(-1, keepdim=True)).softmax(-1) * mask.to(logits.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(v.dtype), v)


def cut_windows(x: torch.Tensor, window: tuple[int, int], step: tuple[int, int]) -> torch.Tensor:
    """All windows of a map, (height, width) in pixels each, `step` apart.

    Shape: (batch, heads, height, width, dim) -> (batch, heads, windows, pixels of a window, dim).
    """
    if torch.jit.is_tracing():  # ONNX has no unfold of sizes that are not known
        rows, cols = (
            torch.arange(0, x.shape[dim] - size + 1, by, device=x.device)[:, None] + torch.arange(size, device=x.device)
            for dim, size, by in ((2, window[0], step[0]), (3, window[1], step[1]))
        )
        x = x.index_select(2, rows.flatten()).index_select(3, cols.flatten())
        x = x.reshape(x.shape[0], x.shape[1], rows.shape[0], window[0], cols.shape[0], window[1], x.shape[4])
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    x = x.unfold(2, window[0], step[0]).unfold(3, window[1], step[1])  # batch, heads, down, across, dim, *window
    return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(2, 3)


def _join_masks(mask: torch.Tensor | None, keys: int, extra: torch.Tensor | None, n: int, blocks: int) -> torch.Tensor:
    """The masks of windows (batch or 1, 1, blocks, 1, keys) and extra keys, None for all, as one."""
    device = (mask if mask is not None else extra).device  # type: ignore[union-attr]
    ones = torch.ones(1, 1, blocks, 1, 1, dtype=torch.bool, device=device)
    mask = ones.expand(-1, -1, -1, -1, keys) if mask is None else mask
    extra = ones if extra is None else extra[(None,) * (4 - extra.ndim)].unsqueeze(3)
    lead = torch.broadcast_shapes(mask.shape[:4], extra.shape[:4])
    return torch.cat([mask.expand(*lead, keys), extra.expand(*lead, n)], -1)


def _numbers(name: str, value: int | Sequence[int], length: int, least: int) -> tuple[int, ...]:
    integers = (int, torch.SymInt)  # a size of the map may be symbolic while exported
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * length
    whole = all(isinstance(x, integers) and not isinstance(x, bool) and x >= least for x in numbers)
    if len(numbers) != length or not whole:
        raise ValueError(f"{name} must be an integer or {length} of them, each >= {least}, got {value!r}")
    return numbers


def _check_maps(q, k, v, key_mask, padding) -> tuple[int, int, int, int]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 5:
            raise ValueError(f"{name} must be (batch, heads, height, width, dim), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {', '.join(str(d)[6:] for d in DTYPES)}, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device} but {name} is {x.dtype} on {x.device}")
    if k.shape != q.shape or v.shape[:4] != q.shape[:4]:
        raise ValueError(
            "q, k and v must agree except in the last size of v, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"empty input: q {tuple(q.shape)}, v {tuple(v.shape)}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    expected = (q.shape[0], *q.shape[2:4])
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected):
        raise ValueError(f"key_mask must be boolean {expected}, got {key_mask.dtype} {tuple(key_mask.shape)}")
    if key_mask is not None:
        _check_device("key_mask", key_mask, q)
    return q.shape[0], q.shape[1], q.shape[2], q.shape[3]


def _check_extra(keys, values, mask, lead: tuple[int, int, int], q, v) -> int:
    """The number of extra keys of a block."""
    if (keys is None) != (values is None):
        raise ValueError("extra_keys and extra_values come together, got only one of them")
    if keys is None:
        if mask is not None:
            raise ValueError("extra_mask without extra_keys; key_mask masks the pixels of the map")
        return 0
    n = keys.shape[-2] if keys.ndim > 1 else 0
    for name, x, dim in (("extra_keys", keys, q.shape[-1]), ("extra_values", values, v.shape[-1])):
        if tuple(x.shape) != (*lead, n, dim) or n < 1:
            raise ValueError(f"{name} must be {(*lead, max(n, 1), dim)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} but {name} is {x.dtype}")
        _check_device(name, x, q)
    if mask is not None and (mask.dtype != torch.bool or not _broadcasts(mask, (*lead, n))):
        raise ValueError(
            f"extra_mask must be boolean and broadcast to {(*lead, n)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask is not None:
        _check_device("extra_mask", mask, q)
    return n


def _check_bias(bias, shape: tuple[int, ...], q) -> None:
    if bias is None:
        return
    if not _broadcasts(bias, shape):
        raise ValueError(
            f"bias must broadcast to (batch, heads, blocks, queries, keys) = {shape}, got {tuple(bias.shape)}"
        )
    if bias.dtype not in DTYPES:
        raise ValueError(f"bias must be {', '.join(str(d)[6:] for d in DTYPES)}, got {bias.dtype}")
    _check_device("bias", bias, q)


def _check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"all tensors must be on one device, got q on {q.device} and {name} on {x.device}")


def _broadcasts(x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return x.ndim <= len(shape) and all(a in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False))

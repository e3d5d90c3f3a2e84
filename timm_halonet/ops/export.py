"""Halo attention as exporters want it: few large matrix products, and nothing that an engine might not have.

The function is the reference's; `halo_attention_reference` stays its definition. What is different:

- *It works on maps as convolutions have them*, heads and channels first, and lays each of them out once.
- *Windows are rows of the map*, all channels of a pixel in one piece, taken by one index. Outside the map it points to
  the nearest pixel, so nothing is padded for keys that are not seen.
- *The mask is part of the relative logits*, which have a row (or column) of keys each and thus are small. Where a window
  leaves the map, the relative position is that of the nearest pixel, and `OUTSIDE` is subtracted. So each key outside
  has the logit of a key inside, less 40: a weight below 1e-17, whatever the size of the logits. There are no infinite
  or large constants, which ruin the scale of an int8 model, and no masks on the logits themselves.
- *What depends on sizes only is a constant* where sizes are known.

Tensors have at most five dimensions. Batch, height and width may be symbols, and everything here can be scripted.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from .options import Options

OUTSIDE = 40.0  # logits that a key outside the map is below the nearest one inside


def halo_attention_export(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Attend from every block of queries to its haloed window; shapes as in `timm_halonet.ops.halo_attention`."""
    heads, dim_v = v.shape[3], v.shape[4]
    queries = q.permute(0, 3, 4, 1, 2).flatten(1, 2)
    keys_values = torch.cat([k, v], -1).permute(0, 3, 4, 1, 2).flatten(1, 2)
    out = halo_attention_maps(queries, keys_values, rel_height, rel_width, heads, options)
    out = out.reshape(out.shape[0], heads, dim_v, out.shape[2], out.shape[3])
    return out.permute(0, 3, 4, 1, 2).contiguous()


def halo_attention_maps(
    q: torch.Tensor,
    kv: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    heads: int,
    options: Options,
) -> torch.Tensor:
    """The same from the maps that the projections of a layer are.

    Args:
        q: (batch, heads * d_qk, ceil(H / query_stride), ceil(W / query_stride)).
        kv: (batch, heads * (d_qk + d_v), H, W); of each head the keys, then the values.
        rel_height, rel_width, options: as in `halo_attention_export`.
        heads: their number.

    Returns:
        (batch, heads * d_v, ceil(H / query_stride), ceil(W / query_stride)), in the dtype of `kv`.
    """
    block_size, halo_size, stride = options.block_size, options.halo_size, options.query_stride
    window, block_q = block_size + 2 * halo_size, block_size // stride
    batch, height, width, height_q, width_q = kv.shape[0], kv.shape[2], kv.shape[3], q.shape[2], q.shape[3]
    dim = rel_height.shape[1]
    both = kv.shape[1] // heads  # channels of a key and its value
    dim_v = both - dim
    down, across = (height + block_size - 1) // block_size, (width + block_size - 1) // block_size
    whole = _are_known(height, width) and height % block_size == 0 and width % block_size == 0
    # pixels that are keys reach so far beyond the map
    ring = 0 if options.mask_border else halo_size
    pixels, rel_rows, rel_cols, out_rows, out_cols = _positions(down, across, height, width, options, q)

    # windows: (batch, heads * blocks, keys of a window, channels)
    if ring > 0:
        kv = F.pad(kv, [ring, ring, ring, ring])
    kv = kv.reshape(batch, heads, both, -1).transpose(2, 3)
    kv = kv.index_select(2, pixels)
    kv = kv.reshape(batch, _lead(heads * down * across), window * window, both)
    keys, values = kv.split([dim, dim_v], dim=3)

    # queries and their relative logits: (batch, heads, height, width, channels)
    q = q.reshape(batch, heads, dim, height_q, width_q).permute(0, 1, 3, 4, 2)
    if not whole:
        q = F.pad(q, [0, 0, 0, across * block_q - width_q, 0, down * block_q - height_q])
    scaled = q * options.scale
    q_rel = scaled if options.scale_rel else q
    rel_h = torch.matmul(q_rel, _laid_out(_like(rel_height, q), rel_rows, window))
    rel_w = torch.matmul(q_rel.transpose(2, 3), _laid_out(_like(rel_width, q), rel_cols, window))
    if not whole or halo_size > ring:
        rel_h, rel_w = rel_h - _like(out_rows, q), rel_w - _like(out_cols, q)
    q = torch.cat([scaled, rel_h, rel_w.transpose(2, 3)], -1)
    # the blocks of queries: (batch, heads * blocks, queries of a block, channels)
    wide = dim + 2 * window
    q = q.reshape(batch, _lead(heads * down), block_q, across, block_q * wide).transpose(2, 3)
    q = q.reshape(batch, _lead(heads * down * across), block_q * block_q, wide)
    q, rel_h, rel_w = q.split([dim, window, window], dim=3)

    logits = torch.matmul(q, keys.transpose(2, 3))
    logits = logits + (rel_h.unsqueeze(4) + rel_w.unsqueeze(3)).flatten(3)
    if logits.dtype != torch.float64 and logits.dtype != torch.float32:
        logits = logits.float()
    out = torch.matmul(_like(logits.softmax(dim=-1), kv), values)

    out = out.reshape(batch, _lead(heads * down), across, block_q, block_q * dim_v).transpose(2, 3)
    out = out.reshape(batch, heads, _lead(down * block_q * across * block_q), dim_v).transpose(2, 3)
    if whole:
        return out.reshape(batch, heads * dim_v, height_q, width_q)
    out = out.reshape(batch, heads * dim_v, down * block_q, across * block_q)
    return out[:, :, :height_q, :width_q]


def _are_known(height: int, width: int) -> bool:
    """Whether height and width are numbers, and not symbols of a graph that is being made."""
    if torch.jit.is_scripting():
        return False
    else:
        # dynamo shows symbolic sizes as integers
        return isinstance(height, int) and isinstance(width, int) and not torch.compiler.is_dynamo_compiling()


def _lead(size: int) -> int:
    """A size that a reshape can work out: what it is for symbols, which take minutes to divide; traced, what is left.

    OpenVINO 2026.4 computes garbage where a traced model multiplies sizes for it.
    """
    return -1 if torch.jit.is_scripting() or torch.jit.is_tracing() else size


def _positions(
    down: int, across: int, height: int, width: int, options: Options, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What depends on sizes only: the pixels of all windows, rows of both tables, what is subtracted outside.

    The pixel of each key, counted in the map with its ring; for each row (and column) of queries and each row (and
    column) of its window, the row of the table, one after the other; and (queries, 1, window), `OUTSIDE` for keys
    outside the map and its ring, else 0.
    """
    window, block_q = options.block_size + 2 * options.halo_size, options.block_size // options.query_stride
    if torch.jit.is_scripting():
        return _positions_of(
            torch.arange(down, device=like.device),
            torch.arange(across, device=like.device),
            torch.arange(window, device=like.device),
            torch.arange(block_q, device=like.device),
            height,
            width,
            options,
        )
    else:
        known = _are_known(height, width)
        numbers = np.arange if known else partial(torch.arange, device=like.device)
        arrays = _positions_of(*(numbers(n) for n in (down, across, window, block_q)), height, width, options)
        # not recorded: whoever records gets a constant
        return tuple(torch.tensor(x, device=like.device) for x in arrays) if known else arrays


def _positions_of(
    down: torch.Tensor,
    across: torch.Tensor,
    window: torch.Tensor,
    block_q: torch.Tensor,
    height: int,
    width: int,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_positions` from the numbers of blocks, of pixels in a window and of queries in a block; NumPy's arrays do too."""
    ring = 0 if options.mask_border else options.halo_size
    rows, rel_rows, out_rows = _positions_along(down, window, block_q, height, ring, options)
    cols, rel_cols, out_cols = _positions_along(across, window, block_q, width, ring, options)
    pixels = (rows + ring)[:, None, :, None] * (width + 2 * ring) + (cols + ring)[None, :, None, :]
    return pixels.reshape(-1), rel_rows, rel_cols, out_rows, out_cols


def _positions_along(
    blocks: torch.Tensor, window: torch.Tensor, block_q: torch.Tensor, size: int, ring: int, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one dimension: pixels (blocks, window), rows of the table, what is subtracted outside."""
    first = blocks[:, None] * options.block_size - options.halo_size
    places = first + window[None, :]
    nearest = places.clip(-ring, size - 1 + ring)
    query = block_q[None, :, None] * options.rel_step
    rel = (nearest - first + (window.shape[0] - 1))[:, None, :] - query
    outside = (abs(places - nearest).clip(0, 1) * OUTSIDE)[:, None, :] + query * 0.0
    return nearest, rel.reshape(-1), outside.reshape(-1, 1, window.shape[0])


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In the dtype of another one; without an operator where it has that."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def _laid_out(table: torch.Tensor, index: torch.Tensor, window: int) -> torch.Tensor:
    """Rows of a table (2 * window - 1, dim) -> (queries, dim, window)"""
    return table.index_select(0, index).reshape(-1, window, table.shape[1]).transpose(1, 2)

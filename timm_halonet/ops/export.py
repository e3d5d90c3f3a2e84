"""Halo attention as exporters want it: few large matrix products, and nothing that an engine might not have.

The function is the reference's; `halo_attention_reference` stays its definition. What is different:

- *It works on maps as convolutions have them*, heads and channels first, and makes rows of pixels of each of them once.
- *Windows are taken by an index of pixels*, all channels of a pixel at once. Outside the map it points to the nearest
  pixel, so nothing is padded up to whole blocks, nor for keys that are not seen. So are blocks of queries, where blocks
  are not known to cover the map exactly; else they are transposed.
- *The mask is part of the relative logits*, which are small: a row and a column of keys each. Where a window leaves the
  map, the relative position is that of the nearest pixel, and `OUTSIDE` is subtracted. So each key outside has the
  logit of a key inside, less 40: a weight below 1e-17, whatever the size of the logits. There are no infinite or large
  constants, which ruin the scale of an int8 model, and no masks on the logits themselves.
- *Products, addition and softmax are one chain in three dimensions*, which OpenVINO makes one kernel of.
- *What depends on sizes only is a constant* where sizes are known.

Tensors have at most five dimensions. Batch, height and width may be symbols, and everything here can be scripted.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

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
    block_size, halo_size = options.block_size, options.halo_size
    window, block_q = block_size + 2 * halo_size, block_size // options.query_stride
    queries = block_q * block_q
    batch, height, width, height_q, width_q = kv.shape[0], kv.shape[2], kv.shape[3], q.shape[2], q.shape[3]
    dim = rel_height.shape[1]
    dim_v = kv.shape[1] // heads - dim
    blocks = ((height + block_size - 1) // block_size) * ((width + block_size - 1) // block_size)
    whole = _is_multiple(height, block_size) and _is_multiple(width, block_size)
    at = _positions(height, width, height_q, width_q, options, q)

    # maps as rows of pixels: (batch, heads, pixels, channels)
    q = q.reshape(batch, heads, dim, _left(height_q * width_q)).transpose(2, 3)
    if not options.mask_border and halo_size > 0:
        kv = F.pad(kv, [halo_size, halo_size, halo_size, halo_size])
    kv = kv.reshape(batch, heads, dim + dim_v, _left(kv.shape[2] * kv.shape[3]))
    k, v = kv.split([dim, dim_v], dim=2)
    # windows: (batch * heads * blocks, keys of a window, channels)
    k, v = k.transpose(2, 3).index_select(2, at.keys), v.transpose(2, 3).index_select(2, at.keys)
    k = k.reshape(_left(batch * heads * blocks), window * window, dim)
    v = v.reshape(_left(batch * heads * blocks), window * window, dim_v)

    # relative logits: of each row of queries for the rows of its window, of each column for the columns
    scaled = q * options.scale
    q_rel = scaled if options.scale_rel else q
    by_row = q_rel.reshape(batch, heads, height_q, width_q, dim)
    # by an index: ONNX Runtime merges transpositions into one that it is slow at
    by_column = q_rel.index_select(2, at.by_column).reshape(batch, heads, width_q, height_q, dim)
    rows = torch.matmul(by_row, _laid_out(_like(rel_height, q), at.rel_rows, window))
    cols = torch.matmul(by_column, _laid_out(_like(rel_width, q), at.rel_cols, window))
    if not whole or (options.mask_border and halo_size > 0):
        rows, cols = rows - _like(at.outside_rows, q), cols - _like(at.outside_cols, q)
    rel = torch.cat([rows, cols.transpose(2, 3)], 4)

    # blocks of queries: (batch * heads * blocks, queries of a block, channels)
    if whole:  # and known: transposed, which is cheaper than an index
        down, across = height // block_size, width // block_size
        q = scaled.reshape(batch * heads, down, block_q, across, block_q * dim).transpose(2, 3)
        rel = rel.reshape(batch * heads, down, block_q, across, block_q * 2 * window).transpose(2, 3)
    else:
        q = scaled.index_select(2, at.queries)
        rel = rel.reshape(batch, heads, _left(height_q * width_q), 2 * window).index_select(2, at.queries)
    q = q.reshape(_left(batch * heads * blocks), queries, dim)
    # to all keys of the window by a product: inductor's code for a sum of rows and columns takes twice as long
    rel = torch.matmul(rel.reshape(_left(batch * heads * blocks), queries, 2 * window), _spread(window, at.keys, q))
    # the chain that engines fuse: no reshape in it
    logits = torch.bmm(q, k.transpose(1, 2)) + rel
    if logits.dtype != torch.float64 and logits.dtype != torch.float32:
        logits = logits.float()
    out = torch.bmm(_like(logits.softmax(dim=-1), v), v)
    if whole:
        out = out.reshape(batch * heads, height // block_size, width // block_size, block_q, block_q * dim_v)
        out = out.transpose(2, 3).reshape(batch, heads, height_q * width_q, dim_v)
    else:
        # in three dimensions: OpenVINO 2026.4 fails where queries and outputs are taken from and put into four alike
        maps = scaled.flatten(0, 1).shape[0] if _is_recorded() else batch * heads
        out = out.reshape(maps, _left(blocks * queries), dim_v).index_select(1, at.places)
        out = out.reshape(batch, heads, _left(height_q * width_q), dim_v)
    return out.transpose(2, 3).reshape(batch, heads * dim_v, height_q, width_q)


class _Positions(NamedTuple):
    """What depends on sizes and options only. Pixels are counted row by row."""

    keys: torch.Tensor  # the pixel of each key of each window, in the map with its ring
    queries: torch.Tensor  # the pixel of each query of each block
    by_column: torch.Tensor  # all pixels of queries, column by column
    places: torch.Tensor  # of each pixel of queries, which query of which block it is
    rel_rows: torch.Tensor  # (row of queries, row of its window) -> row of the table, one after the other
    rel_cols: torch.Tensor
    outside_rows: torch.Tensor  # (rows of queries, 1, window), `OUTSIDE` for keys outside the map and its ring, else 0
    outside_cols: torch.Tensor


def _is_known(size: int) -> bool:
    """Whether a size is a number, and not a symbol of a graph that is being made."""
    if torch.jit.is_scripting():
        return False
    else:
        return isinstance(size, int) and not torch.compiler.is_dynamo_compiling()  # which shows symbols as integers


def _is_multiple(size: int, block_size: int) -> bool:
    """Whether it is known, without a condition on a size that may vary, that blocks cover the map exactly."""
    return _is_known(size) and size % block_size == 0


def _left(size: int) -> int:
    """A size that a reshape can work out: what it is for symbols, which take minutes to divide; traced, what is left.

    OpenVINO 2026.4 computes garbage where a traced model multiplies sizes for it.
    """
    return -1 if _is_recorded() else size


def _is_recorded() -> bool:
    return torch.jit.is_scripting() or torch.jit.is_tracing()


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In the dtype of another tensor; without an operator where it has that."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def _laid_out(table: torch.Tensor, index: torch.Tensor, window: int) -> torch.Tensor:
    """Rows of a table (2 * window - 1, dim) -> (queries, dim, window)"""
    return table.index_select(0, index).reshape(-1, window, table.shape[1]).transpose(1, 2)


def _spread(window: int, keys: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(2 * window, window * window): 1 where a row, then where a column of a window has the key; else 0."""
    if torch.jit.is_scripting():
        key, code = torch.arange(window * window, device=keys.device), torch.arange(window, device=keys.device)[:, None]
        row = key // window
        return torch.cat([row == code, key - row * window == code]).to(like.dtype)
    else:
        # one tensor for all layers, but where torch.jit.trace compares two recordings
        make = _known_spread.__wrapped__ if torch.jit.is_tracing() else _known_spread
        spread = make(window, like.dtype)
        return spread if like.device.type == "cpu" else spread.to(like.device)


@lru_cache(16)
def _known_spread(window: int, dtype: torch.dtype) -> torch.Tensor:
    key, code = np.arange(window * window), np.arange(window)[:, None]
    return _constant(np.concatenate([key // window == code, key % window == code]) * 1.0, dtype)


def _positions(
    height: int, width: int, height_q: int, width_q: int, options: Options, like: torch.Tensor
) -> _Positions:
    """Positions in a map of such a size, with queries of such a size: constants where they are known."""
    block_size, window, device = options.block_size, options.block_size + 2 * options.halo_size, like.device
    down, across = (height + block_size - 1) // block_size, (width + block_size - 1) // block_size
    if torch.jit.is_scripting():
        counts = [torch.arange(n, device=device) for n in _lengths(down, across, height_q, width_q, options)]
        counts.append(torch.arange(window, device=device))
        return _positions_of(counts, height, width, options)
    else:
        if _is_known(height) and _is_known(width):
            known = _known_positions(height, width, height_q, width_q, options, like.dtype)
            return known if device.type == "cpu" else _Positions(*[x.to(device) for x in known])
        offset = _constant(np.arange(window), like.dtype).to(device)
        counts = [torch.arange(n, device=device) for n in _lengths(down, across, height_q, width_q, options)]
        at = _positions_of([*counts, offset], height, width, options)
        # integers already, except for CoreML's converter of traced models, where // gives floats
        return _Positions(*[x if x.is_floating_point() else x.long() for x in at])


@lru_cache(64)  # one tensor for all layers of a kind: an exported model has it once
def _known_positions(
    height: int, width: int, height_q: int, width_q: int, options: Options, dtype: torch.dtype
) -> _Positions:
    down, across = -(-height // options.block_size), -(-width // options.block_size)
    window = options.block_size + 2 * options.halo_size
    lengths = [*_lengths(down, across, height_q, width_q, options), window]
    numbers: list[Any] = [np.arange(n) for n in lengths]  # arrays, which `_positions_of` takes for tensors
    return _Positions(*[_constant(array, dtype) for array in _positions_of(numbers, height, width, options)])


def _constant(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor that no recorder sees made: indices in 32 bits, others in this dtype."""
    with torch.inference_mode(False), _disable_current_modes():
        if array.dtype.kind != "f":
            return torch.from_numpy(array.astype(np.int32))
        if dtype != torch.bfloat16:
            return torch.from_numpy(array.astype(str(dtype).removeprefix("torch.")))
        # the values are small integers: the upper half of a float32
        return torch.from_numpy(array.astype(np.float32).view(np.int16)[..., 1::2].copy()).view(torch.bfloat16)


def _lengths(down: int, across: int, height_q: int, width_q: int, options: Options) -> list[int]:
    """How far `_positions_of` wants to count. Not blocks: torch.export makes it part of a graph that there is one."""
    window, block_q = options.block_size + 2 * options.halo_size, options.block_size // options.query_stride
    return [down * window, across * window, down * block_q, across * block_q, height_q, width_q]


def _positions_of(counts: list[torch.Tensor], height: int, width: int, options: Options) -> _Positions:
    """`_positions` from 0, 1, ... up to each of `_lengths`, and along a window.

    Tensors or NumPy's arrays: it takes the arithmetic that both have.
    """
    u, w, rows, cols, y, x, offset = counts
    block_q, ring = options.block_size // options.query_stride, 0 if options.mask_border else options.halo_size
    window = options.block_size + 2 * options.halo_size
    across = (width + options.block_size - 1) // options.block_size
    u = _pixels(u // window, u - u // window * window, height, ring, options) + ring
    w = _pixels(w // window, w - w // window * window, width, ring, options) + ring
    keys = u.reshape(-1, 1, window, 1) * (width + 2 * ring) + w.reshape(1, -1, 1, window)
    # the blocks' queries; beyond the map, the last
    rows = rows.clip(0, y.shape[0] - 1).reshape(-1, 1, block_q, 1)
    cols = cols.clip(0, x.shape[0] - 1).reshape(1, -1, 1, block_q)
    queries = rows * x.shape[0] + cols
    by_column = x[:, None] + y[None, :] * x.shape[0]
    # query y of block i is the (y - i * block_q)-th of it
    i, j = y // block_q, x // block_q
    place_rows = (i * (across * block_q) + y - i * block_q) * block_q
    place_cols = j * (block_q * block_q - block_q) + x
    places = place_rows[:, None] + place_cols[None, :]
    rel_rows, outside_rows = _relative(y, offset, height, ring, options)
    rel_cols, outside_cols = _relative(x, offset, width, ring, options)
    return _Positions(
        keys.reshape(-1),
        queries.reshape(-1),
        by_column.reshape(-1),
        places.reshape(-1),
        rel_rows.reshape(-1),
        rel_cols.reshape(-1),
        outside_rows,
        outside_cols,
    )


def _pixels(block: torch.Tensor, offset: torch.Tensor, size: int, ring: int, options: Options) -> torch.Tensor:
    """Rows (or columns) of the map that windows of these blocks have there; outside it and its ring, the nearest."""
    return (block * options.block_size - options.halo_size + offset).clip(-ring, size - 1 + ring)


def _relative(
    y: torch.Tensor, offset: torch.Tensor, size: int, ring: int, options: Options, far: float = OUTSIDE
) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows (or columns) y of queries: rows of the table (y, window), and what is subtracted (y, 1, window)."""
    block_q = options.block_size // options.query_stride
    i = y // block_q
    first = (i * options.block_size - options.halo_size)[:, None]
    nearest = _pixels(i[:, None], offset[None, :], size, ring, options)
    outside = abs(first + offset[None, :] - nearest).clip(0, 1) * far
    rel = nearest - first + (offset.shape[0] - 1) - (y - i * block_q)[:, None] * options.rel_step
    return rel, outside[:, None, :]

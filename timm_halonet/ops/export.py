"""Halo attention as exporters want it: few large matrix products, and nothing that an engine might not have.

The function is the reference's; `halo_attention_reference` stays its definition. What is different:

- *It works on maps as convolutions have them*, and makes rows of pixels, channels last, of each of them once: engines
  keep maps in that order themselves, or make it while they leave an order of their own.
- *Windows and blocks of queries are taken by an index of pixels*, all channels of a pixel at once, and put back by one.
  Outside the map it points to the nearest pixel, so nothing is padded up to whole blocks, nor for keys that are not
  seen. Heads are never put before pixels by a transposition of a map, which ONNX Runtime 1.32 is slower at with two
  threads than with one.
- *In maps of one block or two, windows have no keys outside the map*: where that is known, each has as many keys
  inside, and no others. At 256 px so it is in the last two stages of halonet_h0 to h2.
- *The mask is part of the relative logits*, which are small: a row and a column of keys each. Where a window leaves the
  map, the relative position is that of the nearest pixel, and `OUTSIDE` is subtracted. So each key outside has the
  logit of a key inside, less 40: a weight below 1e-17, whatever the size of the logits. There are no infinite or large
  constants, which ruin the scale of an int8 model, and no masks on the logits themselves.
- *Products, addition and softmax are one chain*, which OpenVINO makes one kernel of.
- *What depends on sizes only is a constant* where sizes are known.
- *Where PyTorch's newer ONNX exporter knows the sizes, and the model is on the CPU, the chain takes a group of windows
  at a time*, by ONNX's `Scan`: as many as `GROUP_BYTES` of logits hold. ONNX Runtime writes and reads the logits five
  times; so they do not leave the processor's cache.

Tensors have at most five dimensions. Batch, height and width may be symbols, and everything here can be scripted.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .. import environment
from .options import Options

OUTSIDE = 40  # logits that a key outside the map is below the nearest one inside
GROUP_BYTES = 2 << 20  # of a group's logits, float32: what a core has for itself, or two, of the processor's cache
LEAST_GROUPS = 3  # below that many of them all windows are taken at once


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
    block_q = options.block_size // options.query_stride
    images, height, width, height_q, width_q = kv.shape[0], kv.shape[2], kv.shape[3], q.shape[2], q.shape[3]
    dim = rel_height.shape[1]
    dim_v = kv.shape[1] // heads - dim
    for_onnx = _is_for_onnx()
    # engines keep maps with channels last, or make them so for nothing; OpenVINO copies twice where sizes are unknown
    channels_last = for_onnx or _is_known(height)
    if not channels_last:  # heads as if they were images
        q, kv = q.reshape(-1, dim, height_q, width_q), kv.reshape(-1, dim + dim_v, height, width)
        heads = 1
    batch = kv.shape[0]
    rows, cols = _axis(height, height_q, options), _axis(width, width_q, options)
    blocks, queries, keys = rows.blocks * cols.blocks, block_q * block_q, rows.window * cols.window
    # ONNX Runtime is slow at putting heads first, OpenVINO at taking short rows; and there heads may stay in the middle
    by_heads = for_onnx or heads == 1
    at = _positions(rows, cols, heads if by_heads else 1, options, q)

    # pixels and their heads as rows: (batch, pixels * heads, channels)
    if not options.mask_border and options.halo_size > 0:
        ring = options.halo_size
        kv = F.pad(kv, [ring, ring, ring, ring])
    k, v = _rows(kv, dim + dim_v, channels_last).split([dim, dim_v], dim=2)
    q = _rows(q, dim, channels_last)
    scaled = q * options.scale

    # relative logits: of each row of queries for the rows of its window, of each column for the columns
    q_rel = scaled if options.scale_rel else q
    by_row = q_rel.reshape(batch, height_q, _left(width_q * heads), dim)
    # by an index: ONNX Runtime merges transpositions into one that it is slow at
    by_column = _taken(q_rel, at.by_column, heads, by_heads).reshape(batch, width_q, _left(height_q * heads), dim)
    for_rows = torch.matmul(by_row, _laid_out(_like(rel_height, q), at.rel_rows))
    for_cols = torch.matmul(by_column, _laid_out(_like(rel_width, q), at.rel_cols))
    for_rows = for_rows.reshape(batch, height_q, width_q, heads, rows.window)
    for_cols = for_cols.reshape(batch, width_q, height_q, heads, cols.window)
    rel = torch.cat([for_rows, for_cols.transpose(1, 2)], 4)
    if not (rows.is_inside and cols.is_inside):
        rel = rel - _like(at.outside, q)

    group = 0 if torch.jit.is_scripting() else _group(batch, blocks * heads, queries * keys, q.device)
    rel = rel.reshape(batch, _left(height_q * width_q * heads), rows.window + cols.window)
    q = _parts(scaled, at.queries, queries, heads, by_heads, group)
    k = _parts(k, at.keys, keys, heads, by_heads, group)
    v = _parts(v, at.keys, keys, heads, by_heads, group)
    rel = _parts(rel, at.queries, queries, heads, by_heads, group)
    if torch.jit.is_scripting() or group == 0:
        out = _chain(q, k, v, rel, _like(at.spread, q))
    else:
        out = _chain_in_groups(q, k, v, rel, _like(at.spread, q))
    if by_heads:
        out = out.reshape(batch, _left(blocks * heads * queries), dim_v)
    else:
        out = out.transpose(1, 2).reshape(batch, _left(blocks * queries), heads * dim_v)
    out = out.index_select(1, at.places)
    if channels_last:
        return out.reshape(batch, height_q, width_q, heads * dim_v).permute(0, 3, 1, 2)
    return out.transpose(1, 2).reshape(images, -1, height_q, width_q)


def _rows(x: torch.Tensor, channels: int, channels_last: bool) -> torch.Tensor:
    """(batch, heads * channels, H, W) to (batch, H * W * heads, channels)"""
    x = x.permute(0, 2, 3, 1) if channels_last else x.flatten(2).transpose(1, 2)
    return x.reshape(x.shape[0], -1, channels)


def _taken(x: torch.Tensor, index: torch.Tensor, heads: int, by_heads: bool) -> torch.Tensor:
    """Rows of (batch, pixels * heads, channels) by an index.

    Returns:
        (batch, rows, channels), or (batch, 1, rows, channels): each head by itself. Else all heads of a pixel at once:
        (batch, pixels, heads * channels).
    """
    if not by_heads:
        return x.reshape(x.shape[0], -1, heads * x.shape[2]).index_select(1, index)
    if _is_for_onnx():
        return x.index_select(1, index)
    # OpenVINO 2026.4 fails where queries are taken from, and outputs put into, as many dimensions
    return x.unsqueeze(1).index_select(2, index)


def _parts(x: torch.Tensor, index: torch.Tensor, number: int, heads: int, by_heads: bool, group: int) -> torch.Tensor:
    """Of each block so many pixels: (batch, pixels * heads, channels) to (batch * blocks, heads, number, channels).

    By heads to (batch * blocks * heads, number, channels), or to (groups, windows of a group, number, channels).
    """
    taken = _taken(x, index, heads, by_heads)
    if by_heads:
        return taken.reshape([-1, group, number, x.shape[2]] if group else [-1, number, x.shape[2]])
    return taken.reshape(-1, number, heads, x.shape[2]).transpose(1, 2)


def _chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The chain that engines fuse: no reshape in it"""
    # to all keys of the window by a product: inductor's code for a sum of rows and columns takes twice as long.
    # It comes first: OpenVINO makes one kernel of the first product and all that follows
    logits = torch.matmul(rel.contiguous(), spread) + torch.matmul(q, k.transpose(-1, -2))
    if logits.dtype != torch.float64 and logits.dtype != torch.float32:
        logits = logits.float()
    return torch.matmul(_like(logits.softmax(dim=-1), v), v)


def _is_for_onnx() -> bool:
    """Whether one of PyTorch's ONNX exporters asks."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.onnx.is_in_onnx_export()


def _group(batch: int, windows: int, logits: int, device: torch.device) -> int:
    """How many windows, of all heads, shall be taken at a time; 0 for all at once.

    Args:
        windows: of one image.
        logits: of one window.
    """
    is_for_onnx = _is_for_onnx() and not torch.jit.is_tracing()
    if not (is_for_onnx and device.type == "cpu" and environment.onnx_scan_allowed() and _is_known(windows)):
        return 0
    most = max(GROUP_BYTES // (4 * logits), 1)
    if (batch * windows if _is_known(batch) else windows) < LEAST_GROUPS * most:
        return 0
    group = max(n for n in range(1, most + 1) if windows % n == 0)
    return group if 4 * group >= most else 0  # many small steps would cost more than they save


def _chain_in_groups(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """`_chain` on a group of windows at a time: (groups, windows of a group, number, channels) each."""
    try:
        from torch._higher_order_ops.scan import scan_op
    except ImportError:  # a prototype of PyTorch's, which may move
        return _chain(q, k, v, rel, spread)

    def step(spread: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
        return [spread.clone(), _chain(parts[0], parts[1], parts[2], parts[3], spread)]

    # handed on from step to step, and a copy: it fails with a constant, and wants something to hand on. The operator
    # itself, because the function around it compiles the step, which takes as long again
    return scan_op(step, [spread.clone()], [q, k, v, rel], additional_inputs=())[1]


class _Axis(NamedTuple):
    """Blocks and windows along the height or the width of a map."""

    size: int  # pixels
    queries: int
    blocks: int
    block_q: int  # queries of a block
    window: int  # keys that a block sees
    is_narrow: bool  # whether windows have those keys alone that are in the map, as many for each
    is_inside: bool  # whether it is known that no window leaves the map and its ring


def _axis(size: int, queries: int, options: Options) -> _Axis:
    """Where sizes are known and every window has as many keys inside the map, in one block or two, it has no others."""
    block_size, halo_size = options.block_size, options.halo_size
    blocks, block_q = (size + block_size - 1) // block_size, block_size // options.query_stride
    window = block_size + 2 * halo_size
    is_inside = _is_multiple(size, block_size) and (not options.mask_border or halo_size == 0)
    if torch.jit.is_scripting():
        return _Axis(size, queries, blocks, block_q, window, False, is_inside)
    else:
        seen = _keys_inside(size, options)
        if len(seen) == 1:
            return _Axis(size, queries, blocks, block_q, seen.pop(), True, True)
        return _Axis(size, queries, blocks, block_q, window, False, is_inside)


def _keys_inside(size: int, options: Options) -> set[int]:
    """How many rows (or columns) of the map windows have; empty where that is not known, or the map has a ring."""
    if not options.mask_border or not _is_known(size):
        return set()
    first = range(-options.halo_size, size - options.halo_size, options.block_size)
    return {min(x + options.block_size + 2 * options.halo_size, size) - max(x, 0) for x in first}


class _Positions(NamedTuple):
    """What depends on sizes and options only. Pixels are counted row by row."""

    # rows are pixels, or heads of pixels where heads are taken by themselves
    keys: torch.Tensor  # the row of each key of each window, in the map with its ring
    spread: torch.Tensor  # (rows + columns of a window, its keys), 1 where that row or column has the key, else 0
    queries: torch.Tensor  # the row of each query of each block
    by_column: torch.Tensor  # the rows of all queries, column by column
    places: torch.Tensor  # of each row of queries, which query of which block it is
    rel_rows: torch.Tensor  # (row of queries, row of its window) -> row of the table
    rel_cols: torch.Tensor
    # (rows, columns of queries, 1, rows + columns of a window): `OUTSIDE` where no key is, else 0
    outside: torch.Tensor


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


def _laid_out(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table (2 * window - 1, dim) by an index (queries, window): (queries, dim, window)"""
    return F.embedding(index, table).transpose(1, 2)


def _positions(rows: _Axis, cols: _Axis, heads: int, options: Options, like: torch.Tensor) -> _Positions:
    """Positions in a map with such axes: constants where sizes are known."""
    device = like.device
    if torch.jit.is_scripting():
        counts = [torch.arange(n, device=device) for n in _lengths(rows, cols, heads)]
        return _positions_of(counts, rows, cols, options)
    else:
        if _is_known(rows.size) and _is_known(cols.size):
            known = _known_positions(rows, cols, heads, options, like.dtype)
            return known if device.type == "cpu" else _Positions(*[x.to(device) for x in known])
        counts = [
            torch.arange(n, device=device) if not _is_known(n) else _constant(np.arange(n), like.dtype).to(device)
            for n in _lengths(rows, cols, heads)
        ]
        at = _positions_of(counts, rows, cols, options)
        # integers already, except for CoreML's converter of traced models, where // gives floats
        return _Positions(*[x if x.is_floating_point() else x.long() for x in at])


@lru_cache(64)  # one tensor for all layers of a kind: an exported model has it once
def _known_positions(rows: _Axis, cols: _Axis, heads: int, options: Options, dtype: torch.dtype) -> _Positions:
    # arrays, which `_positions_of` takes for tensors
    numbers: list[Any] = [np.arange(n) for n in _lengths(rows, cols, heads)]
    at = _positions_of(numbers, rows, cols, options)
    return _Positions(*[_constant(array, dtype) for array in at])


def _constant(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor that no recorder sees made: indices in 32 bits, others in this dtype."""
    with torch.inference_mode(False), _disable_current_modes():
        if array.dtype.kind != "f":
            return torch.from_numpy(array.astype(np.int32))
        if dtype != torch.bfloat16:
            return torch.from_numpy(array.astype(str(dtype).removeprefix("torch.")))
        # the values are small integers: the upper half of a float32
        return torch.from_numpy(array.astype(np.float32).view(np.int16)[..., 1::2].copy()).view(torch.bfloat16)


def _lengths(rows: _Axis, cols: _Axis, heads: int) -> list[int]:
    """How far `_positions_of` wants to count. Not blocks: torch.export makes it part of a graph that there is one."""
    lengths = [rows.blocks * rows.window, cols.blocks * cols.window, rows.blocks * rows.block_q]
    lengths += [cols.blocks * cols.block_q, rows.queries, cols.queries]
    lengths += [rows.window * cols.window, rows.window + cols.window, heads]
    return lengths


def _positions_of(counts: list[torch.Tensor], rows: _Axis, cols: _Axis, options: Options) -> _Positions:
    """`_positions` from 0, 1, ... up to each of `_lengths`.

    Tensors or NumPy's arrays: it takes the arithmetic that both have.
    """
    u, w, query_rows, query_cols, y, x, key, code, head = counts
    block_q, across, ring = rows.block_q, cols.blocks, _ring(options)
    u = _first_key(u // rows.window, rows, options) + _remainder(u, rows.window)
    w = _first_key(w // cols.window, cols, options) + _remainder(w, cols.window)
    u, w = _nearest(u, rows, options) + ring, _nearest(w, cols, options) + ring
    keys = u.reshape(-1, 1, rows.window, 1) * (cols.size + 2 * ring) + w.reshape(1, -1, 1, cols.window)
    of_row = abs(key // cols.window - code[:, None]).clip(0, 1)
    of_col = abs(_remainder(key, cols.window) + rows.window - code[:, None]).clip(0, 1)
    spread = (of_row + of_col) * -1.0 + 2.0  # converters do not know a number less a tensor
    # the blocks' queries; beyond the map, the last
    query_rows = query_rows.clip(0, y.shape[0] - 1).reshape(-1, 1, block_q, 1)
    query_cols = query_cols.clip(0, x.shape[0] - 1).reshape(1, -1, 1, block_q)
    queries = query_rows * x.shape[0] + query_cols
    by_column = x[:, None] + y[None, :] * x.shape[0]
    heads = head.shape[0]  # that are taken by themselves; 1 if all are taken at once
    # query y of block i is the (y - i * block_q)-th of it
    i, j = y // block_q, x // block_q
    block = (i * across)[:, None] + j[None, :]
    places = ((y - i * block_q) * block_q)[:, None] + (x - j * block_q)[None, :]
    places = block[:, :, None] * (heads * block_q * block_q) + head * (block_q * block_q) + places[:, :, None]
    # codes of rows, then of columns
    is_col = (code // rows.window).clip(0, 1)
    is_row = is_col * -1 + 1
    rel_rows, outside_rows = _relative(y, code * is_row, rows, options)
    rel_cols, outside_cols = _relative(x, (code - rows.window) * is_col, cols, options)
    outside = (is_row * outside_rows)[:, None, :] + (is_col * outside_cols)[None, :, :]
    return _Positions(
        _by_heads(keys.reshape(-1, rows.window * cols.window), head),
        spread,
        _by_heads(queries.reshape(-1, block_q * block_q), head),
        _by_heads(by_column.reshape(-1, 1), head),
        places.reshape(-1),
        rel_rows[:, : rows.window],
        rel_cols[:, rows.window :],
        outside[:, :, None] * 1.0,
    )


def _by_heads(pixels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Rows of pixels' heads: for pixels (parts, number) part by part, in it head by head, then pixel by pixel."""
    return (pixels[:, None] * head.shape[0] + head[None, :, None]).reshape(-1)


def _remainder(x: torch.Tensor, divisor: int) -> torch.Tensor:
    """Of numbers that are not negative; converters differ in what `%` is."""
    return x - x // divisor * divisor


def _first_key(block: torch.Tensor, axis: _Axis, options: Options) -> torch.Tensor:
    """The first row (or column) of these blocks' windows."""
    first = block * options.block_size - options.halo_size
    return first.clip(0, axis.size - axis.window) if axis.is_narrow else first


def _ring(options: Options) -> int:
    return 0 if options.mask_border else options.halo_size


def _nearest(key: torch.Tensor, axis: _Axis, options: Options) -> torch.Tensor:
    """The nearest row (or column) that the map with its ring has."""
    ring = _ring(options)
    return key.clip(-ring, axis.size - 1 + ring)


def _relative(
    y: torch.Tensor, offset: torch.Tensor, axis: _Axis, options: Options, far: int = OUTSIDE
) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows (or columns) y of queries and places in a window: rows of the table, and what is subtracted."""
    i = y // axis.block_q
    key = _first_key(i, axis, options)[:, None] + offset[None, :]
    nearest = _nearest(key, axis, options)
    outside = abs(key - nearest).clip(0, 1) * far  # a script knows no globals
    query = (i * options.block_size)[:, None] + (y - i * axis.block_q)[:, None] * options.rel_step
    # where key and query are one pixel, the middle of the table, whose window has the halo before the block
    rel = nearest - query + (options.block_size + 3 * options.halo_size - 1)
    return rel, outside

"""Which pixels the export form of halo attention takes, and where: what depends on sizes and options only."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .options import Options

OUTSIDE = 40  # logits that a key outside the map is below the nearest one inside


class Axis(NamedTuple):
    """Blocks and windows along the height or the width of a map."""

    size: int  # pixels
    queries: int
    blocks: int
    block_q: int  # queries of a block
    window: int  # keys that a block sees
    is_narrow: bool  # whether windows have those keys alone that are in the map, as many for each
    is_inside: bool  # whether it is known that no window leaves the map and its ring


def axis_of(size: int, queries: int, options: Options) -> Axis:
    """Where sizes are known and every window has as many keys inside the map, in one block or two, it has no others."""
    block_size, halo_size = options.block_size, options.halo_size
    blocks, block_q = (size + block_size - 1) // block_size, block_size // options.query_stride
    window = block_size + 2 * halo_size
    is_inside = _is_multiple(size, block_size) and (not options.mask_border or halo_size == 0)
    if torch.jit.is_scripting():
        return Axis(size, queries, blocks, block_q, window, False, is_inside)
    else:
        seen = _keys_inside(size, options)
        if len(seen) == 1:
            return Axis(size, queries, blocks, block_q, seen.pop(), True, True)
        return Axis(size, queries, blocks, block_q, window, False, is_inside)


def _keys_inside(size: int, options: Options) -> set[int]:
    """How many rows (or columns) of the map windows have; empty where that is not known, or the map has a ring."""
    if not options.mask_border or not is_known(size):
        return set()
    first = range(-options.halo_size, size - options.halo_size, options.block_size)
    return {min(x + options.block_size + 2 * options.halo_size, size) - max(x, 0) for x in first}


class Positions(NamedTuple):
    """What depends on sizes and options only. Pixels are counted row by row."""

    # rows are pixels, or heads of pixels where heads are taken by themselves
    keys: torch.Tensor  # the row of each key of each window, in the map with its ring
    values: torch.Tensor  # and of its values
    spread: torch.Tensor  # (2 * longer side of a window, its keys): 1 where that row, or column, has the key, else 0
    queries: torch.Tensor  # the row of each query of each block
    rel: torch.Tensor  # what each query of each block takes of the relative logits
    lines: torch.Tensor  # the rows of all queries, column by column; in a square map row by row before that
    places: torch.Tensor  # of each row of queries, which query of which block it is
    # in a square map those for rows hold both, one after the other
    rel_rows: torch.Tensor  # (row of queries, row of its window) -> row of the table
    rel_cols: torch.Tensor
    outside_rows: torch.Tensor  # (row of queries, 1, row of its window): `OUTSIDE` where no key is, else 0
    outside_cols: torch.Tensor


def is_known(size: int) -> bool:
    """Whether a size is a number, and not a symbol of a graph that is being made."""
    if torch.jit.is_scripting():
        return False
    else:
        return isinstance(size, int) and not torch.compiler.is_dynamo_compiling()  # which shows symbols as integers


def _is_multiple(size: int, block_size: int) -> bool:
    """Whether it is known, without a condition on a size that may vary, that blocks cover the map exactly."""
    return is_known(size) and size % block_size == 0


def is_square(rows: Axis, cols: Axis) -> bool:
    """Whether it is known that height and width are the same."""
    if torch.jit.is_scripting():
        return False
    else:
        return is_known(rows.size) and rows == cols


def positions(
    rows: Axis, cols: Axis, heads: int, in_pairs: bool, group: int, options: Options, like: torch.Tensor
) -> Positions:
    """Positions in a map with such axes: constants where sizes are known.

    Args:
        group: how many windows of one square image are taken at a time, 0 for all, which shapes the indices; -1: flat.
    """
    device = like.device
    if torch.jit.is_scripting():
        counts = [torch.arange(n, device=device) for n in _lengths(rows, cols, heads)]
        return _positions_of(counts, rows, cols, in_pairs, options)
    else:
        if is_known(rows.size) and is_known(cols.size):
            known = _known_positions(rows, cols, heads, in_pairs, group, options, like.dtype)
            return known if device.type == "cpu" else Positions(*[x.to(device) for x in known])
        counts = [
            torch.arange(n, device=device) if not is_known(n) else _constant(np.arange(n), like.dtype).to(device)
            for n in _lengths(rows, cols, heads)
        ]
        at = _positions_of(counts, rows, cols, in_pairs, options)
        # integers already, except for CoreML's converter of traced models, where // gives floats
        return Positions(*[x if x.is_floating_point() else x.long() for x in at])


@lru_cache(64)  # one tensor for all layers of a kind: an exported model has it once
def _known_positions(
    rows: Axis, cols: Axis, heads: int, in_pairs: bool, group: int, options: Options, dtype: torch.dtype
) -> Positions:
    # arrays, which `_positions_of` takes for tensors
    numbers: list[Any] = [np.arange(n) for n in _lengths(rows, cols, heads)]
    at = _positions_of(numbers, rows, cols, in_pairs, options)
    if is_square(rows, cols):
        at = _of_a_square(at, rows, heads, options)
        if group >= 0:
            parts = [-1, group] if group else [-1]
            at = at._replace(
                keys=at.keys.reshape([*parts, rows.window**2]),
                values=at.values.reshape([*parts, rows.window**2]),
                queries=at.queries.reshape([*parts, rows.block_q**2]),
                lines=at.lines.reshape(2 * rows.queries, -1),
            )
    return Positions(*[_constant(array, dtype) for array in at])


def _of_a_square(at: Any, axis: Axis, heads: int, options: Options) -> Any:
    """The relative logits of rows and columns in one product: its lines are all rows, then all columns. In arrays."""
    size = axis.queries
    pixel, head = at.queries // heads, at.queries % heads
    by_row = at.queries
    by_column = (size * size + pixel % size * size + pixel // size) * heads + head
    table = 2 * (options.block_size + 2 * options.halo_size) - 1  # rows of one of the tables
    return at._replace(
        lines=np.concatenate([np.arange(size * size * heads), at.lines]),
        rel=np.stack([by_row, by_column], -1).reshape(-1),
        rel_rows=np.concatenate([at.rel_rows, at.rel_cols + table]),
        outside_rows=np.concatenate([at.outside_rows, at.outside_cols]),
    )


def _constant(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor that no recorder sees made: indices in 32 bits, others in this dtype."""
    with torch.inference_mode(False), _disable_current_modes():
        if array.dtype.kind != "f":
            return torch.from_numpy(array.astype(np.int32))
        if dtype != torch.bfloat16:
            return torch.from_numpy(array.astype(str(dtype).removeprefix("torch.")))
        # the values are small integers: the upper half of a float32
        return torch.from_numpy(array.astype(np.float32).view(np.int16)[..., 1::2].copy()).view(torch.bfloat16)


def _lengths(rows: Axis, cols: Axis, heads: int) -> list[int]:
    """How far `_positions_of` wants to count. Not blocks: torch.export makes it part of a graph that there is one."""
    lengths = [rows.blocks * rows.window, cols.blocks * cols.window, rows.blocks * rows.block_q]
    lengths += [cols.blocks * cols.block_q, rows.queries, cols.queries]
    window = max(rows.window, cols.window)
    lengths += [rows.window * cols.window, window, 2 * window, heads]
    return lengths


def _positions_of(counts: list[torch.Tensor], rows: Axis, cols: Axis, in_pairs: bool, options: Options) -> Positions:
    """`positions` from 0, 1, ... up to each of `_lengths`.

    Tensors or NumPy's arrays: it takes the arithmetic that both have.
    """
    u, w, query_rows, query_cols, y, x, key, place, code, head = counts
    block_q, across, ring = rows.block_q, cols.blocks, _ring(options)
    u = _first_key(u // rows.window, rows, options) + _remainder(u, rows.window)
    w = _first_key(w // cols.window, cols, options) + _remainder(w, cols.window)
    u, w = _nearest(u, rows, options) + ring, _nearest(w, cols, options) + ring
    keys = u.reshape(-1, 1, rows.window, 1) * (cols.size + 2 * ring) + w.reshape(1, -1, 1, cols.window)
    keys = _by_heads(keys.reshape(-1, rows.window * cols.window), head)
    of_row = abs(key // cols.window - code[:, None]).clip(0, 1)
    of_col = abs(_remainder(key, cols.window) + place.shape[0] - code[:, None]).clip(0, 1)
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
    rel_rows, outside_rows = _relative(y, place.clip(0, rows.window - 1), rows, options)
    rel_cols, outside_cols = _relative(x, place.clip(0, cols.window - 1), cols, options)
    queries = _by_heads(queries.reshape(-1, block_q * block_q), head)
    return Positions(
        keys * 2 if in_pairs else keys,
        keys * 2 + 1 if in_pairs else keys,
        spread,
        queries,
        queries,
        _by_heads(by_column.reshape(-1, 1), head),
        places.reshape(-1),
        rel_rows,
        rel_cols,
        outside_rows[:, None] * 1.0,
        outside_cols[:, None] * 1.0,
    )


def _by_heads(pixels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Rows of pixels' heads: for pixels (parts, number) part by part, in it head by head, then pixel by pixel."""
    return (pixels[:, None] * head.shape[0] + head[None, :, None]).reshape(-1)


def _remainder(x: torch.Tensor, divisor: int) -> torch.Tensor:
    """Of numbers that are not negative; converters differ in what `%` is."""
    return x - x // divisor * divisor


def _first_key(block: torch.Tensor, axis: Axis, options: Options) -> torch.Tensor:
    """The first row (or column) of these blocks' windows."""
    first = block * options.block_size - options.halo_size
    return first.clip(0, axis.size - axis.window) if axis.is_narrow else first


def _ring(options: Options) -> int:
    return 0 if options.mask_border else options.halo_size


def _nearest(key: torch.Tensor, axis: Axis, options: Options) -> torch.Tensor:
    """The nearest row (or column) that the map with its ring has."""
    ring = _ring(options)
    return key.clip(-ring, axis.size - 1 + ring)


def _relative(
    y: torch.Tensor, offset: torch.Tensor, axis: Axis, options: Options, far: int = OUTSIDE
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

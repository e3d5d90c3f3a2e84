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
  map, the relative position is that of the nearest pixel, and 40 is subtracted. So each key outside has the
  logit of a key inside, less 40: a weight below 1e-17, whatever the size of the logits. There are no infinite or large
  constants, which ruin the scale of an int8 model, and no masks on the logits themselves.
- *Products, addition and softmax are one chain*, which OpenVINO makes one kernel of.
- *What depends on sizes only is a constant* where sizes are known. In a square map the relative logits of rows and of
  columns are one product then.
- *Where PyTorch's newer ONNX exporter knows the sizes, and the model is on the CPU, the chain takes a group of windows
  at a time*, by ONNX's `Scan`: as many as `GROUP_BYTES` of logits hold. ONNX Runtime writes and reads the logits five
  times; so they do not leave the processor's cache.

Tensors have at most five dimensions. Batch, height and width may be symbols, and everything here can be scripted.
"""

import torch
import torch.nn.functional as F

from .. import environment
from .export_positions import Axis, Positions, axis_of, is_known, is_square, positions
from .options import Options

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
    channels_last = for_onnx or is_known(height)
    if not channels_last:  # heads as if they were images
        q, kv = q.reshape(-1, dim, height_q, width_q), kv.reshape(-1, dim + dim_v, height, width)
        heads = 1
    batch = kv.shape[0]
    rows, cols = axis_of(height, height_q, options), axis_of(width, width_q, options)
    blocks, queries, keys = rows.blocks * cols.blocks, block_q * block_q, rows.window * cols.window
    # ONNX Runtime is slow at putting heads first, OpenVINO at taking short rows; and there heads may stay in the middle
    by_heads = for_onnx or heads == 1
    # of each head a row of keys and a row of values
    in_pairs = by_heads and is_known(dim) and is_known(dim_v) and dim == dim_v
    group = 0 if torch.jit.is_scripting() else _group(batch, blocks * heads, queries * keys, q.device)
    # one square image for ONNX: an index takes rows in the shape that they are wanted in, and so there are fewer nodes
    alone = for_onnx and is_known(batch) and batch == 1 and is_square(rows, cols)
    at = positions(rows, cols, heads if by_heads else 1, in_pairs, group if alone else -1, options, q)

    # pixels and their heads as rows: (batch, pixels * heads, channels)
    if not options.mask_border and options.halo_size > 0:
        ring = options.halo_size
        kv = F.pad(kv, [ring, ring, ring, ring])
    if in_pairs:
        k = v = _rows(kv, dim, channels_last, alone)
    else:
        k, v = _rows(kv, dim + dim_v, channels_last, alone).split([dim, dim_v], dim=-1)
    q = _rows(q, dim, channels_last, alone)
    scaled = q * options.scale
    rel = _relative_logits(scaled if options.scale_rel else q, rel_height, rel_width, rows, cols, at, heads, by_heads)

    q = _parts(scaled, at.queries, queries, 1, heads, by_heads, group)
    k = _parts(k, at.keys, keys, 1, heads, by_heads, group)
    v = _parts(v, at.values, keys, 1, heads, by_heads, group)
    rel = _parts(rel, at.rel, queries, 2 if is_square(rows, cols) else 1, heads, by_heads, group)
    if torch.jit.is_scripting() or group == 0:
        out = _chain(q, k, v, rel, _like(at.spread, q))
    else:
        out = _chain_in_groups(q, k, v, rel, _like(at.spread, q))
    if alone:
        out = F.embedding(at.places, out.reshape(-1, dim_v))
    elif by_heads:
        out = out.reshape(batch, _left(blocks * heads * queries), dim_v).index_select(1, at.places)
    else:
        out = out.transpose(1, 2).reshape(batch, _left(blocks * queries), heads * dim_v).index_select(1, at.places)
    if channels_last:
        return out.reshape(batch, height_q, width_q, heads * dim_v).permute(0, 3, 1, 2)
    return out.transpose(1, 2).reshape(images, -1, height_q, width_q)


def _rows(x: torch.Tensor, channels: int, channels_last: bool, alone: bool) -> torch.Tensor:
    """(batch, heads * channels, H, W) to (batch, H * W * heads, channels), or of one image (H * W * heads, channels)"""
    x = x.permute(0, 2, 3, 1) if channels_last else x.flatten(2).transpose(1, 2)
    return x.reshape(-1, channels) if alone else x.reshape(x.shape[0], -1, channels)


def _relative_logits(
    q: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    rows: Axis,
    cols: Axis,
    at: Positions,
    heads: int,
    by_heads: bool,
) -> torch.Tensor:
    """Of each row of queries for the rows of its window, of each column for the columns.

    Args:
        q: (batch, pixels * heads, dim), or of one image (pixels * heads, dim).

    Returns:
        (batch, pixels * heads, 2 * window), or what `Positions.rel` takes that from: where the map is known to be a
        square, for all rows, then for all columns, (batch, 2 * pixels * heads, window), or of one image without batch.
    """
    batch, dim = q.shape[0], q.shape[-1]
    height, width, is_inside = rows.queries, cols.queries, rows.is_inside and cols.is_inside
    # by an index: ONNX Runtime merges transpositions into one that it is slow at
    lines = _taken(q, at.lines, heads, by_heads)
    if is_square(rows, cols):  # one product
        lines = lines if at.lines.ndim == 2 else lines.reshape(batch, 2 * height, width * heads, dim)
        rel = torch.matmul(lines, _laid_out(torch.cat([_like(rel_height, q), _like(rel_width, q)]), at.rel_rows))
        rel = rel if is_inside else rel - _like(at.outside_rows, q)
        return rel.reshape([-1, rel.shape[2]] if at.lines.ndim == 2 else [batch, -1, rel.shape[3]])
    by_row = q.reshape(batch, height, _left(width * heads), dim)
    by_column = lines.reshape(batch, width, _left(height * heads), dim)
    for_rows = torch.matmul(by_row, _laid_out(_like(rel_height, q), at.rel_rows))
    for_cols = torch.matmul(by_column, _laid_out(_like(rel_width, q), at.rel_cols))
    if not is_inside:
        for_rows, for_cols = for_rows - _like(at.outside_rows, q), for_cols - _like(at.outside_cols, q)
    window = for_rows.shape[3]
    for_rows = for_rows.reshape(batch, height, width, heads, window)
    for_cols = for_cols.reshape(batch, width, height, heads, window)
    rel = torch.cat([for_rows, for_cols.transpose(1, 2)], 4)
    return rel.reshape(batch, _left(height * width * heads), 2 * window)


def _taken(x: torch.Tensor, index: torch.Tensor, heads: int, by_heads: bool) -> torch.Tensor:
    """Rows of (batch, pixels * heads, channels) by an index.

    Returns:
        (batch, rows, channels), or (batch, 1, rows, channels): each head by itself. Else all heads of a pixel at once:
        (batch, pixels, heads * channels). Of one image (pixels * heads, channels): in the index's shape.
    """
    if x.ndim == 2:
        return F.embedding(index, x)
    if not by_heads:
        return x.reshape(x.shape[0], -1, heads * x.shape[2]).index_select(1, index)
    if _is_for_onnx():
        return x.index_select(1, index)
    # OpenVINO 2026.4 fails where queries are taken from, and outputs put into, as many dimensions
    return x.unsqueeze(1).index_select(2, index)


def _parts(
    x: torch.Tensor, index: torch.Tensor, number: int, pieces: int, heads: int, by_heads: bool, group: int
) -> torch.Tensor:
    """Of each block so many pixels: (batch, pixels * heads, channels) to (batch * blocks, heads, number, channels).

    By heads to (batch * blocks * heads, number, channels), or to (groups, windows of a group, number, channels). The
    channels of a pixel may be in so many pieces, which come one after the other in the index. With an index of such a
    shape this is what it takes.
    """
    taken, channels = _taken(x, index, heads, by_heads), x.shape[-1]
    if index.ndim > 1:
        return taken
    if by_heads:
        channels = pieces * channels
        return taken.reshape([-1, group, number, channels] if group else [-1, number, channels])
    if pieces == 1:
        return taken.reshape(-1, number, heads, channels).transpose(1, 2)
    return taken.reshape(-1, number, pieces, heads, channels).permute(0, 3, 1, 2, 4).flatten(3)


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
    if not (is_for_onnx and device.type == "cpu" and environment.onnx_scan_allowed() and is_known(windows)):
        return 0
    most = max(GROUP_BYTES // (4 * logits), 1)
    if (batch * windows if is_known(batch) else windows) < LEAST_GROUPS * most:
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

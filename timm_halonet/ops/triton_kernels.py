"""The Triton kernels of halo attention. Imported only where they run; the launchers and the layout are in triton.py.

A program works on one *tile*: M queries of one block of one (image, head); a block of more than M queries is cut into
parts. Its keys are the block's window, cut to the image (or to the ring of zeros around it). They are taken R rows at a
time, each row padded to C columns, a power of two: so a key's number gives its row and column by shifts.

The relative logits of a tile are two small products of the queries with the tables, moved into place once (table row
t = u - y + window - 1) by a `tl.gather` each. Their sum is what the product of queries and keys is added to, in
float32. Masks ride in it as -inf, and are selected, never multiplied: a NaN in a row of the table that only masked keys
would use reaches nobody.

The forward saves two numbers a query. In float32: its largest logit, and 1 over the sum of its weights. In half
precision: the base 2 logsumexp, which needs one instruction less a logit, and the factor that makes weights computed
from it sum to 1 again. That is 1 but for logits so large that the logsumexp has few digits behind the point.

The backward is one kernel too: it computes the weights again, keeps the gradient of its queries in registers, and
writes the gradients of its keys and values as a dense window, which `fold_kernel` then adds up for every pixel in a
fixed order, as `table_kernel` does for the tables' gradients: no atomics, and equal inputs give equal bits.
"""

import triton
import triton.language as tl

from .triton_backward_kernels import backward_kernel, fold_kernel, table_kernel
from .triton_tiles import (
    LOG2_E,
    bias_of,
    both_tables,
    clipped_window,
    jit,
    load_keys,
    load_queries,
    logits_of,
    lower,
    moved_logits,
    piece_of,
    product_of,
    span,
    store_rows,
    tile_queries,
    unit_of,
    weights_of,
)

__all__ = ["backward_kernel", "fold_kernel", "forward_kernel", "table_kernel"]


@triton.jit
def _attend(s, v_tile, top, total, acc, FIRST: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: the largest logit so far, the sum of weights, and that of weighted values."""
    higher = tl.max(s, 1) if FIRST else tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # no weight yet, rather than inf - inf
    scaled = base * unit_of(base, dtype)
    p = weights_of(s, base, scaled, dtype, PRECISION)
    if FIRST:
        return higher, tl.sum(p, 1), product_of(lower(p, v_tile.dtype, PRECISION), v_tile, PRECISION)
    else:
        ratio = tl.exp2((top - base) * LOG2_E if dtype == tl.float32 else top * unit_of(top, dtype) - scaled)
        acc = product_of(lower(p, v_tile.dtype, PRECISION), v_tile, PRECISION, acc=acc * ratio[:, None])
        return higher, total * ratio + tl.sum(p, 1), acc


@jit
def forward_kernel(
    q, k, v, rel_h, rel_w, out, kept, saved,
    first_image, height, width, height_q, width_q, heads, blocks_w, scale,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr,
    SCALE_REL: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, HALVE: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """KEEP: the output is written a second time, for the backward; the first is the caller's, who may change it."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    head = tl.program_id(0) % heads
    j = tl.program_id(0) // heads
    part = 0
    if PARTS > 1:
        part = j % PARTS
        j = j // PARTS
    i = tl.program_id(1)
    image = (tl.program_id(2) + first_image).to(tl.int64)
    first_y, keys_y = clipped_window(i, height, BLOCK, HALO, RING)
    first_x, keys_x = clipped_window(j, width, BLOCK, HALO, RING)
    y, x, m_ok = tile_queries(i, j, part, height_q, width_q, SIDE, ACROSS, M, WIDE)

    wide_i, wide_j = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
    q += (image * q_image + wide_i * q_row + wide_j * q_col + head.to(tl.int64) * q_head) * ALIGN
    q_tile, q_rel = load_queries(q, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
    tables = lower(both_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), q_tile.dtype, PRECISION)
    product = product_of(q_rel, tl.trans(tables), PRECISION)
    r_h = moved_logits(piece_of(product, 0, M, 2, T), y * STEP, first_y - i * BLOCK + HALO, keys_y, WINDOW, STEPS * R)
    r_w = moved_logits(piece_of(product, 1, M, 2, T), x * STEP, first_x - j * BLOCK + HALO, keys_x, WINDOW, C)

    wide_y, wide_x = first_y.to(tl.int64), first_x.to(tl.int64)
    k += (image * k_image + wide_y * k_row + wide_x * k_col + head.to(tl.int64) * k_head) * ALIGN
    v += (image * v_image + wide_y * v_row + wide_x * v_col + head.to(tl.int64) * v_head) * ALIGN
    dtype: tl.constexpr = q.dtype.element_ty
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    n = span(0, R * C, WIDE)
    if UNROLL:
        for step in tl.static_range(STEPS):
            k_tile, v_tile, _ = load_keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y,
                                                keys_x, height, width, RING, D, D_V, BLOCK_D, BLOCK_V, R, C,
                                                ALIGN)  # fmt: skip
            s = logits_of(q_tile, k_tile, bias_of(r_h, r_w, step, M, STEPS, R, C, HALVE), PRECISION)
            top, total, acc = _attend(s, v_tile, top, total, acc, step == 0, dtype, PRECISION)
    else:
        some = i * SIDE + part * M // ACROSS < height_q  # of the last row of blocks, whole parts may be empty
        for step in range(tl.where(some, tl.cdiv(keys_y, R), 0)):
            k_tile, v_tile, _ = load_keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y,
                                                keys_x, height, width, RING, D, D_V, BLOCK_D, BLOCK_V, R, C,
                                                ALIGN)  # fmt: skip
            s = logits_of(q_tile, k_tile, bias_of(r_h, r_w, step, M, STEPS, R, C, HALVE), PRECISION)
            top, total, acc = _attend(s, v_tile, top, total, acc, False, dtype, PRECISION)

    block = ((image * height_q + wide_i) * width_q + wide_j) * heads + head
    pixel = (y * width_q + x) * heads
    share = 1.0 / total
    if dtype == tl.float32:
        first, second = top, share
    else:
        scaled = top * unit_of(top, dtype)
        first = scaled + tl.log2(total)
        second = tl.exp2(first - scaled) * share
        second = tl.where(tl.abs(second - 1.0) < 2.0**-12, 1.0, second)  # below half a digit of what it multiplies
    tl.store(saved + block * 2 + pixel * 2, first, mask=m_ok)
    tl.store(saved + block * 2 + pixel * 2 + 1, second, mask=m_ok)
    rows = lower(acc * share[:, None], dtype, PRECISION)
    store_rows(out + block * D_V, pixel * D_V, rows, m_ok, D_V, BLOCK_V, PRECISION)
    if KEEP:
        store_rows(kept + block * D_V, pixel * D_V, rows, m_ok, D_V, BLOCK_V, PRECISION)

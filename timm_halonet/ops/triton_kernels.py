"""The Triton kernels of halo attention. Imported only where they run; the launchers and the layout are in triton.py.

A program works on one *tile*: M queries of one block of one (image, head); a block of more than M queries is cut into
parts. Its keys are the block's window, cut to the image (or to the ring of zeros around it), numbered row by row and
taken N at a time, so that a small map costs what its pixels cost, not what a full window would.

Logits are kept in units of log 2, since the hardware's exponential is exp2. The relative logits of a tile are two small
products of the queries with the tables, moved into place (table row t = u - y + window - 1) by one `tl.gather` of an
(M, window) tile each; they reach the logits of every key as a product with a one-hot matrix, because tensor cores have
time to spare here and a gather of all the logits would cost as much as their exponentials.

The backward is one kernel too: it computes the weights again from the logsumexp, keeps the gradient of its queries and
of the tables in registers, and writes the gradients of its keys and values as a dense window, which `fold_kernel` then
adds up for every pixel in a fixed order. So there are no atomics, and equal inputs give equal bits.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, heads, parts, blocks_h, blocks_w):
    """(image, block row, block column, part, head) of a tile; heads innermost, they share cache lines."""
    head = tile % heads
    part = tile // heads % parts
    j = tile // (heads * parts) % blocks_w
    i = tile // (heads * parts * blocks_w) % blocks_h
    image = tile // (heads * parts * blocks_w * blocks_h)
    return image.to(tl.int64), i, j, part, head


@triton.jit
def _window(i, length, BLOCK: tl.constexpr, HALO: tl.constexpr, RING: tl.constexpr):
    """First key of block i along one dimension, and number of keys."""
    first = tl.maximum(i * BLOCK - HALO, -RING)
    return first, tl.minimum(i * BLOCK + BLOCK + HALO, length + RING) - first


@triton.jit
def _rows(i, length, SIDE: tl.constexpr):
    """Queries of block i along one dimension."""
    return tl.minimum(length - i * SIDE, SIDE)


@triton.jit
def _queries(i, j, part, height_q, width_q, SIDE: tl.constexpr, M: tl.constexpr):
    """Of a tile: its block's number of queries, which of its M there are, their rows and columns in the block."""
    across = _rows(j, width_q, SIDE)
    queries = _rows(i, height_q, SIDE) * across
    m = part * M + tl.arange(0, M)
    ok = m < queries
    return queries, ok, tl.where(ok, m // across, 0), tl.where(ok, m % across, 0)


@triton.jit
def _load(base, offsets, ok, d, D: tl.constexpr):
    """A tile of rows of D numbers, in d columns; 0 where not ok."""
    return tl.load(base + offsets[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, acc=None):
    if PRECISION == "interpreted":  # Triton's interpreter has no products of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _relative(q, table, t, pos, factor, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
              M: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Relative logits (M, U) of queries at positions `pos` for the rows (or columns) of the window."""
    rows = _load(table, t * D, t < 2 * WINDOW - 1, tl.arange(0, BLOCK_D), D)
    product = _dot(q, tl.trans(rows), PRECISION) * factor
    u = tl.minimum(tl.arange(0, U), WINDOW - 1)
    index = u[None, :] - pos[:, None] + (WINDOW - 1)
    return tl.gather(product, index, 1).to(q.dtype)


@triton.jit
def _one_hot(index, U: tl.constexpr, dtype: tl.constexpr):
    """(U, N): 1 where the row is the key's."""
    return tl.where(tl.arange(0, U)[:, None] == index[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def forward_kernel(
    q, k, v, rel_h, rel_w, out, lse,
    height, width, height_q, width_q, heads, parts, blocks_h, blocks_w, scale_log2, rel_log2,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, RING: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, U: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    image, i, j, part, head = _tile(tl.program_id(0), heads, parts, blocks_h, blocks_w)
    first_y, keys_y = _window(i, height, BLOCK, HALO, RING)
    first_x, keys_x = _window(j, width, BLOCK, HALO, RING)
    queries, m_ok, y, x = _queries(i, j, part, height_q, width_q, SIDE, M)

    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, T)
    q_pixel = (i * SIDE + y) * q_row + (j * SIDE + x) * q_col
    q_tile = _load(q + image * q_image + head * q_head, q_pixel, m_ok, d, D)
    r_h = _relative(q_tile, rel_h, t, y * STEP, rel_log2, D, WINDOW, BLOCK_D, M, U, PRECISION)
    r_w = _relative(q_tile, rel_w, t, x * STEP, rel_log2, D, WINDOW, BLOCK_D, M, U, PRECISION)

    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    keys = tl.where(part * M < queries, keys_y * keys_x, 0)
    for start in range(0, keys, N):
        n = start + tl.arange(0, N)
        u, w = first_y + n // keys_x, first_x + n % keys_x
        inside = (n < keys) & (u >= 0) & (u < height) & (w >= 0) & (w < width)
        k_tile = _load(k, u * k_row + w * k_col, inside, d, D)
        s = _dot(q_tile, tl.trans(k_tile), PRECISION) * scale_log2
        s = _dot(r_h, _one_hot(u - (i * BLOCK - HALO), U, q_tile.dtype), PRECISION, acc=s)
        s = _dot(r_w, _one_hot(w - (j * BLOCK - HALO), U, q_tile.dtype), PRECISION, acc=s)
        s = tl.where((n < keys)[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        ratio = tl.exp2(top - higher)
        total = total * ratio + tl.sum(p, 1)
        v_tile = _load(v, u * v_row + w * v_col, inside, e, D_V)
        acc = _dot(p.to(v_tile.dtype), v_tile, PRECISION, acc=acc * ratio[:, None])
        top = higher

    pixel = ((image * height_q + i * SIDE + y) * width_q + j * SIDE + x) * heads + head
    tl.store(lse + pixel, top + tl.log2(total), mask=m_ok)
    acc = acc / total[:, None]
    tl.store(
        out + pixel[:, None] * D_V + e[None, :],
        acc.to(out.dtype.element_ty),
        mask=m_ok[:, None] & (e < D_V)[None, :],
    )


@triton.jit
def _table_gradient(dr, q, table, t, pos, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """From the gradient (M, U) of relative logits: that of the table (T, d), and the table's part in that of q."""
    u = t[None, :] + pos[:, None] - (WINDOW - 1)
    u_ok = (u >= 0) & (u < WINDOW)
    moved = tl.gather(dr, tl.where(u_ok, u, 0), 1)
    moved = tl.where(u_ok, moved, 0.0).to(q.dtype)
    rows = _load(table, t * D, t < 2 * WINDOW - 1, tl.arange(0, BLOCK_D), D)  # again: registers are short in the loop
    return _dot(tl.trans(moved), q, PRECISION), _dot(moved, rows, PRECISION)


@triton.jit
def backward_kernel(
    q, k, v, rel_h, rel_w, out, lse, grad, dq, window_k, window_v, partial,
    tiles, height, width, height_q, width_q, heads, parts, blocks_h, blocks_w, scale, scale_log2, rel_scale, rel_log2,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, RING: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, U: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every program takes tiles at a fixed distance and keeps its share of the tables' gradients in registers."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, T)
    d_rel_h = tl.zeros([T, BLOCK_D], tl.float32)
    d_rel_w = tl.zeros([T, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, i, j, part, head = _tile(tile, heads, parts, blocks_h, blocks_w)
        first_y, keys_y = _window(i, height, BLOCK, HALO, RING)
        first_x, keys_x = _window(j, width, BLOCK, HALO, RING)
        queries, m_ok, y, x = _queries(i, j, part, height_q, width_q, SIDE, M)

        q_pixel = (i * SIDE + y) * q_row + (j * SIDE + x) * q_col
        q_tile = _load(q + image * q_image + head * q_head, q_pixel, m_ok, d, D)
        r_h = _relative(q_tile, rel_h, t, y * STEP, rel_log2, D, WINDOW, BLOCK_D, M, U, PRECISION)
        r_w = _relative(q_tile, rel_w, t, x * STEP, rel_log2, D, WINDOW, BLOCK_D, M, U, PRECISION)
        pixel = ((image * height_q + i * SIDE + y) * width_q + j * SIDE + x) * heads + head
        do = _load(grad, pixel * D_V, m_ok, e, D_V)
        o = _load(out, pixel * D_V, m_ok, e, D_V)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        log_sum = tl.load(lse + pixel, mask=m_ok, other=0.0)

        k_base = k + image * k_image + head * k_head
        v_base = v + image * v_image + head * v_head
        window_base = tl.full([], WINDOW * WINDOW, tl.int64) * tile
        d_q = tl.zeros([M, BLOCK_D], tl.float32)
        dr_h = tl.zeros([M, U], tl.float32)
        dr_w = tl.zeros([M, U], tl.float32)
        keys = tl.where(part * M < queries, keys_y * keys_x, 0)
        for start in range(0, keys, N):
            n = start + tl.arange(0, N)
            u, w = first_y + n // keys_x, first_x + n % keys_x
            inside = (n < keys) & (u >= 0) & (u < height) & (w >= 0) & (w < width)
            in_u, in_w = u - (i * BLOCK - HALO), w - (j * BLOCK - HALO)  # in the window
            k_tile = _load(k_base, u * k_row + w * k_col, inside, d, D)
            v_tile = _load(v_base, u * v_row + w * v_col, inside, e, D_V)
            one_h, one_w = _one_hot(in_u, U, q_tile.dtype), _one_hot(in_w, U, q_tile.dtype)
            s = _dot(q_tile, tl.trans(k_tile), PRECISION) * scale_log2
            s = _dot(r_h, one_h, PRECISION, acc=s)
            s = _dot(r_w, one_w, PRECISION, acc=s)
            # a query that is none has no gradient of its output, hence none here either
            p = tl.where((n < keys)[None, :] & m_ok[:, None], tl.exp2(s - log_sum[:, None]), 0.0)
            dp = _dot(do, tl.trans(v_tile), PRECISION)
            ds = (p * (dp - delta[:, None])).to(q_tile.dtype)
            to = window_base + in_u * WINDOW + in_w
            d_v = _dot(tl.trans(p.to(do.dtype)), do, PRECISION)
            tl.store(
                window_v + to[:, None] * D_V + e[None, :],
                d_v.to(window_v.dtype.element_ty),
                mask=inside[:, None] & (e < D_V)[None, :],
            )
            d_k = _dot(tl.trans(ds), q_tile, PRECISION) * scale
            tl.store(
                window_k + to[:, None] * D + d[None, :],
                d_k.to(window_k.dtype.element_ty),
                mask=inside[:, None] & (d < D)[None, :],
            )
            d_q = _dot(ds, k_tile, PRECISION, acc=d_q)
            dr_h = _dot(ds, tl.trans(one_h), PRECISION, acc=dr_h)
            dr_w = _dot(ds, tl.trans(one_w), PRECISION, acc=dr_w)

        d_rel, d_q_h = _table_gradient(dr_h, q_tile, rel_h, t, y * STEP, D, WINDOW, BLOCK_D, PRECISION)
        d_rel_h += d_rel
        d_rel, d_q_w = _table_gradient(dr_w, q_tile, rel_w, t, x * STEP, D, WINDOW, BLOCK_D, PRECISION)
        d_rel_w += d_rel
        d_q = d_q * scale + (d_q_h + d_q_w) * rel_scale
        tl.store(
            dq + pixel[:, None] * D + d[None, :],
            d_q.to(dq.dtype.element_ty),
            mask=m_ok[:, None] & (d < D)[None, :],
        )

    to = partial + tl.program_id(0) * (2 * T * BLOCK_D) + t[:, None] * BLOCK_D + d[None, :]
    tl.store(to, d_rel_h * rel_scale)
    tl.store(to + T * BLOCK_D, d_rel_w * rel_scale)


@triton.jit
def _fold(windows, out, y, x, ok, image, head, height, width, height_q, width_q, heads, parts, blocks_h, blocks_w,
          BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, M: tl.constexpr,
          D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr):  # fmt: skip
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    COVER: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK  # blocks along one dimension whose windows hold a pixel
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([P, BLOCK_D], tl.float32)
    for a in range(COVER):
        i = (y + HALO) // BLOCK - a
        u = y - (i * BLOCK - HALO)
        i_ok = ok & (i >= 0) & (i < blocks_h) & (u < WINDOW)
        queries_y = _rows(i, height_q, SIDE)
        for b in range(COVER):
            j = (x + HALO) // BLOCK - b
            w = x - (j * BLOCK - HALO)
            j_ok = i_ok & (j >= 0) & (j < blocks_w) & (w < WINDOW)
            queries = queries_y * _rows(j, width_q, SIDE)
            for part in range(parts):
                tile = (((image * blocks_h + i) * blocks_w + j) * parts + part) * heads + head
                offsets = (tile.to(tl.int64) * WINDOW + u) * WINDOW + w
                total += _load(windows, offsets * D, j_ok & (part * M < queries), d, D).to(tl.float32)
    to = ((image * height + y) * width + x) * heads + head
    tl.store(out + to[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def fold_kernel(
    window_k, window_v, dk, dv,
    height, width, height_q, width_q, heads, parts, blocks_h, blocks_w,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Adds up the windows' gradients for P pixels of an (image, head)."""
    groups = (height * width + P - 1) // P
    head = tl.program_id(0) % heads
    pixels = tl.program_id(0) // heads % groups * P + tl.arange(0, P)
    image = (tl.program_id(0) // (heads * groups)).to(tl.int64)
    ok = pixels < height * width
    y, x = pixels // width, pixels % width
    _fold(window_k, dk, y, x, ok, image, head, height, width, height_q, width_q, heads, parts, blocks_h, blocks_w,
          BLOCK, HALO, SIDE, M, D, BLOCK_D, P)  # fmt: skip
    _fold(window_v, dv, y, x, ok, image, head, height, width, height_q, width_q, heads, parts, blocks_h, blocks_w,
          BLOCK, HALO, SIDE, M, D_V, BLOCK_V, P)  # fmt: skip

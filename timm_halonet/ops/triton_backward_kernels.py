"""The backward of halo attention in Triton, and the sums of what its programs leave. See triton_kernels.py."""

import triton
import triton.language as tl

from .triton_tiles import (
    bias_of,
    both_tables,
    clipped_window,
    jit,
    load_keys,
    load_queries,
    load_rows,
    logits_of,
    lower,
    moved_logits,
    piece_of,
    product_of,
    span,
    store_rows,
    tile_queries,
    weights_of,
    wide,
)


@triton.jit
def _moved_back(dr, pos, first, count, WINDOW: tl.constexpr, T: tl.constexpr):
    """The gradient (M, U) of relative logits, moved to the rows of the table (M, T)."""
    u = tl.arange(0, T)[None, :] + pos[:, None] - (WINDOW - 1) - first
    seen = (u >= 0) & (u < count)
    return tl.where(seen, tl.gather(dr, tl.where(seen, u, 0).to(tl.int32), 1), 0.0)


@triton.jit
def _both_moved_back(dr, y, x, first_y, first_x, keys_y, keys_x, WINDOW: tl.constexpr, M: tl.constexpr,
                     T: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """`_moved_back` of rows and columns next to each other, (M, 2 * U), to (M, 2 * T). One gather has half the barriers
    of two."""
    t, second = tl.arange(0, 2 * T) % T, tl.arange(0, 2 * T) >= T
    pos = tl.where(second[None, :], x[:, None], y[:, None])
    u = (t - tl.where(second, first_x, first_y) - (WINDOW - 1))[None, :] + pos
    seen = (u >= 0) & (u < tl.where(second, keys_x, keys_y)[None, :])
    index = tl.where(seen, u + tl.where(second, U, 0)[None, :], 0).to(tl.int32)
    return tl.where(seen, tl.gather(dr, index, 1), 0.0)


@triton.jit
def _centred(rel_h, rel_w, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Both tables as one, less their middle rows. The gradients of a query's relative logits sum to 0, so a constant in
    a table does not count; were it there, what their rounding leaves of the sum would be multiplied by it.

    Only a query that sees a row may have a NaN from it. Where it does, the gradient of its logits is NaN already, so
    that what is not finite may count as 0 here.
    """
    d = tl.arange(0, BLOCK_D)
    middle_h = tl.load(rel_h + (WINDOW - 1) * D + d, mask=d < D, other=0.0)
    middle_w = tl.load(rel_w + (WINDOW - 1) * D + d, mask=d < D, other=0.0)
    middle = tl.where((tl.arange(0, 2 * T) < T)[:, None], middle_h[None, :], middle_w[None, :]).to(tl.float32)
    rows = both_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T).to(tl.float32)
    rows = rows - tl.where(tl.abs(middle) < float("inf"), middle, 0.0)
    return tl.where(tl.abs(rows) < float("inf"), rows, 0.0)


@triton.jit
def _over_queries(a, b, PRECISION: tl.constexpr):
    """The product (N, K) of a (M, N) and b (M, K) over their M queries.

    Of 16 channels, and where Hopper's products of 64 rows serve, as its transpose: those read both sides from shared
    memory, by descriptors that are the same for all tiles and would be kept in registers. The transpose has 16 rows.
    """
    if b.dtype != tl.float32 and b.shape[0] >= 64 and b.shape[1] == 16:
        return tl.trans(product_of(tl.trans(b), a, PRECISION))
    else:
        return product_of(tl.trans(a), b, PRECISION)


@triton.jit
def _differentiate(s, k_tile, v_tile, step, n, inside, q_tile, do, top, row, delta, window_kv, heads, d_q, dr_w,
                   D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                   WINDOW: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                   PRECISION: tl.constexpr, places_h=None, places_w=None):  # fmt: skip
    """One step: stores the gradients of its keys and values, and returns those of queries and relative logits: of all
    columns, added up, and of this step's rows. With `_places` those are sums of what is rounded."""
    p = weights_of(s, row, top, q_tile.dtype, PRECISION)
    ds = p * (product_of(do, tl.trans(v_tile), PRECISION) - delta[:, None])
    to = (n // C * WINDOW + n % C) * heads * (D + D_V)
    window_kv += heads.to(tl.int64) * (step * R * WINDOW * (D + D_V))  # the step is in the base, see `load_keys`
    p_low = lower(p, do.dtype, PRECISION)
    if M >= 64 and D == D_V and D == BLOCK_D:  # one store has half the barriers of two
        ds_low = lower(ds, q_tile.dtype, PRECISION)
        d_v = _over_queries(p_low, do, PRECISION)
        d_kv = _join(_over_queries(ds_low, q_tile, PRECISION), d_v, R * C, D)
        store_rows(window_kv, to, d_kv, inside, 2 * D, 2 * D, PRECISION)
    else:
        store_rows(window_kv + D, to, _over_queries(p_low, do, PRECISION), inside, D_V, BLOCK_V, PRECISION)
        ds_low = lower(ds, q_tile.dtype, PRECISION)
        store_rows(window_kv, to, _over_queries(ds_low, q_tile, PRECISION), inside, D, BLOCK_D, PRECISION)
    d_q = product_of(ds_low, k_tile, PRECISION, acc=d_q)
    if places_h is not None:
        return d_q, product_of(ds_low, places_w, PRECISION, acc=dr_w), product_of(ds_low, places_h, PRECISION)
    else:
        ds = tl.reshape(ds, [M, R, C])
        return d_q, dr_w + tl.sum(ds, 1), tl.sum(ds, 2)


@triton.jit
def _places(rows: tl.constexpr, dtype: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(R * C, C): 1 in the row of the step that a key is in, two columns each where there are several steps; or in its
    column of the window."""
    n, c = tl.arange(0, R * C)[:, None], tl.arange(0, C)[None, :]
    if rows:
        return tl.where(c == (n // C if STEPS == 1 else n // C * 2), 1.0, 0.0).to(dtype)
    else:
        return tl.where(c == n % C, 1.0, 0.0).to(dtype)


@triton.jit
def _join(a, b, M: tl.constexpr, N: tl.constexpr):
    """(M, 2 * N) of its two halves."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [M, 2 * N])


@jit
def backward_kernel(
    q, k, v, rel_h, rel_w, out, saved, grad, dq, window_kv, partial,
    tiles, first_image, height, width, height_q, width_q, heads, blocks_h, blocks_w,
    scale,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr,
    SCALE_REL: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, HALVE: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Every program takes tiles at a fixed distance and keeps its share of the tables' gradients in registers.

    PACKED: how many of q, k and v have the strides of one tensor that they are slices of: 3, 2 (k and v), or 0. With 3
    dq has the strides of q.
    """
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    if PACKED and D == D_V:  # offsets that are the same take registers once; of 16 and 40 channels, more were spilled
        v_image, v_row, v_col, v_head = k_image, k_row, k_col, k_head
        if PACKED == 3:
            q_image, q_row, q_col = k_image, k_row, k_col
    dtype: tl.constexpr = q.dtype.element_ty
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, 2 * T)
    n = span(0, R * C, WIDE)
    TURNED: tl.constexpr = dtype != tl.float32 and M >= 64 and BLOCK_D == 16  # see `_over_queries`
    d_rel = tl.zeros([BLOCK_D, 2 * T] if TURNED else [2 * T, BLOCK_D], tl.float32)
    # In half precision a product adds up over rows and columns, from gradients that are rounded for the others anyway.
    # Of few queries, what it keeps in shared memory would leave place for fewer programs.
    PLACES: tl.constexpr = dtype != tl.float32 and M >= 64 and UNROLL and STEPS * R == C
    KEEP: tl.constexpr = T * BLOCK_D <= 1024  # the tables; larger ones are loaded for every tile, twice
    if KEEP:
        tables = lower(both_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        centred = lower(_centred(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        head = tile % heads
        j = tile // heads
        part = 0
        if PARTS > 1:
            part = j % PARTS
            j = j // PARTS
        i = j // blocks_w
        j = j % blocks_w
        local_image = i // blocks_h
        i = i % blocks_h
        image = wide(local_image + first_image)
        first_y, keys_y = clipped_window(i, height, BLOCK, HALO, RING)
        first_x, keys_x = clipped_window(j, width, BLOCK, HALO, RING)
        in_y, in_x = first_y - i * BLOCK + HALO, first_x - j * BLOCK + HALO
        y, x, m_ok = tile_queries(i, j, part, height_q, width_q, SIDE, ACROSS, M, WIDE)

        wide_i, wide_j = wide(i * SIDE), wide(j * SIDE)
        q_at = image * wide(q_image) + wide_i * wide(q_row) + wide_j * wide(q_col) + wide(head) * wide(q_head)
        q_at *= ALIGN
        q_base = q + q_at
        q_tile, q_rel = load_queries(q_base, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
        if not KEEP:
            tables = lower(both_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        product = product_of(q_rel, tl.trans(tables), PRECISION)
        r_h = moved_logits(piece_of(product, 0, M, 2, T), y * STEP, in_y, keys_y, WINDOW, STEPS * R)
        r_w = moved_logits(piece_of(product, 1, M, 2, T), x * STEP, in_x, keys_x, WINDOW, C)
        block = ((image * wide(height_q) + wide_i) * wide(width_q) + wide_j) * wide(heads) + wide(head)
        pixel = (y * width_q + x) * heads
        top = tl.load(saved + block * 2 + pixel * 2)
        again = tl.load(saved + block * 2 + pixel * 2 + 1)
        row = (
            top if dtype == tl.float32 else top * 0.6
        )  # below `LARGE` where the largest logit was: log2(e) to 2 times it
        do = load_rows(grad + block * D_V, pixel * D_V, m_ok, D_V, BLOCK_V).to(tl.float32) * again[:, None]

        if RING == 0:
            wide_y, wide_x = wide(first_y), wide(first_x)
        else:
            wide_y, wide_x = first_y.to(tl.int64), first_x.to(tl.int64)
        to_k = image * wide(k_image) + wide_y * wide(k_row) + wide_x * wide(k_col) + wide(head) * wide(k_head)
        to_v = image * wide(v_image) + wide_y * wide(v_row) + wide_x * wide(v_col) + wide(head) * wide(v_head)
        k_base, v_base = k + to_k * ALIGN, v + to_v * ALIGN
        # windows hold all heads of a key together, as the map does: that is how they are read
        window = (wide(tile // heads) * (WINDOW * WINDOW) + wide(in_y * WINDOW + in_x)) * wide(heads) + wide(head)
        to_kv = window_kv + window * (D + D_V)
        d_q = tl.zeros([M, BLOCK_D], tl.float32)
        dr_w = tl.zeros([M, C], tl.float32)
        some = i * SIDE + part * M // ACROSS < height_q
        steps = tl.where(some, tl.cdiv(keys_y, R), 0)
        if dtype == tl.float32:
            # The sum that makes a softmax's gradient sum to 0, from the same weights and products as below: where one
            # weight is 1, nothing of it may remain, and the output's digits end where those of the products do.
            delta = tl.zeros([M], tl.float32)
            for step in range(steps):
                k_tile, v_tile, inside = load_keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = logits_of(q_tile, k_tile, bias_of(r_h, r_w, step, M, STEPS, R, C, HALVE), PRECISION)
                p = weights_of(s, row, top, dtype, PRECISION)
                delta += tl.sum(p * product_of(do, tl.trans(v_tile), PRECISION), 1)
            delta *= again
        else:
            o = load_rows(out + block * D_V, pixel * D_V, m_ok, D_V, BLOCK_V)
            delta = tl.sum(do * o.to(tl.float32), 1)
            do = lower(do, q_tile.dtype, PRECISION)
        if UNROLL:
            for step in tl.static_range(STEPS):
                k_tile, v_tile, inside = load_keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = logits_of(q_tile, k_tile, bias_of(r_h, r_w, step, M, STEPS, R, C, HALVE), PRECISION)
                if PLACES:
                    places_h, places_w = _places(True, dtype, STEPS, R, C), _places(False, dtype, STEPS, R, C)
                else:
                    places_h, places_w = None, None
                d_q, dr_w, piece = _differentiate(s, k_tile, v_tile, step, n, inside, q_tile, do, top, row, delta,
                                                  to_kv, heads, d_q, dr_w, D, D_V, BLOCK_D, BLOCK_V, WINDOW, M, R, C,
                                                  PRECISION, places_h, places_w)  # fmt: skip
                if PLACES and STEPS > 1:
                    piece, _ = tl.split(tl.reshape(piece_of(piece, 0, M, C // R // 2, R * 2), [M, R, 2]))
                # the pieces of up to eight steps side by side, as a tree: pairs, then pairs of those
                if step % 2 == 0:
                    one = piece
                else:
                    piece = _join(one, piece, M, R)
                if step % 4 == 1:
                    two = piece
                if step % 4 == 3:
                    piece = _join(two, piece, M, 2 * R)
                if step % 8 == 3:
                    four = piece
                if step % 8 == 7:
                    piece = _join(four, piece, M, 4 * R)
            dr_h = piece
        else:
            dr = tl.zeros([M, STEPS, R], tl.float32)
            for step in range(steps):
                k_tile, v_tile, inside = load_keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = logits_of(q_tile, k_tile, bias_of(r_h, r_w, step, M, STEPS, R, C, HALVE), PRECISION)
                d_q, dr_w, piece = _differentiate(s, k_tile, v_tile, step, n, inside, q_tile, do, top, row, delta,
                                                  to_kv, heads, d_q, dr_w, D, D_V, BLOCK_D, BLOCK_V, WINDOW, M, R, C,
                                                  PRECISION)  # fmt: skip
                dr += tl.where(tl.arange(0, STEPS)[None, :, None] == step, piece[:, None, :], 0.0)
            dr_h = tl.reshape(dr, [M, STEPS * R])

        _, q_rel = load_queries(q_base, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
        q_rel = tl.where(tl.abs(q_rel) < float("inf"), q_rel, 0.0).to(q_rel.dtype)
        if PLACES:
            dr = _join(dr_h, dr_w, M, C)
            moved = _both_moved_back(dr, y * STEP, x * STEP, in_y, in_x, keys_y, keys_x, WINDOW, M, T, C)
        else:
            moved_h = _moved_back(dr_h, y * STEP, in_y, keys_y, WINDOW, T)
            moved = _join(moved_h, _moved_back(dr_w, x * STEP, in_x, keys_x, WINDOW, T), M, T)
        moved = lower(moved, q_rel.dtype, PRECISION)
        if not KEEP:
            centred = lower(_centred(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        if TURNED:
            d_rel = product_of(tl.trans(q_rel), moved, PRECISION, acc=d_rel)
        else:
            d_rel = product_of(tl.trans(moved), q_rel, PRECISION, acc=d_rel)
        d_q_rel = product_of(moved, centred, PRECISION)
        if SCALE_REL:
            d_q = (d_q + d_q_rel) * scale
        else:
            d_q = d_q * scale + d_q_rel
        if PACKED == 3:
            store_rows(dq + q_at, (y * q_row + x * q_col) * ALIGN, d_q, m_ok, D, BLOCK_D, PRECISION)
        else:
            store_rows(dq + block * D, pixel * D, d_q, m_ok, D, BLOCK_D, PRECISION)

    to = partial + tl.program_id(0) * (2 * T * BLOCK_D)
    if TURNED:
        tl.store(to + t[None, :] * BLOCK_D + d[:, None], d_rel)
    else:
        tl.store(to + t[:, None] * BLOCK_D + d[None, :], d_rel)


@triton.jit
def _fold(windows, out, chunk, image, first_image, height, width, height_q, blocks_h, blocks_w, channels,
          others, BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
          PARTS: tl.constexpr, EACH: tl.constexpr, ROW: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr,
          CHANNELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The windows have a head every ROW numbers, of which `out` has EACH, from the one at FIRST on. It has `others`
    after a pixel's last head."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    COVER: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK  # blocks along one dimension whose windows hold a pixel
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    ok = pixel < height.to(tl.int64) * width
    y, x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    c = chunk * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = (c < channels)[None, :]
    from_c = c if EACH == ROW else c // EACH * ROW + c % EACH + FIRST
    total = tl.zeros([P, CHANNELS], tl.float32)
    for a in tl.static_range(COVER):
        i = (y + HALO) // BLOCK - a
        u = y - (i * BLOCK - HALO)
        i_ok = ok & (i >= 0) & (i < blocks_h) & (u < WINDOW)
        for b in tl.static_range(COVER):
            j = (x + HALO) // BLOCK - b
            w = x - (j * BLOCK - HALO)
            j_ok = i_ok & (j >= 0) & (j < blocks_w) & (w < WINDOW)
            block = (image.to(tl.int64) * blocks_h + i) * blocks_w + j
            for part in range(PARTS):
                offsets = ((block * PARTS + part) * (WINDOW * WINDOW) + u * WINDOW + w) * (channels // EACH * ROW)
                there = j_ok & (part * M // ACROSS < height_q - i * SIDE)
                x_tile = tl.load(windows + offsets[:, None] + from_c[None, :], mask=there[:, None] & c_ok, other=0.0)
                total += x_tile.to(tl.float32)
    to = ((image + first_image).to(tl.int64) * height * width + pixel) * (channels + others)
    to = out + to[:, None] + c[None, :]
    tl.store(to, lower(total, out.dtype.element_ty, PRECISION), mask=ok[:, None] & c_ok)


@jit
def fold_kernel(
    window_kv, dk, dv,
    first_image, height, width, height_q, heads, heads_q, blocks_h, blocks_w,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr, P: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds up the windows' gradients for P pixels of an image and CHANNELS channels of all heads, of dk or of dv.

    PACKED: these are slices of one tensor, whose heads have D channels of dk and D_V of dv, as the windows do. It may
    have those of `heads_q` queries too; else that is 0.
    """
    chunk, image, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(heads * D, CHANNELS)
    if PACKED:
        _fold(window_kv, dk, chunk, image, first_image, height, width, height_q, blocks_h, blocks_w, heads * (D + D_V),
              heads_q * D, BLOCK, HALO, SIDE, ACROSS, M, PARTS, D + D_V, D + D_V, 0, P, CHANNELS,
              PRECISION)  # fmt: skip
    elif chunk < chunks:
        _fold(window_kv, dk, chunk, image, first_image, height, width, height_q, blocks_h, blocks_w, heads * D, 0,
              BLOCK, HALO, SIDE, ACROSS, M, PARTS, D, D + D_V, 0, P, CHANNELS, PRECISION)  # fmt: skip
    else:
        _fold(window_kv, dv, chunk - chunks, image, first_image, height, width, height_q, blocks_h, blocks_w,
              heads * D_V, 0, BLOCK, HALO, SIDE, ACROSS, M, PARTS, D_V, D + D_V, D, P, CHANNELS,
              PRECISION)  # fmt: skip


@jit
def table_kernel(partial, d_rel_h, d_rel_w, programs, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Adds up one row of a table's gradient over the programs that had a share in it."""
    t, which = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([16, BLOCK_D], tl.float32)
    for start in range(0, programs, 16):
        p = start + tl.arange(0, 16)
        at = ((p * 2 + which) * T + t) * BLOCK_D
        total += tl.load(partial + at[:, None] + d[None, :], mask=(p < programs)[:, None], other=0.0)
    x = tl.sum(total, 0)
    if which == 0:
        tl.store(d_rel_h + t * D + d, lower(x, d_rel_h.dtype.element_ty, PRECISION), mask=d < D)
    else:
        tl.store(d_rel_w + t * D + d, lower(x, d_rel_w.dtype.element_ty, PRECISION), mask=d < D)

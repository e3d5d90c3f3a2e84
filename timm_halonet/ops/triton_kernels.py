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

LOG2_E = tl.constexpr(1.4426950408889634)

# Numbers that Triton must not compile anew for when they are 1 or divisible by 16. Alignment is told by ALIGN.
SIZES = [
    "height", "width", "height_q", "width_q", "heads", "blocks_h", "blocks_w", "tiles", "first_image", "programs",
    *(f"{x}_{y}" for x in "qkv" for y in ("image", "row", "col", "head")),
]  # fmt: skip


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[x for x in names if x in SIZES])


@triton.jit
def _range(first, N: tl.constexpr, WIDE: tl.constexpr):
    """first .. first + N - 1, in 64 bits where offsets need them."""
    return first + tl.arange(0, N).to(tl.int64) if WIDE else first + tl.arange(0, N)


@triton.jit
def _window(i, length, BLOCK: tl.constexpr, HALO: tl.constexpr, RING: tl.constexpr):
    """First key of block i along one dimension, and number of keys."""
    first = tl.maximum(i * BLOCK - HALO, -RING)
    return first, tl.minimum(i * BLOCK + BLOCK + HALO, length + RING) - first


@triton.jit
def _queries(i, j, part, height_q, width_q, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """Rows and columns in the block of a tile's queries, and which of them there are.

    The others repeat the last one: they see nothing that it does not, so that they need no masks in between.
    """
    m = _range(part * M, M, WIDE)
    y, x = m // ACROSS, m % ACROSS
    down, across = tl.minimum(height_q - i * SIDE, SIDE), tl.minimum(width_q - j * SIDE, SIDE)
    return tl.minimum(y, down - 1), tl.minimum(x, across - 1), (y < down) & (x < across)


@triton.jit
def _inside(u, w, first_y, first_x, keys_y, keys_x, height, width, RING: tl.constexpr):
    """Which keys of the window lie in the image."""
    if RING == 0:
        return (u < keys_y) & (w < keys_x)
    else:
        y_ok = (u < keys_y) & (u >= -first_y) & (u < height - first_y)
        return y_ok & (w < keys_x) & (w >= -first_x) & (w < width - first_x)


@triton.jit
def _load(base, offsets, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of rows of D numbers, in BLOCK_D columns; 0 where not ok."""
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] if D == BLOCK_D else ok[:, None] & (d < D)[None, :]
    return tl.load(base + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _low(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x in another dtype, rounded."""
    if PRECISION == "interpreted" and dtype == tl.bfloat16 and x.dtype == tl.float32:  # there it would be cut off
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _load_queries(base, offsets, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_REL: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Queries times `scale`, as the products with keys take them, and as those with the tables do."""
    d = tl.arange(0, BLOCK_D)
    at = base + offsets[:, None] + d[None, :]
    q = tl.load(at) if D == BLOCK_D else tl.load(at, mask=(d < D)[None, :], other=0.0)
    scaled = _low(q.to(tl.float32) * scale, q.dtype, PRECISION)
    return scaled, scaled if SCALE_REL else q


@triton.jit
def _store(base, offsets, x, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] if D == BLOCK_D else ok[:, None] & (d < D)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], _low(x, base.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, acc=None):
    if PRECISION == "interpreted":  # no products of bfloat16, and of float32 with more error than PyTorch's own
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return (product if acc is None else product + acc).to(tl.float32)
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _tables(rel_h, rel_w, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Both tables as one, (2 * T, BLOCK_D): one product serves both."""
    t = tl.arange(0, 2 * T)
    rows_h = _load(rel_h, t * D, t < 2 * WINDOW - 1, D, BLOCK_D)
    rows_w = _load(rel_w, (t - T) * D, (t >= T) & (t < T + 2 * WINDOW - 1), D, BLOCK_D)
    return tl.where((t < T)[:, None], rows_h, rows_w)


@triton.jit
def _moved(product, pos, first, count, WINDOW: tl.constexpr, U: tl.constexpr):
    """Relative logits (M, U) of queries at `pos` for rows (or columns) first, first + 1, ... of the window, from their
    products with the tables; -inf past `count` of them."""
    u = tl.arange(0, U)
    index = tl.minimum(first + u, WINDOW - 1)[None, :] - pos[:, None] + (WINDOW - 1)
    return tl.where((u < count)[None, :], tl.gather(product, index.to(tl.int32), 1), -float("inf"))


@triton.jit
def _piece(x, step: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr):
    """Columns step * R ... of x (M, STEPS * R), by halving: registers are renamed, nothing moves."""
    if STEPS == 1:
        return x
    else:
        HALF: tl.constexpr = STEPS // 2
        a, b = tl.split(tl.permute(tl.reshape(x, [M, 2, HALF * R]), [0, 2, 1]))
        return _piece(a, step, M, HALF, R) if step < HALF else _piece(b, step - HALF, M, HALF, R)


@triton.jit
def _join(a, b, M: tl.constexpr, N: tl.constexpr):
    """(M, 2 * N) of its two halves."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [M, 2 * N])


@triton.jit
def _bias(r_h, r_w, step, M: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """Relative logits (M, R * C) of the keys of one step."""
    if UNROLL:
        r_h = _piece(r_h, step, M, STEPS, R)
    else:
        here = tl.arange(0, STEPS)[None, :, None] == step
        r_h = tl.sum(tl.where(here, tl.reshape(r_h, [M, STEPS, R]), 0.0), 1)
    return tl.reshape(r_h[:, :, None] + r_w[:, None, :], [M, R * C])


@triton.jit
def _keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y, keys_x, height, width,
          RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
          R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """The keys and values of one step, R rows of the window; with their rows and columns, and which there are."""
    u, w = step * R + n // C, n % C
    inside = _inside(u, w, first_y, first_x, keys_y, keys_x, height, width, RING)
    k_tile = _load(k, (u * k_row + w * k_col) * ALIGN, inside, D, BLOCK_D)
    v_tile = _load(v, (u * v_row + w * v_col) * ALIGN, inside, D_V, BLOCK_V)
    return k_tile, v_tile, u, w, inside


@triton.jit
def _logits(q, k, bias, PRECISION: tl.constexpr):
    if PRECISION == "ieee":  # a long sum that begins with a large bias would be rounded at every term
        return _dot(q, tl.trans(k), PRECISION) + bias
    else:
        return _dot(q, tl.trans(k), PRECISION, acc=bias)


@triton.jit
def _unit(top, dtype: tl.constexpr):
    """What a row's logits are multiplied by before exp2: log2(e), but for logits so large that the rounding of their
    product would be more than a weight can hold. Those are equal or far apart, and any exact factor serves them."""
    LARGE: tl.constexpr = 2.0**25 if dtype == tl.float16 else 2.0**29
    return tl.where(tl.abs(top) < LARGE, LOG2_E, 2.0)


@triton.jit
def _weights(s, top, minus, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """exp(s - top), up to a factor for the whole row in half precision."""
    if dtype == tl.float32:
        return tl.exp2((s - top[:, None]) * LOG2_E)
    elif PRECISION == "interpreted":  # the hardware's fused multiply-add, which has one rounding
        return tl.exp2((s.to(tl.float64) * _unit(top, dtype)[:, None] - minus[:, None]).to(tl.float32))
    else:
        return tl.exp2(s * _unit(top, dtype)[:, None] - minus[:, None])


@triton.jit
def _attend(s, v_tile, top, total, acc, FIRST: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: the largest logit so far, the sum of weights, and that of weighted values."""
    higher = tl.max(s, 1) if FIRST else tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # no weight yet, rather than inf - inf
    scaled = base * _unit(base, dtype)
    p = _weights(s, base, scaled, dtype, PRECISION)
    if FIRST:
        return higher, tl.sum(p, 1), _dot(_low(p, v_tile.dtype, PRECISION), v_tile, PRECISION)
    else:
        ratio = tl.exp2((top - base) * LOG2_E if dtype == tl.float32 else top * _unit(top, dtype) - scaled)
        acc = _dot(_low(p, v_tile.dtype, PRECISION), v_tile, PRECISION, acc=acc * ratio[:, None])
        return higher, total * ratio + tl.sum(p, 1), acc


@_jit
def forward_kernel(
    q, k, v, rel_h, rel_w, out, saved,
    first_image, height, width, height_q, width_q, heads, blocks_w, scale,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr,
    SCALE_REL: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    head = tl.program_id(0) % heads
    j = tl.program_id(0) // heads
    part = 0
    if PARTS > 1:
        part = j % PARTS
        j = j // PARTS
    i = tl.program_id(1)
    image = (tl.program_id(2) + first_image).to(tl.int64)
    first_y, keys_y = _window(i, height, BLOCK, HALO, RING)
    first_x, keys_x = _window(j, width, BLOCK, HALO, RING)
    y, x, m_ok = _queries(i, j, part, height_q, width_q, SIDE, ACROSS, M, WIDE)

    wide_i, wide_j = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
    q += (image * q_image + wide_i * q_row + wide_j * q_col + head.to(tl.int64) * q_head) * ALIGN
    q_tile, q_rel = _load_queries(q, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
    tables = _low(_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), q_tile.dtype, PRECISION)
    product = _dot(q_rel, tl.trans(tables), PRECISION)
    r_h = _moved(_piece(product, 0, M, 2, T), y * STEP, first_y - i * BLOCK + HALO, keys_y, WINDOW, STEPS * R)
    r_w = _moved(_piece(product, 1, M, 2, T), x * STEP, first_x - j * BLOCK + HALO, keys_x, WINDOW, C)

    wide_y, wide_x = first_y.to(tl.int64), first_x.to(tl.int64)
    k += (image * k_image + wide_y * k_row + wide_x * k_col + head.to(tl.int64) * k_head) * ALIGN
    v += (image * v_image + wide_y * v_row + wide_x * v_col + head.to(tl.int64) * v_head) * ALIGN
    dtype: tl.constexpr = q.dtype.element_ty
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    n = _range(0, R * C, WIDE)
    if UNROLL:
        for step in tl.static_range(STEPS):
            k_tile, v_tile, _, _, _ = _keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y, keys_x,
                                            height, width, RING, D, D_V, BLOCK_D, BLOCK_V, R, C, ALIGN)  # fmt: skip
            s = _logits(q_tile, k_tile, _bias(r_h, r_w, step, M, STEPS, R, C, True), PRECISION)
            top, total, acc = _attend(s, v_tile, top, total, acc, step == 0, dtype, PRECISION)
    else:
        some = i * SIDE + part * M // ACROSS < height_q  # of the last row of blocks, whole parts may be empty
        for step in range(tl.where(some, tl.cdiv(keys_y, R), 0)):
            k_tile, v_tile, _, _, _ = _keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y, keys_x,
                                            height, width, RING, D, D_V, BLOCK_D, BLOCK_V, R, C, ALIGN)  # fmt: skip
            s = _logits(q_tile, k_tile, _bias(r_h, r_w, step, M, STEPS, R, C, False), PRECISION)
            top, total, acc = _attend(s, v_tile, top, total, acc, False, dtype, PRECISION)

    block = ((image * height_q + wide_i) * width_q + wide_j) * heads + head
    pixel = (y * width_q + x) * heads
    share = 1.0 / total
    if dtype == tl.float32:
        first, second = top, share
    else:
        scaled = top * _unit(top, dtype)
        first = scaled + tl.log2(total)
        second = tl.exp2(first - scaled) * share
        second = tl.where(tl.abs(second - 1.0) < 2.0**-12, 1.0, second)  # below half a digit of what it multiplies
    tl.store(saved + block * 2 + pixel * 2, first, mask=m_ok)
    tl.store(saved + block * 2 + pixel * 2 + 1, second, mask=m_ok)
    _store(out + block * D_V, pixel * D_V, acc * share[:, None], m_ok, D_V, BLOCK_V, PRECISION)


@triton.jit
def _moved_back(dr, pos, first, count, WINDOW: tl.constexpr, T: tl.constexpr):
    """The gradient (M, U) of relative logits, moved to the rows of the table (M, T)."""
    u = tl.arange(0, T)[None, :] + pos[:, None] - (WINDOW - 1) - first
    seen = (u >= 0) & (u < count)
    return tl.where(seen, tl.gather(dr, tl.where(seen, u, 0).to(tl.int32), 1), 0.0)


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
    rows = _tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T).to(tl.float32)
    rows = rows - tl.where(tl.abs(middle) < float("inf"), middle, 0.0)
    return tl.where(tl.abs(rows) < float("inf"), rows, 0.0)


@triton.jit
def _differentiate(s, k_tile, v_tile, u, w, inside, q_tile, do, top, row, delta, window_k, window_v, heads,
                   d_q, dr_w, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                   WINDOW: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One step: stores the gradients of its keys and values, and returns those of queries and relative logits."""
    p = _weights(s, row, top, q_tile.dtype, PRECISION)
    ds = p * (_dot(do, tl.trans(v_tile), PRECISION) - delta[:, None])
    to = (u * WINDOW + w) * heads
    d_v = _dot(tl.trans(_low(p, do.dtype, PRECISION)), do, PRECISION)
    _store(window_v, to * D_V, d_v, inside, D_V, BLOCK_V, PRECISION)
    ds_low = _low(ds, q_tile.dtype, PRECISION)
    d_k = _dot(tl.trans(ds_low), q_tile, PRECISION)
    _store(window_k, to * D, d_k, inside, D, BLOCK_D, PRECISION)
    d_q = _dot(ds_low, k_tile, PRECISION, acc=d_q)
    ds = tl.reshape(ds, [M, R, C])
    return d_q, dr_w + tl.sum(ds, 1), tl.sum(ds, 2)


@_jit
def backward_kernel(
    q, k, v, rel_h, rel_w, out, saved, grad, dq, window_k, window_v, partial,
    tiles, first_image, height, width, height_q, width_q, heads, blocks_h, blocks_w,
    scale,
    q_image, q_row, q_col, q_head, k_image, k_row, k_col, k_head, v_image, v_row, v_col, v_head,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, STEP: tl.constexpr,
    SCALE_REL: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every program takes tiles at a fixed distance and keeps its share of the tables' gradients in registers."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    dtype: tl.constexpr = q.dtype.element_ty
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, 2 * T)
    n = _range(0, R * C, WIDE)
    d_rel = tl.zeros([2 * T, BLOCK_D], tl.float32)
    KEEP: tl.constexpr = T * BLOCK_D <= 1024  # the tables; larger ones are loaded for every tile, twice
    if KEEP:
        tables = _low(_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        centred = _low(_centred(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
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
        image = (local_image + first_image).to(tl.int64)
        first_y, keys_y = _window(i, height, BLOCK, HALO, RING)
        first_x, keys_x = _window(j, width, BLOCK, HALO, RING)
        in_y, in_x = first_y - i * BLOCK + HALO, first_x - j * BLOCK + HALO
        y, x, m_ok = _queries(i, j, part, height_q, width_q, SIDE, ACROSS, M, WIDE)

        wide_i, wide_j = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
        q_base = q + (image * q_image + wide_i * q_row + wide_j * q_col + head.to(tl.int64) * q_head) * ALIGN
        q_tile, q_rel = _load_queries(q_base, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
        if not KEEP:
            tables = _low(_tables(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        product = _dot(q_rel, tl.trans(tables), PRECISION)
        r_h = _moved(_piece(product, 0, M, 2, T), y * STEP, in_y, keys_y, WINDOW, STEPS * R)
        r_w = _moved(_piece(product, 1, M, 2, T), x * STEP, in_x, keys_x, WINDOW, C)
        block = ((image * height_q + wide_i) * width_q + wide_j) * heads + head
        pixel = (y * width_q + x) * heads
        top = tl.load(saved + block * 2 + pixel * 2)
        again = tl.load(saved + block * 2 + pixel * 2 + 1)
        row = (
            top if dtype == tl.float32 else top * 0.6
        )  # below `LARGE` where the largest logit was: log2(e) to 2 times it
        do = _load(grad + block * D_V, pixel * D_V, m_ok, D_V, BLOCK_V).to(tl.float32) * again[:, None]

        wide_y, wide_x = first_y.to(tl.int64), first_x.to(tl.int64)
        k_base = k + (image * k_image + wide_y * k_row + wide_x * k_col + head.to(tl.int64) * k_head) * ALIGN
        v_base = v + (image * v_image + wide_y * v_row + wide_x * v_col + head.to(tl.int64) * v_head) * ALIGN
        # windows hold all heads of a key together, as the map does: that is how they are read
        window = ((tile // heads).to(tl.int64) * (WINDOW * WINDOW) + in_y * WINDOW + in_x) * heads + head
        to_k, to_v = window_k + window * D, window_v + window * D_V
        d_q = tl.zeros([M, BLOCK_D], tl.float32)
        dr_w = tl.zeros([M, C], tl.float32)
        some = i * SIDE + part * M // ACROSS < height_q
        steps = tl.where(some, tl.cdiv(keys_y, R), 0)
        if dtype == tl.float32:
            # The sum that makes a softmax's gradient sum to 0, from the same weights and products as below: where one
            # weight is 1, nothing of it may remain, and the output's digits end where those of the products do.
            delta = tl.zeros([M], tl.float32)
            for step in range(steps):
                k_tile, v_tile, u, w, inside = _keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = _logits(q_tile, k_tile, _bias(r_h, r_w, step, M, STEPS, R, C, False), PRECISION)
                p = _weights(s, row, top, dtype, PRECISION)
                delta += tl.sum(p * _dot(do, tl.trans(v_tile), PRECISION), 1)
            delta *= again
        else:
            o = _load(out + block * D_V, pixel * D_V, m_ok, D_V, BLOCK_V)
            delta = tl.sum(do * o.to(tl.float32), 1)
            do = _low(do, q_tile.dtype, PRECISION)
        if UNROLL:
            for step in tl.static_range(STEPS):
                k_tile, v_tile, u, w, inside = _keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = _logits(q_tile, k_tile, _bias(r_h, r_w, step, M, STEPS, R, C, True), PRECISION)
                d_q, dr_w, piece = _differentiate(s, k_tile, v_tile, u, w, inside, q_tile, do, top, row, delta, to_k,
                                                  to_v, heads, d_q, dr_w, D, D_V, BLOCK_D, BLOCK_V, WINDOW, M, R, C,
                                                  PRECISION)  # fmt: skip
                if step % 2 == 0:
                    even = piece
                else:
                    piece = _join(even, piece, M, R)
                if step % 4 == 1:
                    half = piece
            dr_h = piece if STEPS < 4 else _join(half, piece, M, 2 * R)
        else:
            dr = tl.zeros([M, STEPS, R], tl.float32)
            for step in range(steps):
                k_tile, v_tile, u, w, inside = _keys(k_base, v_base, step, n, k_row, k_col, v_row, v_col, first_y,
                                                     first_x, keys_y, keys_x, height, width, RING, D, D_V, BLOCK_D,
                                                     BLOCK_V, R, C, ALIGN)  # fmt: skip
                s = _logits(q_tile, k_tile, _bias(r_h, r_w, step, M, STEPS, R, C, False), PRECISION)
                d_q, dr_w, piece = _differentiate(s, k_tile, v_tile, u, w, inside, q_tile, do, top, row, delta, to_k,
                                                  to_v, heads, d_q, dr_w, D, D_V, BLOCK_D, BLOCK_V, WINDOW, M, R, C,
                                                  PRECISION)  # fmt: skip
                dr += tl.where(tl.arange(0, STEPS)[None, :, None] == step, piece[:, None, :], 0.0)
            dr_h = tl.reshape(dr, [M, STEPS * R])

        _, q_rel = _load_queries(q_base, (y * q_row + x * q_col) * ALIGN, scale, D, BLOCK_D, SCALE_REL, PRECISION)
        q_rel = tl.where(tl.abs(q_rel) < float("inf"), q_rel, 0.0).to(q_rel.dtype)
        moved_h = _moved_back(dr_h, y * STEP, in_y, keys_y, WINDOW, T)
        moved_w = _moved_back(dr_w, x * STEP, in_x, keys_x, WINDOW, T)
        moved = _low(_join(moved_h, moved_w, M, T), q_rel.dtype, PRECISION)
        if not KEEP:
            centred = _low(_centred(rel_h, rel_w, D, WINDOW, BLOCK_D, T), dtype, PRECISION)
        d_rel = _dot(tl.trans(moved), q_rel, PRECISION, acc=d_rel)
        d_q_rel = _dot(moved, centred, PRECISION)
        if SCALE_REL:
            d_q = (d_q + d_q_rel) * scale
        else:
            d_q = d_q * scale + d_q_rel
        _store(dq + block * D, pixel * D, d_q, m_ok, D, BLOCK_D, PRECISION)

    to = partial + tl.program_id(0) * (2 * T * BLOCK_D) + t[:, None] * BLOCK_D + d[None, :]
    tl.store(to, d_rel)


@triton.jit
def _fold(windows, out, chunk, image, first_image, height, width, height_q, blocks_h, blocks_w, channels,
          BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
          PARTS: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    COVER: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK  # blocks along one dimension whose windows hold a pixel
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    ok = pixel < height.to(tl.int64) * width
    y, x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    c = chunk * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = (c < channels)[None, :]
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
                offsets = ((block * PARTS + part) * (WINDOW * WINDOW) + u * WINDOW + w) * channels
                there = j_ok & (part * M // ACROSS < height_q - i * SIDE)
                x_tile = tl.load(windows + offsets[:, None] + c[None, :], mask=there[:, None] & c_ok, other=0.0)
                total += x_tile.to(tl.float32)
    to = out + ((image + first_image).to(tl.int64) * height * width + pixel)[:, None] * channels + c[None, :]
    tl.store(to, _low(total, out.dtype.element_ty, PRECISION), mask=ok[:, None] & c_ok)


@_jit
def fold_kernel(
    window_k, window_v, dk, dv,
    first_image, height, width, height_q, heads, blocks_h, blocks_w,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds up the windows' gradients for P pixels of an image and CHANNELS channels of all heads, of dk or of dv."""
    chunks = tl.cdiv(heads * D, CHANNELS)
    if tl.program_id(1) < chunks:
        _fold(window_k, dk, tl.program_id(1), tl.program_id(2), first_image, height, width, height_q, blocks_h,
              blocks_w, heads * D, BLOCK, HALO, SIDE, ACROSS, M, PARTS, P, CHANNELS, PRECISION)  # fmt: skip
    else:
        _fold(window_v, dv, tl.program_id(1) - chunks, tl.program_id(2), first_image, height, width, height_q,
              blocks_h, blocks_w, heads * D_V, BLOCK, HALO, SIDE, ACROSS, M, PARTS, P, CHANNELS, PRECISION)  # fmt: skip


@_jit
def table_kernel(partial, d_rel_h, d_rel_w, programs, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
                 T: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
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
        tl.store(d_rel_h + t * D + d, _low(x, d_rel_h.dtype.element_ty, PRECISION), mask=d < D)
    else:
        tl.store(d_rel_w + t * D + d, _low(x, d_rel_w.dtype.element_ty, PRECISION), mask=d < D)

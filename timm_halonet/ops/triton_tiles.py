"""What the Triton kernels of halo attention share: tiles of queries and keys, products, logits and their weights."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Numbers that Triton must not compile anew for when they are 1 or divisible by 16. Alignment is told by ALIGN.
SIZES = [
    "height", "width", "height_q", "width_q", "heads", "heads_q", "blocks_h", "blocks_w", "tiles", "first_image",
    "programs",
    *(f"{x}_{y}" for x in "qkv" for y in ("image", "row", "col", "head")),
]  # fmt: skip


def jit(function):
    """triton.jit, compiled once for all sizes of maps (`SIZES`)."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[x for x in names if x in SIZES])


@triton.jit
def wide(x):
    """A size or an index that is not negative, in 64 bits: their upper half is known, and takes no register."""
    return x.to(tl.uint32).to(tl.int64) if x.dtype == tl.int32 else x.to(tl.int64)


@triton.jit
def span(first, N: tl.constexpr, WIDE: tl.constexpr):
    """first .. first + N - 1, in 64 bits where offsets need them."""
    return first + tl.arange(0, N).to(tl.int64) if WIDE else first + tl.arange(0, N)


@triton.jit
def clipped_window(i, length, BLOCK: tl.constexpr, HALO: tl.constexpr, RING: tl.constexpr):
    """First key of block i along one dimension, and number of keys."""
    first = tl.maximum(i * BLOCK - HALO, -RING)
    return first, tl.minimum(i * BLOCK + BLOCK + HALO, length + RING) - first


@triton.jit
def tile_queries(i, j, part, height_q, width_q, SIDE: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """Rows and columns in the block of a tile's queries, and which of them there are.

    The others repeat the last one: they see nothing that it does not, so that they need no masks in between.
    """
    m = span(part * M, M, WIDE)
    y, x = m // ACROSS, m % ACROSS
    down, across = tl.minimum(height_q - i * SIDE, SIDE), tl.minimum(width_q - j * SIDE, SIDE)
    return tl.minimum(y, down - 1), tl.minimum(x, across - 1), (y < down) & (x < across)


@triton.jit
def inside_image(u, w, first_y, first_x, keys_y, keys_x, height, width, RING: tl.constexpr):
    """Which keys of the window lie in the image."""
    if RING == 0:
        return (u < keys_y) & (w < keys_x)
    else:
        y_ok = (u < keys_y) & (u >= -first_y) & (u < height - first_y)
        return y_ok & (w < keys_x) & (w >= -first_x) & (w < width - first_x)


@triton.jit
def load_rows(base, offsets, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of rows of D numbers, in BLOCK_D columns; 0 where not ok."""
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] if D == BLOCK_D else ok[:, None] & (d < D)[None, :]
    return tl.load(base + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def lower(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x in another dtype, rounded."""
    if PRECISION == "interpreted" and dtype == tl.bfloat16 and x.dtype == tl.float32:  # there it would be cut off
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load_queries(base, offsets, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_REL: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Queries times `scale`, as the products with keys take them, and as those with the tables do."""
    d = tl.arange(0, BLOCK_D)
    at = base + offsets[:, None] + d[None, :]
    q = tl.load(at) if D == BLOCK_D else tl.load(at, mask=(d < D)[None, :], other=0.0)
    scaled = lower(q.to(tl.float32) * scale, q.dtype, PRECISION)
    return scaled, scaled if SCALE_REL else q


@triton.jit
def store_rows(base, offsets, x, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Store rows of D channels of x, (rows, BLOCK_D), where `ok`."""
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] if D == BLOCK_D else ok[:, None] & (d < D)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], lower(x, base.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def product_of(a, b, PRECISION: tl.constexpr, acc=None):
    """The matrix product of two tiles in float32, added to `acc` where it is given."""
    if PRECISION == "interpreted":  # no products of bfloat16, and of float32 with more error than PyTorch's own
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return (product if acc is None else product + acc).to(tl.float32)
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def both_tables(rel_h, rel_w, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Both tables as one, (2 * T, BLOCK_D): one product serves both."""
    t = tl.arange(0, 2 * T)
    rows_h = load_rows(rel_h, t * D, t < 2 * WINDOW - 1, D, BLOCK_D)
    rows_w = load_rows(rel_w, (t - T) * D, (t >= T) & (t < T + 2 * WINDOW - 1), D, BLOCK_D)
    return tl.where((t < T)[:, None], rows_h, rows_w)


@triton.jit
def moved_logits(product, pos, first, count, WINDOW: tl.constexpr, U: tl.constexpr):
    """Relative logits (M, U) of queries at `pos` for rows (or columns) first, first + 1, ... of the window, from their
    products with the tables; -inf past `count` of them."""
    u = tl.arange(0, U)
    index = tl.minimum(first + u, WINDOW - 1)[None, :] - pos[:, None] + (WINDOW - 1)
    return tl.where((u < count)[None, :], tl.gather(product, index.to(tl.int32), 1), -float("inf"))


@triton.jit
def piece_of(x, step, M: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr):
    """Columns step * R ... of x (M, STEPS * R), by halving: registers are renamed, nothing moves. A step that is known
    at run time only selects halves."""
    if STEPS == 1:
        return x
    else:
        HALF: tl.constexpr = STEPS // 2
        a, b = tl.split(tl.permute(tl.reshape(x, [M, 2, HALF * R]), [0, 2, 1]))
        if isinstance(step, tl.tensor):
            return piece_of(tl.where(step < HALF, a, b), step % HALF, M, HALF, R)
        else:
            return piece_of(a, step, M, HALF, R) if step < HALF else piece_of(b, step - HALF, M, HALF, R)


@triton.jit
def bias_of(r_h, r_w, step, M: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
            HALVE: tl.constexpr):  # fmt: skip
    """Relative logits (M, R * C) of the keys of one step. Without HALVE, rows are found by a sum."""
    if HALVE:
        r_h = piece_of(r_h, step, M, STEPS, R)
    else:
        here = tl.arange(0, STEPS)[None, :, None] == step
        r_h = tl.sum(tl.where(here, tl.reshape(r_h, [M, STEPS, R]), 0.0), 1)
    return tl.reshape(r_h[:, :, None] + r_w[:, None, :], [M, R * C])


@triton.jit
def load_keys(k, v, step, n, k_row, k_col, v_row, v_col, first_y, first_x, keys_y, keys_x, height, width,
          RING: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
          R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """The keys and values of one step, R rows of the window, and which of them there are.

    The step is in the base, a scalar: all steps share the offsets, of which every thread has several.
    """
    u, w = n // C, n % C
    down = step * R
    inside = inside_image(u, w, first_y + down, first_x, keys_y - down, keys_x, height, width, RING)
    k_tile = load_rows(k + k_row.to(tl.int64) * (down * ALIGN), (u * k_row + w * k_col) * ALIGN, inside, D, BLOCK_D)
    v_tile = load_rows(v + v_row.to(tl.int64) * (down * ALIGN), (u * v_row + w * v_col) * ALIGN, inside, D_V, BLOCK_V)
    return k_tile, v_tile, inside


@triton.jit
def logits_of(q, k, bias, PRECISION: tl.constexpr):
    """q.k + bias for a tile of queries and a tile of keys."""
    if PRECISION == "ieee":  # a long sum that begins with a large bias would be rounded at every term
        return product_of(q, tl.trans(k), PRECISION) + bias
    else:
        return product_of(q, tl.trans(k), PRECISION, acc=bias)


@triton.jit
def unit_of(top, dtype: tl.constexpr):
    """What a row's logits are multiplied by before exp2: log2(e), but for logits so large that the rounding of their
    product would be more than a weight can hold. Those are equal or far apart, and any exact factor serves them."""
    LARGE: tl.constexpr = 2.0**25 if dtype == tl.float16 else 2.0**29
    return tl.where(tl.abs(top) < LARGE, LOG2_E, 2.0)


@triton.jit
def weights_of(s, top, minus, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """exp(s - top), up to a factor for the whole row in half precision."""
    if dtype == tl.float32:
        return tl.exp2((s - top[:, None]) * LOG2_E)
    elif PRECISION == "interpreted":  # the hardware's fused multiply-add, which has one rounding
        return tl.exp2((s.to(tl.float64) * unit_of(top, dtype)[:, None] - minus[:, None]).to(tl.float32))
    else:
        return tl.exp2(s * unit_of(top, dtype)[:, None] - minus[:, None])

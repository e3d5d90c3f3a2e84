"""How halo attention is cut into tiles for the Triton kernels, and what their launch needs to know. No Triton here."""

import functools
import math
from typing import Any, NamedTuple

import torch

from .options import Options

MAX_GRID = 65535  # programs along the second and third dimension of a launch


class Limits(NamedTuple):
    """How large a tile may be, chosen so that offline compilation shows few spilled registers and many programs."""

    channels: int  # of a head, for which this holds
    queries: int
    keys: int
    numbers: int  # queries times channels
    table: int  # queries times rows of the table
    warps: int
    stages: int  # two overlap a tile's loads with the one before, where shared memory suffices

    def most(self, channels: int, table: int) -> int:
        """Queries of a tile, of so many channels, with so many rows of the table."""
        return max(16, min(self.queries, self.numbers // channels, self.table // table))


# (dtype, products, backward) -> by channels, the fewest first. "any" products are those that are not named. There are
# tensor cores for "half" and "tf32", and none for "ieee".
LIMITS = {
    ("half", "any", False): (Limits(64, 64, 128, 8192, 16384, 4, 2), Limits(256, 64, 64, 8192, 16384, 4, 2)),
    ("half", "any", True): (
        Limits(16, 64, 64, 4096, 8192, 4, 2),
        Limits(64, 64, 64, 4096, 8192, 4, 1),
        Limits(256, 64, 32, 4096, 8192, 4, 1),
    ),
    ("tf32", "any", False): (Limits(64, 64, 64, 4096, 16384, 4, 2), Limits(256, 64, 32, 4096, 16384, 4, 2)),
    ("tf32", "any", True): (
        Limits(16, 64, 32, 2048, 8192, 4, 2),
        Limits(64, 64, 32, 2048, 8192, 4, 1),
        Limits(256, 64, 16, 2048, 8192, 4, 1),
    ),
    ("ieee", "any", False): (Limits(64, 32, 32, 4096, 8192, 4, 2), Limits(256, 32, 16, 4096, 8192, 4, 2)),
    ("ieee", "any", True): (Limits(16, 32, 16, 4096, 8192, 4, 2), Limits(256, 32, 16, 4096, 8192, 4, 1)),
    # With fewer keys, three programs fit on a multiprocessor where two did.
    ("half", "warpgroup", False): (Limits(16, 64, 128, 8192, 16384, 4, 2), Limits(256, 64, 64, 8192, 16384, 4, 2)),
    # Products of single warps spill less in smaller tiles.
    ("half", "warp", True): (
        Limits(16, 64, 64, 4096, 8192, 4, 2),
        Limits(32, 64, 64, 4096, 8192, 4, 1),
        Limits(256, 32, 32, 4096, 8192, 2, 1),
    ),
    # Four warps put every product of 64 rows through tensor memory, with barriers around it: a backward of 16 channels
    # takes 4.6 times the instructions of two warps, which do not.
    ("half", "tensor memory", False): (Limits(64, 32, 64, 4096, 8192, 2, 2), Limits(256, 32, 32, 4096, 8192, 2, 2)),
    ("half", "tensor memory", True): (
        Limits(16, 32, 64, 4096, 8192, 2, 2),
        Limits(32, 32, 32, 4096, 8192, 2, 2),
        Limits(256, 32, 32, 4096, 8192, 2, 1),
    ),
    ("tf32", "tensor memory", False): (Limits(64, 32, 32, 4096, 8192, 2, 2), Limits(256, 32, 16, 4096, 8192, 2, 2)),
    ("tf32", "tensor memory", True): (
        Limits(16, 32, 32, 2048, 8192, 2, 2),
        Limits(64, 32, 32, 2048, 8192, 2, 1),
        Limits(256, 32, 16, 2048, 8192, 2, 1),
    ),
}


def products_of(major: int) -> str:
    """What computes a matrix product on an NVIDIA chip of compute capability `major`: a "warp", a "warpgroup" of four,
    or a warpgroup by "tensor memory"."""
    return {9: "warpgroup", 10: "tensor memory", 11: "tensor memory"}.get(major, "warp")


def limits_of(dtype: torch.dtype, precision: str, products: str, backward: bool, channels: int) -> Limits:
    """The entry of LIMITS; arguments as in `plan`, and the most channels of a head's keys or values."""
    kind = "half" if dtype != torch.float32 else "ieee" if precision == "ieee" else "tf32"
    rows = LIMITS.get((kind, products, backward)) or LIMITS[kind, "any", backward]
    return next((x for x in rows if channels <= x.channels), rows[-1])


class Plan(NamedTuple):
    """How a problem is cut into tiles."""

    meta: dict[str, Any]  # compile-time arguments of the kernel, but for ALIGN and WIDE
    num_warps: int
    num_stages: int
    useful: float  # share of the computed logits whose query and key there are, in a block inside a large map


@functools.lru_cache(maxsize=4096)
def plan(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    size: tuple[int, int],
    options: Options,
    backward: bool,
    precision: str = "ieee",
    smaller: int = 0,
    products: str = "warpgroup",
) -> Plan:
    """The tiles for heads of `dim` and `dim_v` channels on maps of `size` = (H, W) pixels.

    Args:
        dtype: of q.
        dim: query and key channels of a head.
        dim_v: value channels of a head.
        size: height and width of the key map in pixels.
        options: of the op.
        backward: which of the two kernels.
        precision: of products of float32 numbers: "ieee", "tf32", or "interpreted" by Triton's interpreter.
        smaller: how often to halve the tile, keys before queries.
        products: of this chip, see `products_of`.
    """
    side = options.block_size // options.query_stride
    window = options.block_size + 2 * options.halo_size
    ring = 0 if options.mask_border else options.halo_size
    if not backward:  # so many sizes run in inference that smaller maps are not compiled for: they wait for the launch
        size = max(8, size[0]), max(8, size[1])
    # The largest block and window that this map has. Small maps count up to the next power of two, so that not every
    # size is compiled for.
    down, across = (min(side, _power_of_two(-(-x // options.query_stride))) for x in size)
    rows, columns = (min(window, x + 2 * ring) for x in size)
    table = max(16, _power_of_two(2 * window - 1))
    block_d, block_v = max(16, _power_of_two(dim)), max(16, _power_of_two(dim_v))
    widest = max(block_d, block_v)

    limits = limits_of(dtype, precision, products, backward, widest)
    m = _queries_a_tile(down * across, limits.most(widest, table))
    if products == "warpgroup" and backward and m < 64:
        products = "warp"  # a warpgroup's products have 64 rows
        limits = limits_of(dtype, precision, products, backward, widest)
    c = max(8, _power_of_two(columns))
    n = min(limits.keys, 2 * m) if backward else limits.keys  # of 16 queries and 64 keys, registers are spilled
    halvings = min(smaller, max(0, (n // max(16, c)).bit_length() - 1))
    n >>= halvings
    r = max(1, min(n // c, _power_of_two(rows)))
    r = max(r, 16 // c)
    if backward and rows == 1:
        r = max(r, 2)  # see `warps`
    m = _queries_a_tile(down * across, max(16, limits.most(widest, table) >> (smaller - halvings)))
    parts = -(-down * across // m)
    steps = -(-rows // r)
    warps = limits.warps
    if products == "warp" and 2 * table * block_d > 8192:  # two warps keep 128 numbers a thread of their gradients
        warps = 4
    if m == 16 and (dtype != torch.float32 or precision != "ieee"):
        warps = min(warps, 1 if widest <= 16 else 2 if widest <= 64 else 4)
    if backward:  # Triton 3.6 compiles no gather from fewer numbers than there are threads: of queries and rows
        warps = min(warps, m * _power_of_two(steps) * r // 32)
    meta = dict(
        BLOCK=options.block_size,
        HALO=options.halo_size,
        SIDE=side,
        ACROSS=across,
        STEP=options.rel_step,
        SCALE_REL=options.scale_rel,
        RING=ring,
        D=dim,
        D_V=dim_v,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        M=m,
        PARTS=parts,
        STEPS=_power_of_two(steps),
        UNROLL=steps <= 4,
        # a step's rows by halves where a thread has eight or more of all rows; fewer are spread over threads
        HALVE=steps <= 4 or m * _power_of_two(steps) * r >= 8 * 32 * warps,
        R=r,
        C=c,
        T=table,
        PRECISION=precision,
    )
    stages = 1 if smaller else limits.stages
    return Plan(meta, warps, stages, useful=down * across * rows * columns / (parts * m * steps * r * c))


def _queries_a_tile(queries: int, most: int) -> int:
    """The largest tile of at most `most` queries that wastes little, else the one that wastes least."""
    sizes = [16 << i for i in range(5) if 16 << i <= min(most, max(16, _power_of_two(queries)))]
    waste = {m: -(-queries // m) * m for m in reversed(sizes)}
    for m, padded in waste.items():
        if padded <= 1.34 * queries:
            return m
    return min(waste, key=lambda m: (waste[m], -m))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def fold_tile(heads: int, dim: int, dim_v: int, packed: bool) -> tuple[int, int, int]:
    """Pixels and channels of a program that adds up windows, and how many of them have other channels of a pixel.

    Args:
        heads: of a pixel.
        dim: channels of a head's keys.
        dim_v: of its values.
        packed: the gradients of both are slices of one tensor, and are added up as one.
    """
    parts = [heads * (dim + dim_v)] if packed else [heads * dim, heads * dim_v]
    width = max(16, min(128, _power_of_two(max(parts))))
    return 2048 // width, width, sum(-(-x // width) for x in parts)


class Launch(NamedTuple):
    """What is the same for all calls with inputs of equal shapes, strides and options."""

    plan: Plan
    meta: dict[str, Any]  # all compile-time arguments and launch options
    sizes: tuple[int, ...]  # height, width, query rows, query columns, heads
    blocks: tuple[int, int]
    tiles: int  # an image
    strides: tuple[int, ...]  # of q, k and v, over ALIGN
    options: Options
    grid: tuple[int, int]  # of the forward, but for its images
    numbers: tuple[float, ...]  # the forward's last arguments
    out: tuple[int, ...]  # shape
    saved: tuple[int, ...]  # shape of what the forward saves


@functools.lru_cache(maxsize=4096)
def prepare(
    shapes, strides, dtype, options: Options, backward: bool, precision: str, smaller: int, products: str
) -> Launch:
    """The launch for q, k and v of these shapes, strides and dtype. See `plan` for the rest."""
    (batch, height_q, width_q, heads, dim), (_, height, width, *_), (*_, dim_v) = shapes
    tiles = plan(dtype, dim, dim_v, (height, width), options, backward, precision, smaller, products)
    # a dimension of one entry may have any stride
    strides = tuple(
        tuple(0 if n == 1 else stride for n, stride in zip(shape[:4], x[:4], strict=True))
        for shape, x in zip(shapes, strides, strict=True)
    )
    align = math.gcd(16 // dtype.itemsize, *(x for xs in strides for x in xs))
    window = options.block_size + 2 * options.halo_size
    side = options.block_size // options.query_stride
    spans = [window * (abs(x[1]) + abs(x[2])) for x in strides]
    spans += [side * (width_q + 1) * heads * max(dim, dim_v), window**2 * heads * (dim + dim_v)]
    meta = dict(
        tiles.meta,
        ALIGN=align,
        WIDE=max(spans) >= 2**31,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    blocks = (-(-height // options.block_size), -(-width // options.block_size))
    sizes, steps = (height, width, height_q, width_q, heads), tuple(x // align for xs in strides for x in xs)
    per_row = blocks[1] * tiles.meta["PARTS"] * heads
    return Launch(
        plan=tiles,
        meta=meta,
        sizes=sizes,
        blocks=blocks,
        tiles=blocks[0] * per_row,
        strides=steps,
        options=options,
        grid=(per_row, blocks[0]),
        numbers=(*sizes, blocks[1], options.scale, *steps),
        out=(batch, height_q, width_q, heads, dim_v),
        saved=(batch, height_q, width_q, heads, 2),
    )


class BackwardLaunch(NamedTuple):
    """The same for the backward, and for the kernels that add up what it leaves."""

    grid: tuple[int, int, int]  # of the backward
    images: int  # a launch
    tiles: int  # an image
    numbers: tuple[float, ...]  # the backward's last arguments
    meta: dict[str, Any]
    windows: int  # numbers
    partial: tuple[int, ...]  # shape
    programs: int  # of all launches
    fold_grid: tuple[int, int]  # but for its images
    fold_numbers: tuple[int, ...]
    fold_meta: dict[str, Any]
    table_grid: tuple[int, int, int]
    table_meta: dict[str, Any]
    packed: int  # how many of the three maps' gradients are slices of one tensor


def prepare_backward(
    x: Launch, batch: int, itemsize: int, window_bytes: int, programs: int, packed: int
) -> BackwardLaunch:
    """The backward's launches.

    Args:
        x: of the backward.
        batch: images.
        itemsize: bytes of a number of q, k and v.
        window_bytes: the most that the gradients of keys and values may take while they are windows that overlap.
        programs: the most of a launch.
        packed: how many gradients are slices of one tensor: 3, 2 (of keys and values), or 0.
    """
    options, meta, (height, width, height_q, _, heads) = x.options, x.plan.meta, x.sizes
    dim, dim_v = meta["D"], meta["D_V"]
    window = options.block_size + 2 * options.halo_size
    bytes_per_image = x.tiles * window**2 * (dim + dim_v) * itemsize
    images = min(batch, max(1, window_bytes // bytes_per_image), MAX_GRID)
    tiles, launches = images * x.tiles, -(-batch // images)
    programs = min(tiles, programs)
    pixels, channels, chunks = fold_tile(heads, dim, dim_v, packed > 0)
    fold_meta = {name: meta[name] for name in ("BLOCK", "HALO", "PARTS", "D", "D_V", "PRECISION")}
    # which part a row of queries is in; of a single part every row, and nothing to compile for
    tile = ("SIDE", "ACROSS", "M")
    fold_meta |= {name: meta[name] for name in tile} if meta["PARTS"] > 1 else dict.fromkeys(tile, 1)
    fold_meta |= dict(PACKED=packed > 0, P=pixels, CHANNELS=channels, num_warps=4, enable_fp_fusion=True)
    return BackwardLaunch(
        grid=(programs, 1, 1),
        images=images,
        tiles=x.tiles,
        numbers=(*x.sizes, *x.blocks, options.scale, *x.strides),
        meta=dict(x.meta, PACKED=packed),
        windows=tiles * window**2 * (dim + dim_v),
        partial=(launches, programs, 2, meta["T"], meta["BLOCK_D"]),
        programs=launches * programs,
        fold_grid=(-(-height * width // pixels), chunks),
        fold_numbers=(height, width, height_q, heads, heads if packed == 3 else 0, *x.blocks),
        fold_meta=fold_meta,
        table_grid=(2 * window - 1, 2, 1),
        table_meta=dict(
            D=dim, BLOCK_D=meta["BLOCK_D"], T=meta["T"], PRECISION=meta["PRECISION"], num_warps=1, enable_fp_fusion=True
        ),
        packed=packed,
    )

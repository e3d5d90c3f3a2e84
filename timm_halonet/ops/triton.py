"""Halo attention as fused GPU kernels: when they can run, how they are cut into tiles, and their launch.

The kernels are in triton_kernels.py, which is imported at the first launch: Triton is no dependency of the others.
"""

import contextlib
import functools
import importlib.util
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import environment
from . import blocked
from .options import Options

# This package's choice: what the gradients of keys and values may take next to their own size while they are windows
# that overlap. Larger batches go in several launches.
WINDOW_BYTES = 256 << 20
MAX_DIM = 256
MAX_WINDOW = 256
SMALLEST = 8  # how often a tile may be halved, for GPUs that cannot hold it
MAX_GRID = 65535  # programs along the second and third dimension of a launch

_log = logging.getLogger(__name__)


def can_run_triton(q: torch.Tensor) -> str | None:
    """None, or why the Triton kernels cannot run on tensors of this device, dtype and last size."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute in float32, bfloat16 or float16, not in {q.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"the Triton kernels take at most {MAX_DIM} channels a head, not {q.shape[-1]}"
    if q.device.type == "cpu":
        return None if interpreted() else "the Triton kernels run on a GPU (or with TRITON_INTERPRET=1), not on the CPU"
    if q.device.type not in ("cuda", "xpu"):
        return f"the Triton kernels run on CUDA, ROCm and XPU devices, not on {q.device.type}"
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"the Triton kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, for debugging: by TRITON_INTERPRET=1."""
    return environment.triton_interpreted()


class Limits(NamedTuple):
    """How large a tile may be, chosen so that offline compilation shows no or few spilled registers."""

    queries: int
    keys: int
    numbers: int  # queries times channels
    table: int  # queries times rows of the table


# (precision, backward): where there are tensor cores for the products, and where there are none ("ieee" in float32)
LIMITS = {
    ("half", False): Limits(64, 128, 8192, 16384),
    ("half", True): Limits(64, 64, 4096, 8192),
    ("tf32", False): Limits(64, 64, 4096, 16384),
    ("tf32", True): Limits(64, 32, 2048, 8192),
    ("ieee", False): Limits(32, 32, 4096, 8192),
    ("ieee", True): Limits(32, 16, 4096, 8192),
}


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
    """
    side = options.block_size // options.query_stride
    window = options.block_size + 2 * options.halo_size
    ring = 0 if options.mask_border else options.halo_size
    # The largest block and window that this map has. Small maps count up to the next power of two, so that not every
    # size is compiled for.
    down, across = (min(side, _power_of_two(-(-x // options.query_stride))) for x in size)
    rows, columns = (min(window, x + 2 * ring) for x in size)
    table = max(16, _power_of_two(2 * window - 1))
    block_d, block_v = max(16, _power_of_two(dim)), max(16, _power_of_two(dim_v))
    widest = max(block_d, block_v)

    kind = "half" if dtype != torch.float32 else "ieee" if precision == "ieee" else "tf32"
    limits = LIMITS[kind, backward]
    c = max(8, _power_of_two(columns))
    n = max(16, limits.keys // (2 if widest > 64 else 1), 1)
    halvings = min(smaller, max(0, (n // max(16, c)).bit_length() - 1))
    n >>= halvings
    r = max(1, min(n // c, _power_of_two(rows)))
    r = max(r, 16 // c)
    most = max(16, min(limits.queries, limits.numbers // widest, limits.table // table) >> (smaller - halvings))
    m = _queries_a_tile(down * across, most)
    parts = -(-down * across // m)
    steps = -(-rows // r)
    if kind == "ieee":
        warps = 4
    elif m == 16:
        warps = 1 if widest <= 16 else 2 if widest <= 64 else 4
    else:
        warps = 4
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
        R=r,
        C=c,
        T=table,
        PRECISION=precision,
    )
    # Two stages overlap a tile's loads with the one before. In the backward that multiplies shared memory.
    stages = 2 if smaller == 0 and (not backward or widest == 16) else 1
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


def fold_tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program that adds up windows, for maps of that many channels in all heads."""
    width = max(16, min(128, _power_of_two(channels)))
    return 2048 // width, width


class _Launch(NamedTuple):
    """What is the same for all calls with inputs of equal shapes, strides and options."""

    plan: Plan
    meta: dict[str, Any]  # all compile-time arguments and launch options
    sizes: tuple[int, ...]  # height, width, query rows, query columns, heads
    blocks: tuple[int, int]
    tiles: int  # an image
    strides: tuple[int, ...]  # of q, k and v, over ALIGN
    options: Options


@functools.lru_cache(maxsize=4096)
def _prepare(shapes, strides, dtype, options: Options, backward: bool, precision: str, smaller: int) -> _Launch:
    (_, height_q, width_q, heads, dim), (_, height, width, *_), (*_, dim_v) = shapes
    tiles = plan(dtype, dim, dim_v, (height, width), options, backward, precision, smaller)
    # a dimension of one entry may have any stride
    strides = tuple(
        tuple(0 if n == 1 else stride for n, stride in zip(shape[:4], x[:4], strict=True))
        for shape, x in zip(shapes, strides, strict=True)
    )
    align = math.gcd(16 // dtype.itemsize, *(x for xs in strides for x in xs))
    window = options.block_size + 2 * options.halo_size
    side = options.block_size // options.query_stride
    spans = [window * (abs(x[1]) + abs(x[2])) for x in strides]
    spans.append(side * (width_q + 1) * heads * max(dim, dim_v))
    meta = dict(
        tiles.meta,
        ALIGN=align,
        WIDE=max(spans) >= 2**31,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    blocks = (-(-height // options.block_size), -(-width // options.block_size))
    return _Launch(
        plan=tiles,
        meta=meta,
        sizes=(height, width, height_q, width_q, heads),
        blocks=blocks,
        tiles=blocks[0] * blocks[1] * tiles.meta["PARTS"] * heads,
        strides=tuple(x // align for xs in strides for x in xs),
        options=options,
    )


def _prepared(q, k, v, options: Options, backward: bool, smaller: int) -> _Launch:
    precision = "ieee"  # for half precision the only one
    if q.device.type == "cpu":
        precision = "interpreted"
    elif q.dtype == torch.float32 and _tf32_allowed(q.device):
        precision = "tf32"
    shapes, strides = (q.shape, k.shape, v.shape), (q.stride(), k.stride(), v.stride())
    return _prepare(shapes, strides, q.dtype, options, backward, precision, smaller)


def _tf32_allowed(device: torch.device) -> bool:
    """As for PyTorch's own products, whichever of its settings was used: this one answers for the older ones too."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _check(q, k, v, rel_height, rel_width, options: Options) -> None:
    """A compiled graph comes here without the checks of `halo_attention`, and a kernel trusts every pointer."""
    window = options.block_size + 2 * options.halo_size
    if window > MAX_WINDOW or v.shape[4] > MAX_DIM:
        raise ValueError(
            f"the Triton kernels take windows of at most {MAX_WINDOW} pixels and {MAX_DIM} channels a head, got "
            f"{window} and {v.shape[4]}; backend='blocked' takes any"
        )
    grid = (-(-k.shape[1] // options.query_stride), -(-k.shape[2] // options.query_stride))
    if q.shape[1:3] != grid or k.shape[:4] != v.shape[:4] or q.shape[::4] != k.shape[::4] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device} but {name} is {x.dtype} on {x.device}")
    for name, x in (("rel_height", rel_height), ("rel_width", rel_width)):
        if x.device != q.device or not x.is_floating_point():
            raise ValueError(f"q is on {q.device} but {name} is {x.dtype} on {x.device}; need floating point there")
        if x.shape != (2 * window - 1, q.shape[4]):
            raise ValueError(f"{name} must be {(2 * window - 1, q.shape[4])}, got {tuple(x.shape)}")


@functools.cache
def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


@functools.cache
def _kernels():
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64  # this package's choice where nobody says


@functools.cache
def _is_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or getattr(torch, device.type).current_device() == device.index:
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs next to inputs and output: two numbers a query, see triton_kernels.py."""
    return q.new_empty((*q.shape[:4], 2), dtype=torch.float32)


# What GPUs could not hold: (which kernels, the problem) -> how often its tiles were halved, and the reason. More than
# SMALLEST: `blocked` computes it.
REFUSED: dict[tuple, tuple[int, str]] = {}


def _with_tiles_that_fit(key: tuple, run: Callable[[int], Any], otherwise: Callable[[], Any]) -> Any:
    """`run(smaller)` with the largest tiles that the GPU can hold, else `otherwise()`; says so once."""
    smaller = REFUSED[key][0] if key in REFUSED else 0
    while smaller <= SMALLEST:
        try:
            return run(smaller)
        except _out_of_resources() as error:  # when the kernel is loaded: nothing has been launched yet
            smaller += 1
            first = key not in REFUSED
            REFUSED[key] = smaller, f"{error}"
            if first:
                _log.warning("halo attention: a tile does not fit on this GPU, smaller ones are tried (%s)", error)
            if smaller > SMALLEST:
                _log.warning("halo attention: no tile fits on this GPU, backend 'blocked' computes instead (%s)", error)
    return otherwise()


def triton_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and two numbers a query for the backward, see `saved_like`. Where the GPU can hold no
        tile of the kernels, `blocked` computes the output.

    Raises:
        ValueError: sizes that the kernels do not take, tensors that do not fit together.
    """
    _check(q, k, v, rel_height, rel_width, options)
    q, k, v = _dense(q), _dense(k), _dense(v)
    rel_height, rel_width = rel_height.contiguous(), rel_width.contiguous()
    out, saved = q.new_empty(*q.shape[:4], v.shape[4]), saved_like(q)

    def run(smaller):
        x = _prepared(q, k, v, options, False, smaller)
        per_row = x.blocks[1] * x.plan.meta["PARTS"] * q.shape[3]
        with _on(q.device):
            for first in range(0, q.shape[0], MAX_GRID):
                grid = (per_row, x.blocks[0], min(MAX_GRID, q.shape[0] - first))
                _kernels().forward_kernel[grid](
                    q, k, v, rel_height, rel_width, out, saved, first, *x.sizes, x.blocks[1], options.scale,
                    *x.strides, **x.meta,
                )  # fmt: skip
        return out, saved

    def otherwise():
        return blocked.blocked_forward(q, k, v, rel_height, rel_width, options)[0], saved

    return _with_tiles_that_fit(_key("forward", q, k, v, options), run, otherwise)


def _key(name: str, q, k, v, options: Options) -> tuple:
    return name, q.device, q.dtype, q.shape[4], v.shape[4], k.shape[1:3], options


def triton_backward(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; equal inputs give equal bits."""
    _check(q, k, v, rel_height, rel_width, options)
    q, k, v = _dense(q), _dense(k), _dense(v)
    grad, out = grad.to(q.dtype).contiguous(), out.contiguous()
    tables = rel_height.contiguous(), rel_width.contiguous()

    def run(smaller):
        return _backward(grad, q, k, v, *tables, out, saved, _prepared(q, k, v, options, True, smaller))

    def otherwise():  # what it saves may be another thing than the kernels do
        again, its_own = blocked.blocked_forward(q, k, v, *tables, options)
        return blocked.blocked_backward(grad, q, k, v, *tables, again, its_own, options)

    return _with_tiles_that_fit(_key("backward", q, k, v, options), run, otherwise)


def _backward(grad, q, k, v, rel_height, rel_width, out, saved, x: _Launch):
    options, meta = x.options, x.plan.meta
    batch, heads, dim, dim_v = q.shape[0], q.shape[3], q.shape[4], v.shape[4]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_rel_h, d_rel_w = rel_height.new_empty(rel_height.shape), rel_width.new_empty(rel_width.shape)

    window = options.block_size + 2 * options.halo_size
    bytes_per_image = x.tiles * window**2 * (dim + dim_v) * q.element_size()
    images = min(batch, max(1, WINDOW_BYTES // bytes_per_image), MAX_GRID)
    tiles = images * x.tiles
    window_k, window_v = (q.new_empty(tiles * window**2 * x) for x in (dim, dim_v))
    programs = min(tiles, _programs_per_multiprocessor(x.plan.num_warps) * _multiprocessors(q.device))
    launches = -(-batch // images)
    partial = q.new_empty(launches, programs, 2, meta["T"], meta["BLOCK_D"], dtype=torch.float32)
    pixels, channels = fold_tile(heads * max(dim, dim_v))
    fold_meta = {name: meta[name] for name in ("BLOCK", "HALO", "PARTS", "D", "D_V", "PRECISION")}
    # which part a row of queries is in; of a single part every row, and nothing to compile for
    tile = ("SIDE", "ACROSS", "M")
    fold_meta |= {name: meta[name] for name in tile} if meta["PARTS"] > 1 else dict.fromkeys(tile, 1)
    height, width, height_q, *_ = x.sizes
    chunks = -(-heads * dim // channels) + -(-heads * dim_v // channels)
    kernels = _kernels()
    backward_meta = dict(x.meta, num_stages=1) if _is_blackwell(q.device) else x.meta  # with two, it spills 4 KiB there
    with _on(q.device):
        for launch, first in enumerate(range(0, batch, images)):
            count = min(images, batch - first)
            kernels.backward_kernel[(programs,)](
                q, k, v, rel_height, rel_width, out, saved, grad, dq, window_k, window_v,
                partial[launch] if launches > 1 else partial,
                count * x.tiles, first, *x.sizes, *x.blocks,
                options.scale, *x.strides, **backward_meta,
            )  # fmt: skip
            kernels.fold_kernel[(-(-height * width // pixels), chunks, count)](
                window_k, window_v, dk, dv, first, height, width, height_q, heads, *x.blocks, **fold_meta,
                P=pixels, CHANNELS=channels, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        kernels.table_kernel[(2 * window - 1, 2)](
            partial, d_rel_h, d_rel_w, launches * programs, D=dim, BLOCK_D=meta["BLOCK_D"],
            T=meta["T"], PRECISION=meta["PRECISION"], num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk, dv, d_rel_h, d_rel_w


def _programs_per_multiprocessor(num_warps: int) -> int:
    """Of the backward, whose threads take nearly 256 of a multiprocessor's 65,536 registers."""
    return max(1, 8 // num_warps)

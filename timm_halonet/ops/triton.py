"""Halo attention as fused GPU kernels: when they can run, how they are cut into tiles, and their launch.

The kernels are in triton_kernels.py, which is imported at the first launch: Triton is no dependency of the others.
"""

import contextlib
import functools
import importlib.util
from typing import Any, NamedTuple

import torch

from .. import environment
from .options import Options

# This package's choice: what the gradients of keys and values may take beside their own size while they are windows
# that overlap. Larger batches go in several launches.
WINDOW_BYTES = 256 << 20
MAX_DIM = 256
MAX_WINDOW = 256
PROGRAMS_PER_SM = 8  # of the backward, each of which keeps the tables' gradients in registers
NUM_STAGES = 2  # key tiles in flight


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


def fold_pixels(block_d: int) -> int:
    """Pixels of a program that adds up windows, for channels padded to `block_d`: as many as registers take."""
    return max(16, min(64, 2048 // block_d))


class Limits(NamedTuple):
    """How large a tile may be, chosen so that offline compilation shows no or few spilled registers."""

    queries: int
    keys: int
    numbers: int  # queries times channels
    table: int  # queries times rows of the table


# (precision, backward): where there are tensor cores for the products, and where there are none ("ieee" in float32)
LIMITS = {
    ("half", False): Limits(128, 64, 8192, 16384),
    ("half", True): Limits(128, 32, 4096, 8192),
    ("tf32", False): Limits(128, 32, 4096, 16384),
    ("tf32", True): Limits(64, 16, 2048, 8192),
    ("ieee", False): Limits(32, 32, 4096, 8192),
    ("ieee", True): Limits(32, 16, 4096, 8192),
}


class Plan(NamedTuple):
    """How a problem is cut into tiles."""

    meta: dict[str, Any]  # compile-time arguments of the kernel
    num_warps: int
    parts: int  # tiles a block


def plan(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    size: tuple[int, int],
    options: Options,
    backward: bool,
    precision: str = "ieee",
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
    """
    side = options.block_size // options.query_stride
    window = options.block_size + 2 * options.halo_size
    ring = 0 if options.mask_border else options.halo_size
    queries, keys = 1, 1
    for length in size:  # the largest block and window that this map has
        queries *= min(side, -(-length // options.query_stride))
        keys *= min(window, length + 2 * ring)
    table = _power_of_two(2 * window - 1)
    block_d, block_v = _power_of_two(dim), _power_of_two(dim_v)
    widest = max(block_d, block_v)

    kind = "half" if dtype != torch.float32 else "ieee" if precision == "ieee" else "tf32"
    limits = LIMITS[kind, backward]
    m = min(limits.queries, _power_of_two(queries), limits.numbers // widest, limits.table // table)
    m = max(16, m)
    n = min(limits.keys, _power_of_two(keys), 16 if backward and widest > 64 else 64)
    if n == 64 and (widest > 64 or -(-keys // 64) * 64 > 1.2 * keys):
        n = 32  # 196 keys are 7 x 32, but 324 are 6 x 64
    if kind == "ieee":
        warps = 4
    elif m == 16:
        warps = 1 if widest <= 16 else 2 if widest <= 64 else 4
    else:
        warps = 8 if backward and m * widest > 1024 else 4
    meta = dict(
        BLOCK=options.block_size,
        HALO=options.halo_size,
        SIDE=side,
        STEP=options.rel_step,
        RING=ring,
        D=dim,
        D_V=dim_v,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        M=m,
        N=n,
        U=_power_of_two(window),
        T=table,
        PRECISION=precision,
    )
    return Plan(meta, warps, parts=-(-queries // m))


def _power_of_two(n: int) -> int:
    """The next power of two, and at least 16, the least side of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())


class _Problem:
    """What the launches of forward and backward share."""

    def __init__(self, q, k, v, options: Options, backward: bool):
        window = options.block_size + 2 * options.halo_size
        if window > MAX_WINDOW or v.shape[4] > MAX_DIM:
            raise ValueError(
                f"the Triton kernels take windows of at most {MAX_WINDOW} pixels and {MAX_DIM} channels a head, got "
                f"{window} and {v.shape[4]}; backend='blocked' takes any"
            )
        self.height, self.width = k.shape[1:3]
        # a compiled graph comes here without the checks of `halo_attention`
        grid = tuple(-(-length // options.query_stride) for length in k.shape[1:3])
        if tuple(q.shape[1:3]) != grid or k.shape[:4] != v.shape[:4] or q.shape[::4] != k.shape[::4]:
            raise ValueError(f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        precision = "ieee"  # for half precision the only one
        if q.device.type == "cpu":
            precision = "interpreted"
        elif q.dtype == torch.float32 and _tf32_allowed(q.device):
            precision = "tf32"
        size = (self.height, self.width)
        self.plan = plan(q.dtype, q.shape[4], v.shape[4], size, options, backward, precision)
        self.blocks_h = -(-self.height // options.block_size)
        self.blocks_w = -(-self.width // options.block_size)
        self.heads = q.shape[3]
        self.tiles_per_image = self.blocks_h * self.blocks_w * self.plan.parts * self.heads
        self.sizes = (self.height, self.width, q.shape[1], q.shape[2], self.heads, self.plan.parts,
                      self.blocks_h, self.blocks_w)  # fmt: skip
        self.strides = (*q.stride()[:4], *k.stride()[:4], *v.stride()[:4])
        log2e = 1.4426950408889634
        self.scale = options.scale
        self.rel_scale = options.scale if options.scale_rel else 1.0
        self.scale_log2, self.rel_log2 = self.scale * log2e, self.rel_scale * log2e

    def launch(self) -> dict[str, Any]:
        return dict(self.plan.meta, num_warps=self.plan.num_warps, num_stages=NUM_STAGES)


def _tf32_allowed(device: torch.device) -> bool:
    """As for PyTorch's own products: by torch.set_float32_matmul_precision or torch.backends.cuda.matmul.allow_tf32."""
    return device.type == "cuda" and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest"


@functools.cache
def _kernels():
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64  # this package's choice where nobody says


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return getattr(torch, device.type).device(device) if device.type != "cpu" else contextlib.nullcontext()


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.to(q.dtype).contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs beside inputs and output: the logsumexp of each query's logits, by base 2."""
    return q.new_empty(q.shape[:4], dtype=torch.float32)


def triton_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and the base 2 logsumexp of each query's logits, (batch, query rows, query columns,
        heads) in float32.

    Raises:
        ValueError: sizes that the kernels do not take.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    problem = _Problem(q, k, v, options, backward=False)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = saved_like(q)
    with _on(q.device):
        _kernels().forward_kernel[(problem.tiles_per_image * q.shape[0],)](
            q, k, v, _table(rel_height, q), _table(rel_width, q), out, lse,
            *problem.sizes, problem.scale_log2, problem.rel_log2, *problem.strides, **problem.launch(),
        )  # fmt: skip
    return out, lse


def triton_backward(
    grad, q, k, v, rel_height, rel_width, out, lse, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; equal inputs give equal bits."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    grad, out = grad.to(q.dtype).contiguous(), out.contiguous()
    problem = _Problem(q, k, v, options, backward=True)
    meta = problem.plan.meta
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    window = (options.block_size + 2 * options.halo_size) ** 2
    bytes_per_image = problem.tiles_per_image * window * (q.shape[4] + v.shape[4]) * q.element_size()
    images = min(q.shape[0], max(1, WINDOW_BYTES // bytes_per_image))
    tiles = images * problem.tiles_per_image
    window_k = q.new_empty(tiles, window, q.shape[4])
    window_v = q.new_empty(tiles, window, v.shape[4])
    programs = min(tiles, PROGRAMS_PER_SM * _multiprocessors(q.device))
    partial = q.new_zeros(-(-q.shape[0] // images), programs, 2, meta["T"], meta["BLOCK_D"], dtype=torch.float32)
    table_h, table_w = _table(rel_height, q), _table(rel_width, q)
    pixels = fold_pixels(max(meta["BLOCK_D"], meta["BLOCK_V"]))
    groups = -(-problem.height * problem.width // pixels)
    fold_meta = {x: meta[x] for x in ("BLOCK", "HALO", "SIDE", "D", "D_V", "BLOCK_D", "BLOCK_V", "M")}
    with _on(q.device):
        for chunk, first in enumerate(range(0, q.shape[0], images)):
            s = slice(first, first + images)
            count = min(images, q.shape[0] - first)
            _kernels().backward_kernel[(programs,)](
                q[s], k[s], v[s], table_h, table_w, out[s], lse[s], grad[s], dq[s], window_k, window_v, partial[chunk],
                count * problem.tiles_per_image, *problem.sizes,
                problem.scale, problem.scale_log2, problem.rel_scale, problem.rel_log2, *problem.strides,
                **problem.launch(),
            )  # fmt: skip
            _kernels().fold_kernel[(count * groups * problem.heads,)](
                window_k, window_v, dk[s], dv[s], *problem.sizes, **fold_meta, P=pixels
            )
    d_rel = partial.sum((0, 1))[:, : rel_height.shape[0], : q.shape[4]]
    return dq, dk, dv, *(x.to(t.dtype, copy=True) for x, t in zip(d_rel, (rel_height, rel_width), strict=True))

"""Halo attention as fused GPU kernels: when they can run, how they are cut into tiles, and their launch.

The kernels are in triton_kernels.py, which is imported at the first launch: Triton is no dependency of the others.
"""

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from .. import environment
from . import blocked
from .options import Options
from .packed import gradients_like, slices_of_one
from .triton_launch import Launched, alignment_of, launch_kernel
from .triton_plan import MAX_GRID, BackwardLaunch, Launch, Plan, fold_tile, plan, prepare, prepare_backward, products_of

__all__ = ["Plan", "fold_tile", "plan"]

# This package's choice: what the gradients of keys and values may take next to their own size while they are windows
# that overlap. Larger batches go in several launches.
WINDOW_BYTES = 256 << 20
MAX_DIM = 256
MAX_WINDOW = 256
SMALLEST = 8  # how often a tile may be halved, for GPUs that cannot hold it

_log = logging.getLogger(__name__)


def can_run_triton(q: torch.Tensor) -> str | None:
    """None, or why the Triton kernels cannot run on tensors of this device, dtype and last size."""
    if not _installed():
        return "Triton is not installed"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute in float32, bfloat16 or float16, not in {q.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"the Triton kernels take at most {MAX_DIM} channels a head, not {q.shape[-1]}"
    if q.device.type == "cpu":
        return None if interpreted() else "the Triton kernels run on a GPU (or with TRITON_INTERPRET=1), not on the CPU"
    return _why_not(q.device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _why_not(device: torch.device) -> str | None:
    if device.type not in ("cuda", "xpu"):
        return f"the Triton kernels run on CUDA, ROCm and XPU devices, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, for debugging: by TRITON_INTERPRET=1."""
    return environment.triton_interpreted()


def _precision(q: torch.Tensor) -> str:
    if q.device.type == "cpu":
        return "interpreted"
    return "tf32" if q.dtype == torch.float32 and _tf32_allowed(q.device) else "ieee"  # in half precision the only one


def _prepared(q, k, v, options: Options, backward: bool, smaller: int) -> Launch:
    shapes, strides = (q.shape, k.shape, v.shape), (q.stride(), k.stride(), v.stride())
    return prepare(shapes, strides, q.dtype, options, backward, _precision(q), smaller, _products(q.device))


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
def _launch_errors() -> tuple[type[Exception], ...]:
    """That a GPU cannot hold a tile; and what a kernel that does not compile raises."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, CompilationError, PTXASError, RuntimeError


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
def _products(device: torch.device) -> str:
    """What computes a matrix product there; the interpreter, on the CPU, takes the tiles of a "warpgroup"."""
    if device.type == "cpu":
        return "warpgroup"
    if device.type != "cuda" or torch.version.hip is not None:
        return "warp"
    return products_of(torch.cuda.get_device_capability(device)[0])


_HERE = contextlib.nullcontext()


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or getattr(torch, device.type).current_device() == device.index:
        return _HERE
    return getattr(torch, device.type).device(device)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs next to inputs and output: two numbers a query, see triton_kernels.py."""
    return q.new_empty((*q.shape[:4], 2), dtype=torch.float32)


# What GPUs could not hold, or Triton not compile: (which kernels, the problem) -> how often its tiles were halved, and
# the reason. More than SMALLEST: `blocked` computes it.
REFUSED: dict[tuple, tuple[int, str]] = {}
# All that checks and launches depend on -> the launch with the largest tiles, the key in REFUSED, and the kernels that
# were launched. Python would take longer than the kernels for small maps if it worked that out at every call.
_CALLS: dict[tuple, tuple[Any, tuple, Launched]] = {}
MOST_CALLS = 4096
_Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


PACKED = 2  # in place of True: a backward whose gradients may be slices of one tensor


def _call(q, k, v, rel_height, rel_width, options: Options, backward: int) -> tuple[_Five, Any, tuple, Launched]:
    """The tensors as the kernels take them, and what `_CALLS` holds of them. Checked once for each kind of call.

    Raises:
        ValueError: sizes that the kernels do not take, tensors that do not fit together.
    """
    key = (
        backward, options, q.device, k.device, v.device, rel_height.device, rel_width.device,
        q.dtype, k.dtype, v.dtype, rel_height.dtype, rel_width.dtype,
        q.shape, k.shape, v.shape, rel_height.shape, rel_width.shape,
        q.stride(), k.stride(), v.stride(), rel_height.stride(), rel_width.stride(), _precision(q),
    )  # fmt: skip
    known = _CALLS.get(key)
    if known is not None:
        return (q, k, v, rel_height, rel_width), *known
    _check(q, k, v, rel_height, rel_width, options)
    tensors = _dense(q), _dense(k), _dense(v), rel_height.contiguous(), rel_width.contiguous()
    launch: Any = _prepared(*tensors[:3], options, bool(backward), 0)
    if backward:
        launch = _prepared_backward(launch, *tensors[:3], packed=backward == PACKED)
    what = "backward" if backward else "forward", q.device, q.dtype, q.shape[4], v.shape[4], k.shape[1:3], options
    launched: Launched = {}
    if all(x is y for x, y in zip(tensors, (q, k, v, rel_height, rel_width), strict=True)):
        if len(_CALLS) >= MOST_CALLS:
            _CALLS.clear()
        _CALLS[key] = launch, what, launched
    return tensors, launch, what, launched


def _prepared_backward(launch: Launch, q, k, v, packed: bool) -> BackwardLaunch:
    programs = _programs_per_multiprocessor(launch.plan.num_warps) * _multiprocessors(q.device)
    slices = slices_of_one(q, k, v) if packed else 0
    if slices == 3 and gradients_like(q, k, v, 3)[0].stride() != q.stride():
        slices = 2  # the kernel takes the strides of q for those of its gradient
    return prepare_backward(launch, q.shape[0], q.element_size(), WINDOW_BYTES, programs, slices)


def _with_tiles_that_fit(
    what: tuple, launch: Any, smaller_launch: Callable[[int], Any], run: Callable[[Any, int], Any], otherwise: Callable
) -> Any:
    """`run(launch, smaller)` with the largest tiles that the GPU can hold, else `otherwise()`; says so once.

    Triton compiles a kernel, and loads it, at its first launch: where that fails, nothing has been launched yet.
    """
    smaller = REFUSED[what][0] if what in REFUSED else 0
    while smaller <= SMALLEST:
        try:
            return run(smaller_launch(smaller) if smaller else launch, smaller)
        except _launch_errors() as error:
            if isinstance(error, RuntimeError) and not f"{error}".startswith("PassManager"):
                raise  # a fault of the GPU, say
            if not isinstance(error, _launch_errors()[0]):
                smaller = SMALLEST
            smaller += 1
            first = what not in REFUSED
            REFUSED[what] = smaller, f"{error}"
            if smaller > SMALLEST:
                _log.warning("halo attention: no kernel for this GPU, backend 'blocked' computes instead (%s)", error)
            elif first:
                _log.warning("halo attention: a tile does not fit on this GPU, smaller ones are tried (%s)", error)
    return otherwise()


def triton_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and two numbers a query for the backward, see `saved_like`. Where the GPU can hold no
        tile of the kernels, `blocked` computes the output.

    Raises:
        ValueError: sizes that the kernels do not take, tensors that do not fit together.
    """
    out, _, saved = triton_forward_keeping(q, k, v, rel_height, rel_width, options, False)
    return out, saved


def triton_forward_keeping(
    q, k, v, rel_height, rel_width, options: Options, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_forward`; between its two results a copy of the output for the backward, empty unless `keep`."""
    inputs, launch, what, known = _call(q, k, v, rel_height, rel_width, options, False)
    q, k, v, rel_height, rel_width = inputs
    out, saved = q.new_empty(launch.out), q.new_empty(launch.saved, dtype=torch.float32)
    kept = q.new_empty(launch.out if keep else 0)
    to = kept if keep else out  # a pointer of the same kind, or there would be more to compile

    def run(x: Launch, smaller: int):
        batch, kernel, meta = x.out[0], _kernels().forward_kernel, x.meta | {"KEEP": keep}
        same = smaller, keep, *alignment_of(*inputs)
        with _on(q.device):
            for first in range(0, batch, MAX_GRID):
                grid = *x.grid, min(MAX_GRID, batch - first)
                launch_kernel(kernel, grid, (*inputs, out, to, saved, first, *x.numbers), meta, known, same)
        return out, kept, saved

    def smaller_launch(smaller: int):
        return _prepared(q, k, v, options, False, smaller)

    def otherwise():
        out = blocked.blocked_forward(q, k, v, rel_height, rel_width, options)[0]
        return out, out.clone() if keep else kept, saved

    return _with_tiles_that_fit(what, launch, smaller_launch, run, otherwise)


def triton_backward(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; equal inputs give equal bits."""
    return _backward(grad, q, k, v, rel_height, rel_width, out, saved, options, True)


def triton_backward_packed(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_backward`; where q, k and v, or k and v, are slices of one tensor, so are their gradients."""
    return _backward(grad, q, k, v, rel_height, rel_width, out, saved, options, PACKED)


def _backward(grad, q, k, v, rel_height, rel_width, out, saved, options: Options, how: int):
    inputs, launch, what, known = _call(q, k, v, rel_height, rel_width, options, how)
    q, k, v, rel_height, rel_width = inputs
    tables = rel_height, rel_width
    grad, out = grad.to(q.dtype).contiguous(), out.contiguous()

    def run(x: BackwardLaunch, smaller: int):
        return _launched(grad, inputs, out, saved, x, known, smaller)

    def smaller_launch(smaller: int):
        return _prepared_backward(_prepared(q, k, v, options, True, smaller), q, k, v, how == PACKED)

    def otherwise():  # what it saves may be another thing than the kernels do
        again, its_own = blocked.blocked_forward(q, k, v, *tables, options)
        return blocked.blocked_backward(grad, q, k, v, *tables, again, its_own, options)

    return _with_tiles_that_fit(what, launch, smaller_launch, run, otherwise)


def _launched(grad, inputs: _Five, out, saved, x: BackwardLaunch, known: Launched, smaller: int) -> _Five:
    q, k, v, rel_height, rel_width = inputs
    dq, dk, dv = gradients_like(q, k, v, x.packed)
    d_rel_h, d_rel_w = rel_height.new_empty(rel_height.shape), rel_width.new_empty(rel_width.shape)
    windows = q.new_empty(x.windows)
    partial = q.new_empty(x.partial, dtype=torch.float32)
    kernels, batch = _kernels(), q.shape[0]
    backward = "backward", smaller, *alignment_of(*inputs, out, saved, grad)
    with _on(q.device):
        for i, first in enumerate(range(0, batch, x.images)):
            count = min(x.images, batch - first)
            share = partial[i] if x.partial[0] > 1 else partial
            args = *inputs, out, saved, grad, dq, windows, share, count * x.tiles, first, *x.numbers
            launch_kernel(kernels.backward_kernel, x.grid, args, x.meta, known, backward)
            args = windows, dk, dv, first, *x.fold_numbers
            launch_kernel(kernels.fold_kernel, (*x.fold_grid, count), args, x.fold_meta, known, ("fold", smaller))
        args = partial, d_rel_h, d_rel_w, x.programs
        launch_kernel(kernels.table_kernel, x.table_grid, args, x.table_meta, known, ("table", smaller))
    return dq, dk, dv, d_rel_h, d_rel_w


def _programs_per_multiprocessor(num_warps: int) -> int:
    """Of the backward, whose threads take nearly 256 of a multiprocessor's 65,536 registers."""
    return max(1, 8 // num_warps)

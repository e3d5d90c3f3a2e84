"""The backends of halo attention, and the choice of the one that runs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

from .. import environment
from . import blocked, native, triton
from .custom_op import as_custom_op
from .export import halo_attention_export
from .packed import in_torch_export
from .reference import halo_attention_reference


def can_run_reference(q: torch.Tensor) -> str | None:
    """None, or why the reference cannot run on such tensors: it always can."""
    return None


# name -> (function, predicate), in order of preference
BACKENDS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], str | None]]] = {
    "native": (
        as_custom_op(
            "native",
            native.native_forward,
            native.native_backward,
            native.saved_like,
            backward_views=native.native_backward_packed,
        ),
        native.can_run_native,
    ),
    "triton": (
        as_custom_op(
            "triton",
            triton.triton_forward_keeping,
            triton.triton_backward,
            triton.saved_like,
            needs_output=True,
            backward_views=triton.triton_backward_packed,
        ),
        triton.can_run_triton,
    ),
    "blocked": (
        as_custom_op("blocked", blocked.blocked_forward, blocked.blocked_backward, blocked.saved_like),
        blocked.can_run_blocked,
    ),
    "reference": (halo_attention_reference, can_run_reference),
}
# not one of the backends to choose from: what exporters and tracers get
EXPORT = "export"
LEAST_OPSET = 12  # of ONNX: Clip takes integers, which positions in a map of any size are
_context: ContextVar[str | None] = ContextVar("timm_halonet_backend", default=None)


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Halo attention runs on this backend inside `with use_backend("reference"):`.

    The `backend` argument of `halo_attention` outranks it, and it outranks the environment variable
    TIMM_HALONET_BACKEND. Inner ones outrank outer ones. It holds for the thread or asyncio task that entered it, not
    for threads that start inside; among those are the ones in which autograd runs a checkpointed forward again on a
    GPU. A compiled function is compiled again for another backend; enter it outside of what is compiled.

    Args:
        name: of a backend, a key of `timm_halonet.ops.BACKENDS`; None for what there would be without any.

    Raises:
        ValueError: at once, if the backend does not exist. Attention that it cannot run raises one inside the block.
    """
    if name is not None:
        _check_name(name)
    return _entered(name)


@contextmanager
def _entered(name: str | None) -> Iterator[None]:
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown halo attention backend {name!r}; there are {', '.join(BACKENDS)}")


def backend_for(q: torch.Tensor, backend: str | None = None, dim_v: int = 0) -> str:
    """The name of the backend that runs for queries like `q` (its device, dtype and last size count).

    Args:
        q: queries, as in `halo_attention`.
        backend: force this one; else `use_backend` does; else the environment variable TIMM_HALONET_BACKEND; else the
            first that can run.
        dim_v: value channels of a head, where there are more than of queries.

    Returns:
        A key of `BACKENDS`; or "export" for exporters and tracers, which need plain operators, whatever is forced but
        the reference. torch.export inside `use_backend`, but for ONNX, gets that backend: its op stays in the program.
        A strict torch.export gets the reference.

    Raises:
        ValueError: the forced backend does not exist or cannot run, with the reason; or PyTorch's older ONNX exporter
            is asked for an opset that is too old for the export form.
    """
    if in_torch_export() and torch.compiler.is_dynamo_compiling():
        return "reference"  # a strict export: dynamo cannot look into the other, nor, in PyTorch 2.11, into `_context`
    forced = backend or _context.get() or environment.backend()
    if forced is not None:
        _check_name(forced)
    if is_exporting():
        if forced == "reference":
            return "reference"
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            _check_opset()
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or _context.get() is None:
            return EXPORT
    dim = max(q.shape[-1], dim_v)
    if torch.compiler.is_compiling():  # a constant, where the size may be a symbol
        dim = triton.MAX_DIM + 1 if dim > triton.MAX_DIM else 1
        name, reason = _choose(q.device.type, q.dtype, dim, forced)
    else:
        name, reason = _first(q if dim == q.shape[-1] else q.new_empty(0, dim), forced)
    if reason is not None:
        raise ValueError(f"halo attention backend {forced!r} cannot run here: {reason}")
    return name


def _check_opset() -> None:
    try:
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS
    except ImportError:  # elsewhere in this PyTorch, which then has its own words
        return
    opset = GLOBALS.export_onnx_opset_version
    if opset < LEAST_OPSET:
        raise ValueError(f"opset_version={opset} is too old for halo attention, which needs {LEAST_OPSET} or newer")


def exports(like: torch.Tensor) -> bool:
    """Whether an exporter or a tracer is at work and gets the export form of attention."""
    return is_exporting() and backend_for(like) == EXPORT


def is_exporting() -> bool:
    """Whether an exporter or a tracer is at work."""
    return in_torch_export() or torch.jit.is_tracing()


def implementation(name: str) -> Callable[..., torch.Tensor]:
    """(q, k, v, rel_height, rel_width, Options) -> output, for a name from `backend_for`."""
    return halo_attention_export if name == EXPORT else BACKENDS[name][0]


@torch.compiler.assume_constant_result  # torch.compile must not look into predicates that, say, run a compiler
def _choose(device: str, dtype: torch.dtype, dim: int, forced: str | None) -> tuple[str, str | None]:
    """The name of the first backend that can run, and None; or the forced one's, and why it cannot."""
    return _first(torch.empty(0, dim, device=device, dtype=dtype), forced)


def _first(like: torch.Tensor, forced: str | None) -> tuple[str, str | None]:
    if forced is not None:
        return forced, BACKENDS[forced][1](like)
    return next(name for name, (_, can_run) in BACKENDS.items() if can_run(like) is None), None

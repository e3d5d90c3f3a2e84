"""A backend's forward and backward as `torch.library` custom ops, so that torch.compile and autograd see one node."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from . import counting
from .options import Options, check_options, check_shapes
from .packed import slices_of, slices_of_one, whole_of

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_OPTIONS = (
    "int block_size, int halo_size, int query_stride, float scale, bool scale_rel, bool mask_border, int rel_step"
)
_ELSE = (
    "halo attention is differentiable once, and in reverse mode; for the rest there is"
    " backend='reference' as an argument of the op, the layer or timm.create_model, `with use_backend('reference'):`"
    " around the forward or, in the environment, TIMM_HALONET_BACKEND=reference"
)
_is_batched = torch._C._functorch.is_legacy_batchedtensor
Forward = Callable[..., tuple[torch.Tensor, ...]]
Backward = Callable[..., tuple[torch.Tensor, ...]]


def as_custom_op(
    name: str,
    forward: Forward,
    backward: Backward,
    saved_like: Callable[[torch.Tensor], torch.Tensor],
    needs_output: bool = False,
    backward_views: Backward | None = None,
) -> Callable[..., torch.Tensor]:
    """Registers `timm_halonet::halo_attention_NAME` and `..._NAME_backward`.

    The output belongs to the caller, who may write into it: the backward never reads it. Where `backward` needs it,
    gradients cost a private copy of it: it is written a second time, and takes memory until the backward.

    Args:
        name: of the backend.
        forward: (q, k, v, rel_height, rel_width, Options) -> the output, and a tensor for the backward.
        backward: (grad, q, k, v, rel_height, rel_width, output, saved tensor, Options) -> the five gradients. The
            output is an empty tensor unless `needs_output`.
        saved_like: q -> an empty tensor of the saved tensor's shape and dtype, for tracing.
        needs_output: whether `backward` reads the output. `forward` then has one more argument, whether to keep it, and
            returns that copy (or an empty tensor) between the two.
        backward_views: `backward` where the gradients may share memory, which those of an op may not; None for
            `backward` itself.

    Returns:
        A function (q, k, v, rel_height, rel_width, Options) -> output, differentiable once in all five. Under
        torch.vmap the extra dimension joins the batch, where the tables have none.

    Raises (the function):
        RuntimeError: for second derivatives, forward-mode derivatives, and torch.func.grad and its like.
    """
    qualified = f"timm_halonet::halo_attention_{name}"
    backward_sharing = backward_views or backward

    def attended(tensors, options, grads: bool):
        """Output, what the backward gets of it (a copy that nobody writes into, or an empty tensor), saved tensor."""
        if needs_output:
            return forward(*tensors, options, grads)
        out, saved = forward(*tensors, options)
        return out, out.new_empty(0), saved

    # a compiled graph comes to these two past the checks of `halo_attention`
    def run_forward(*args):
        (q, k, v, rel_height, rel_width), options = _resolved(args[:5]), _options_of(args)
        check_options(options)
        check_shapes(q, k, v, rel_height, rel_width, options)
        return attended((q, k, v, rel_height, rel_width), options, _grads_of(args))

    def run_backward(*args):
        tensors, options = checked_backward(args)
        return backward(*tensors, options)

    def run_backward_packed(*args):
        tensors, options = checked_backward(args)
        dq, dk, dv, *tables = backward_sharing(*tensors, options)
        return whole_of(dq, dk, dv), *tables

    def checked_backward(args):
        (grad, q, k, v, rel_height, rel_width, out, saved), options = _resolved(args[:8]), Options(*args[8:])
        check_options(options)
        check_shapes(q, k, v, rel_height, rel_width, options)
        shape = (*q.shape[:4], v.shape[4])
        if (grad.shape, grad.device) != (shape, q.device):
            raise ValueError(f"the gradient of the output must be {shape}, got {tuple(grad.shape)}")
        if needs_output and out.shape != shape:
            raise ValueError(f"the kept output must be {shape}, got {tuple(out.shape)}")
        return (grad, q, k, v, rel_height, rel_width, out, saved), options

    forward_op = torch.library.custom_op(
        qualified,
        run_forward,
        mutates_args=(),
        schema=f"({_INPUTS}, {_OPTIONS}, bool grads=True) -> (Tensor, Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"{qualified}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor saved, {_OPTIONS}) -> ({', '.join(['Tensor'] * 5)})",
    )

    @forward_op.register_fake
    def _(*args):
        q, _, v = args[:3]
        out = q.new_empty(*q.shape[:4], v.shape[4])
        return out, torch.empty_like(out) if needs_output and _grads_of(args) else out.new_empty(0), saved_like(q)

    @backward_op.register_fake
    def _(grad, q, k, v, rel_height, rel_width, *_):
        return tuple(x.new_empty(x.shape) for x in (q, k, v, rel_height, rel_width))

    # where q, k and v are slices of one tensor, their gradients are one tensor: outputs of an op may not share memory
    backward_packed_op = torch.library.custom_op(
        f"{qualified}_backward_packed",
        run_backward_packed,
        mutates_args=(),
        schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor saved, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    )

    @backward_packed_op.register_fake
    def _(grad, q, k, v, rel_height, rel_width, *_):
        channels = k.shape[3] * (2 * k.shape[4] + v.shape[4])
        tables = (x.new_empty(x.shape) for x in (rel_height, rel_width))
        return k.new_empty((*k.shape[:3], channels)), *tables

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], *output[1:])
        ctx.options = _options_of(inputs)

    def differentiate(ctx, grad, *_):
        (q, k, v, *_), nothing = ctx.saved_tensors, [None] * (len(ctx.options) + 1)
        if _is_traced(grad) and slices_of_one(q, k, v) == 3:
            whole, *tables = backward_packed_op(grad, *ctx.saved_tensors, *ctx.options)
            return *slices_of(whole, k.shape[3], k.shape[4], True), *tables, *nothing
        return *backward_op(grad, *ctx.saved_tensors, *ctx.options), *nothing

    def refuse(ctx, *grads):
        raise RuntimeError(f"second derivative: {_ELSE}")

    forward_op.register_autograd(differentiate, setup_context=save)
    backward_op.register_autograd(refuse)
    forward_op.register_vmap(_fold_into_batch(forward_op))
    backward_op.register_vmap(_one_by_one(backward_op))
    counting.register(f"halo_attention_{name}")

    class Eager(torch.autograd.Function):
        """The same without PyTorch's dispatch of custom ops, which takes longer than a small map's attention."""

        @staticmethod
        def forward(ctx, q, k, v, rel_height, rel_width, options):
            tensors = (q, k, v, rel_height, rel_width)
            out, *rest = attended(tensors, options, any(ctx.needs_input_grad))
            ctx.save_for_backward(*tensors, *rest)
            ctx.options = options
            return out

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled() or not _plain((grad,)):  # create_graph, batched gradients: the op knows how
                return *backward_op(grad, *ctx.saved_tensors, *ctx.options), None
            return *backward_sharing(*_resolved((grad,)), *ctx.saved_tensors, ctx.options), None

    def attend(q, k, v, rel_height, rel_width, options):
        tensors = (q, k, v, rel_height, rel_width)
        grads = needs_output and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if torch.compiler.is_compiling():
            return forward_op(*tensors, *options, grads)[0]
        # PyTorch drops the tangents of a custom op without a word
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(f"forward-mode derivative: {_ELSE}")
        if _plain(tensors):
            plain = _resolved(tensors)
            return Eager.apply(*plain, options) if torch.is_grad_enabled() else attended(plain, options, False)[0]
        try:
            return forward_op(*tensors, *options, grads)[0]
        except RuntimeError as error:
            if "functorch" in str(error):  # PyTorch's words are about how the op is written
                raise RuntimeError(f"torch.func.grad, or another transform that differentiates: {_ELSE}") from None
            raise

    return attend


def _options_of(args) -> Options:
    """Among all arguments of the forward's op."""
    return Options(*args[5 : 5 + len(Options._fields)])


def _grads_of(args) -> bool:
    """Its last argument, which is left out where it has its default."""
    return args[-1] if len(args) > 5 + len(Options._fields) else True


def _resolved(tensors) -> list[torch.Tensor]:
    """The tensors with their values in memory: kernels read it, and know of no negative views and lazy zeros."""
    return [x.clone() if x._is_zerotensor() else x.resolve_neg() if x.is_neg() else x for x in tensors]


def _plain(tensors) -> bool:
    """Whether nothing looks on that must see the op: no fake or distributed tensors, tracers, counters, profilers."""
    for x in tensors:  # a loop takes half the time of all(...), and this is done at every call
        kind = type(x)
        if (kind is not torch.Tensor and kind is not torch.nn.Parameter) or x.is_meta or _is_batched(x):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._autograd._profiler_enabled()  # a row of the op's name
    )


def _is_traced(grad: torch.Tensor) -> bool:
    """Whether torch.compile makes a graph of this backward, and nothing else looks on."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not _is_batched(grad)
    )


def _one_by_one(op):
    """A rule for torch.vmap that is always right: a call for each entry of the extra dimension."""

    def rule(info, dims, *args):
        calls = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(x) for x in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _fold_into_batch(op):
    """A rule for torch.vmap: one call with the extra dimension in the batch, unless the tables have it too."""
    slow = _one_by_one(op)

    def rule(info, dims, *args):
        if any(dim is not None for dim in dims[3:]):
            return slow(info, dims, *args)
        n = info.batch_size
        maps = [
            (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(args[:3], dims[:3], strict=True)
        ]
        outputs = op(*maps, *args[3:])
        # not unflatten: what is saved may be empty
        return tuple(x.reshape(n, x.shape[0] // n, *x.shape[1:]) for x in outputs), (0,) * len(outputs)

    return rule

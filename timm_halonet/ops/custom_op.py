"""A backend's forward and backward as `torch.library` custom ops, so that torch.compile and autograd see one node."""

from collections.abc import Callable

import torch

from .options import Options

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_OPTIONS = (
    "int block_size, int halo_size, int query_stride, float scale, bool scale_rel, bool mask_border, int rel_step"
)
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, ...]]


def as_custom_op(
    name: str, forward: Forward, backward: Backward, saved_like: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Registers `timm_halonet::halo_attention_NAME` and `..._NAME_backward`.

    Args:
        name: of the backend.
        forward: (q, k, v, rel_height, rel_width, Options) -> the output, and a tensor for the backward.
        backward: (grad, q, k, v, rel_height, rel_width, output, saved tensor, Options) -> the five gradients.
        saved_like: q -> an empty tensor of the saved tensor's shape and dtype, for tracing.

    Returns:
        A function (q, k, v, rel_height, rel_width, Options) -> output, differentiable once in all five.
    """
    qualified = f"timm_halonet::halo_attention_{name}"

    def run_forward(q, k, v, rel_height, rel_width, *options):
        return forward(q, k, v, rel_height, rel_width, Options(*options))

    def run_backward(grad, q, k, v, rel_height, rel_width, out, saved, *options):
        return backward(grad, q, k, v, rel_height, rel_width, out, saved, Options(*options))

    forward_op = torch.library.custom_op(
        qualified, run_forward, mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)"
    )
    backward_op = torch.library.custom_op(
        f"{qualified}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor saved, {_OPTIONS}) -> ({', '.join(['Tensor'] * 5)})",
    )

    @forward_op.register_fake
    def _(q, k, v, *_):
        return q.new_empty(*q.shape[:4], v.shape[4]), saved_like(q)

    @backward_op.register_fake
    def _(grad, q, k, v, rel_height, rel_width, *_):
        return tuple(x.new_empty(x.shape) for x in (q, k, v, rel_height, rel_width))

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.options = inputs[5:]

    def differentiate(ctx, grad, _):
        return *backward_op(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)

    forward_op.register_autograd(differentiate, setup_context=save)

    def attend(q, k, v, rel_height, rel_width, options):
        return forward_op(q, k, v, rel_height, rel_width, *options)[0]

    return attend

"""The stem's pooling, which stays one op under torch.compile in training on a CPU."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.dispatch import is_exporting


@torch.library.custom_op("timm_halonet::max_pool2d", mutates_args=())
def _pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(x, [kernel] * 2, [stride] * 2, [padding] * 2)


@torch.library.custom_op("timm_halonet::max_pool2d_backward", mutates_args=())
def _pool_backward(
    grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    sizes = [kernel] * 2, [stride] * 2, [padding] * 2
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *sizes, [1, 1], False, index)


_pool.register_fake(lambda x, *args: torch.ops.aten.max_pool2d_with_indices(x, *([n] * 2 for n in args)))
_pool_backward.register_fake(lambda grad, x, *_: torch.empty_like(x))


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)
    ctx.sizes = inputs[1:]


def _differentiate(ctx, grad, _):
    return (None if grad is None else _pool_backward(grad, *ctx.saved_tensors, *ctx.sizes)), None, None, None


_pool.register_autograd(_differentiate, setup_context=_save)


class MaxPool2d(nn.MaxPool2d):
    """torch's, of a square window.

    In training on a CPU torch.compile takes PyTorch's own kernels for it: inductor of PyTorch 2.14 adds up the gradient
    in a map whose channels come first, and copies it back. Exporters, scripts and everything else get torch's
    `max_pool2d`.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int = 0):
        super().__init__(kernel_size, stride, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
        else:
            return self._forward(x)

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        compiles = torch.compiler.is_compiling() and not is_exporting()
        if compiles and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad:
            return _pool(x, self.kernel_size, self.stride, self.padding)[0]
        return super().forward(x)

"""Keys and values as slices of one tensor, as a layer projects them; and their gradients as slices of one too."""

import torch


def split_keys_and_values(kv: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv` (..., dim + dim_v) as views (..., dim) and (..., dim_v).

    On a GPU their gradients are put together without a copy where they are slices of one tensor, as the Triton kernels
    write them. Second derivatives are those of `kv.split`.
    """
    if torch.compiler.is_compiling() or not _pays(kv):
        return kv.split([dim, kv.shape[-1] - dim], dim=-1)
    return _Split.apply(kv, dim)


def _pays(kv: torch.Tensor) -> bool:
    return (
        type(kv) is torch.Tensor  # not a proxy of torch.fx, whose other attributes have no truth value
        and kv.device.type not in ("cpu", "meta")
        and kv.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kv[..., :dim], kv[..., dim:]

    @staticmethod
    def backward(ctx, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _whole_of(dk, dv), None


def _whole_of(dk: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
    """Both side by side: the tensor that they are the two slices of, or a new one."""
    whole, dim = dk._base, dk.shape[-1]
    if (
        whole is not None
        and whole is dv._base
        and whole.shape == (*dk.shape[:-1], dim + dv.shape[-1])
        and dk.stride() == whole.stride() == dv.stride()
        and (dk.storage_offset(), dv.storage_offset()) == (whole.storage_offset(), whole.storage_offset() + dim)
        and whole.stride(-1) == 1
        and not torch.is_grad_enabled()
    ):
        return whole
    return torch.cat([dk, dv], dim=-1)

"""Queries, keys and values as slices of one tensor, as a layer projects them; and so their gradients."""

import torch
from torch.autograd import forward_ad


def split_keys_and_values(kv: torch.Tensor, heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Views (batch, H, W, heads, dim) and (batch, H, W, heads, dim_v) of a map that has both of each head together.

    Their gradients are put together without a copy where they are slices of one tensor, as the kernels write them.
    Second derivatives are those of ordinary slices.

    Args:
        kv: (batch, H, W, heads * (dim + dim_v)).
        heads: their number.
        dim: key channels of a head.
    """
    return _split(kv, heads, dim, False)


def split_queries_keys_and_values(qkv: torch.Tensor, heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """The same for (batch, H, W, heads * (2 * dim + dim_v)), all queries first: views of queries, keys and values."""
    return _split(qkv, heads, dim, True)


def _split(x: torch.Tensor, heads: int, dim: int, queries: bool) -> tuple[torch.Tensor, ...]:
    if torch.compiler.is_compiling():
        joins = queries and x.requires_grad and torch.is_grad_enabled() and type(x) is torch.Tensor
        split = _split_in_graph if joins and not in_torch_export() else slices_of
    else:
        split = _Split.apply if _pays(x) else slices_of
    return split(x, heads, dim, queries)


@torch.compiler.allow_in_graph  # dynamo would trace the backward apart, where nothing says what the gradients are of
def _split_in_graph(x: torch.Tensor, heads: int, dim: int, queries: bool) -> tuple[torch.Tensor, ...]:
    return _Split.apply(x, heads, dim, queries)


@torch.compiler.assume_constant_result  # torch.compile in PyTorch 2.11 takes it for true wherever it meets it
def in_torch_export() -> bool:
    """Whether torch.export, or what builds on it, is at work."""
    return torch.compiler.is_exporting()


def _pays(x: torch.Tensor) -> bool:
    return (
        type(x) is torch.Tensor  # not a proxy of torch.fx, whose other attributes have no truth value
        and x.device.type != "meta"
        and x.requires_grad
        and torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def slices_of(x: torch.Tensor, heads: int, dim: int, queries: bool) -> tuple[torch.Tensor, ...]:
    """Views of keys and values, or of queries, keys and values, of a map that has them; by ordinary slices."""
    if queries:
        q, x = x.split([heads * dim, x.shape[3] - heads * dim], dim=-1)
        return _heads(q, heads), *slices_of(x, heads, dim, False)
    kv = _heads(x, heads)
    return kv.split([dim, kv.shape[4] - dim], dim=-1)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    # not x.unflatten: traced for ONNX, it fixes H and W
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], heads, x.shape[3] // heads)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, heads: int, dim: int, queries: bool) -> tuple[torch.Tensor, ...]:
        return slices_of(x, heads, dim, queries)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return whole_of(*grads), None, None, None


def whole_of(*parts: torch.Tensor) -> torch.Tensor:
    """The map whose slices are given: the tensor that they are slices of, or a new one."""
    *queries, k, v = parts
    heads, dim, dim_v = k.shape[3], k.shape[4], v.shape[4]
    whole, channels = k._base, heads * (dim * (1 + len(queries)) + dim_v)
    if (
        whole is not None
        and all(x._base is whole for x in parts)
        and whole.shape == (*k.shape[:3], channels)
        and whole.is_contiguous()
        and not torch.is_grad_enabled()
    ):
        slices = slices_of(whole, heads, dim, bool(queries))
        if all(_where(x) == _where(y) for x, y in zip(parts, slices, strict=True)):
            return whole
    # not flatten, which has no rule for gradients in a batch
    kv = torch.cat([k, v], -1).reshape(*k.shape[:3], heads * (dim + dim_v))
    return torch.cat([queries[0].reshape(*k.shape[:3], heads * dim), kv], -1) if queries else kv


def _where(x: torch.Tensor) -> tuple:
    return x.shape, x.stride(), x.storage_offset()


def slices_of_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many of them are slices of one tensor, as their strides tell: 3, 2 (keys and values), or 0."""
    if k.stride() != v.stride() or k.stride(3) != (k.shape[4] + v.shape[4]) * k.stride(4):
        return 0
    with_queries = (
        q.shape[:4] == k.shape[:4] and q.stride()[:3] == k.stride()[:3] and q.stride(3) == q.shape[4] * q.stride(4)
    )
    return 3 if with_queries else 2


def gradients_like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: int) -> tuple[torch.Tensor, ...]:
    """Empty tensors of their shapes: as many of them slices of one as `slices_of_one` says, the others contiguous."""
    if not packed:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    heads, dim, dim_v = k.shape[3], k.shape[4], v.shape[4]
    if packed == 3:
        return slices_of(k.new_empty((*k.shape[:3], heads * (2 * dim + dim_v))), heads, dim, True)
    return q.new_empty(q.shape), *slices_of(k.new_empty((*k.shape[:3], heads * (dim + dim_v))), heads, dim, False)

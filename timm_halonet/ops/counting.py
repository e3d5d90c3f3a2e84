"""Floating-point operations of halo attention, for `torch.utils.flop_counter.FlopCounterMode` and what builds on it."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .options import Options


def flops(q_shape: Any, k_shape: Any, v_shape: Any, options: Options) -> int:
    """Floating-point operations of one forward, two a multiply-add, as the reference's operators do them.

    Counted over full blocks and windows, also where they reach beyond the map: the products of queries with keys, with
    both tables of relative positions, and of the weights with the values. The softmax is not counted.

    Args:
        q_shape: (batch, query rows, query columns, heads, d_qk).
        k_shape: (batch, H, W, heads, d_qk).
        v_shape: (batch, H, W, heads, d_v).
        options: of the op.
    """
    batch, height, width, heads, dim = k_shape
    block, halo, stride = options[:3]
    window = block + 2 * halo
    queries = batch * heads * -(-height // block) * -(-width // block) * (block // stride) ** 2
    return 2 * queries * (window**2 * (dim + v_shape[4]) + 2 * window * dim)


def register(name: str) -> None:
    """Tells PyTorch's counter what the ops `timm_halonet::NAME`, `NAME_backward` and `NAME_backward_packed` cost.

    The backward counts two products for each of the forward's, not what is computed again.
    """
    ops = torch.ops.timm_halonet

    @register_flop_formula(getattr(ops, name))
    def _(q, k, v, rel_height, rel_width, *options, out_shape=None, **kwargs) -> int:
        return flops(q, k, v, Options(*options[: len(Options._fields)]))

    @register_flop_formula([getattr(ops, f"{name}_backward"), getattr(ops, f"{name}_backward_packed")])
    def _(grad, q, k, v, rel_height, rel_width, out, saved, *options, out_shape=None, **kwargs) -> int:
        return 2 * flops(q, k, v, Options(*options))

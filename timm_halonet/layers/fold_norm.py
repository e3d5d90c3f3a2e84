"""Batch norm as it is in evaluation, as a part of the weights before it: for `timm.utils.reparameterize_model`."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .halo_attention import HaloAttention


def fold_into_conv(block: Any) -> None:
    """Make the batch norm of a timm ConvNormAct `block` a part of its convolution. Other norms stay."""
    conv, norm = block.conv, block.bn
    if type(conv) is nn.Conv2d and _is_foldable(norm):
        conv.weight, conv.bias = _folded(conv.weight, conv.bias, norm)
        block.bn = norm.act


def fold_into_values(attention: HaloAttention, norm: Any) -> nn.Module:
    """Make the batch norm that follows attention a part of its values; returns what is left of the norm.

    A query's weights sum to 1, so that a factor and a shift of every value is that of the output. Where keys outside of
    the image have weights too (`mask_border=False`), their values are 0 and not shifted: there the norm stays.

    Args:
        attention: its projection of keys and values changes.
        norm: timm's norm and activation behind it.
    """
    q, kv, heads, dim = attention.q, attention.kv, attention.num_heads, attention.dim_head_qk
    if not attention.mask_border or type(q) is not nn.Conv2d or type(kv) is not nn.Conv2d or not _is_foldable(norm):
        return norm
    rows = torch.arange(kv.out_channels).reshape(heads, -1)[:, dim:].flatten()  # of values; a head's keys come first
    weight, bias = _folded(kv.weight[rows], None if kv.bias is None else kv.bias[rows], norm)
    q.bias, values = _bias_of(q), _bias_of(kv)  # one convolution computes q, k and v where both have a bias
    with torch.no_grad():
        kv.weight[rows], values[rows] = weight, bias
    kv.bias = values
    return norm.act


def _bias_of(conv: nn.Conv2d) -> torch.Tensor:
    if conv.bias is not None:
        return conv.bias
    return nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), conv.weight.requires_grad)


def _is_foldable(norm: Any) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and hasattr(norm, "act") and norm.running_mean is not None


def _folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    statistics = norm.running_mean, norm.running_var, norm.eps
    return fuse_conv_bn_weights(weight, bias, *statistics, norm.weight, norm.bias)

"""Other ways to compute halo attention, for the benchmark: gathered windows and PyTorch's own attention functions.

All of them take part in `mask_border=False` form (a ring of zero keys and values), on maps of whole blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import nn

from ..layers import HaloAttention


def windows(x: torch.Tensor, block_size: int, halo_size: int) -> torch.Tensor:
    """(batch, H, W, heads, dim) -> (batch * blocks, heads, window ** 2, dim); H, W multiples of block_size."""
    window = block_size + 2 * halo_size
    x = F.pad(x, [0, 0, 0, 0, halo_size, halo_size, halo_size, halo_size])
    x = x.unfold(1, window, block_size).unfold(2, window, block_size).permute(0, 1, 2, 3, 5, 6, 4)
    # batch, blocks down, blocks across, heads, window, window, dim
    return x.reshape(-1, x.shape[3], window * window, x.shape[6])


def blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """(batch, H, W, heads, dim) -> (batch * blocks, heads, block_size ** 2, dim)"""
    batch, height, width, heads, dim = x.shape
    x = x.reshape(batch, height // block_size, block_size, width // block_size, block_size, heads, dim)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, block_size * block_size, dim)


def from_blocks(x: torch.Tensor, block_size: int, height: int, width: int) -> torch.Tensor:
    """The inverse of `blocks`."""
    heads, dim = x.shape[1], x.shape[3]
    x = x.reshape(-1, height // block_size, width // block_size, heads, block_size, block_size, dim)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads, dim)


def sdpa_attend(q, k, v, rel_height, rel_width, *, block_size: int, halo_size: int) -> torch.Tensor:
    """Gathered windows and scaled_dot_product_attention, the relative logits as its mask; shapes as halo_attention."""
    height, width = q.shape[1:3]
    window = block_size + 2 * halo_size
    q = blocks(q, block_size)
    k, v = windows(k, block_size, halo_size), windows(v, block_size, halo_size)
    # row of the table for (query row in its block, key row in the window)
    index = torch.arange(window, device=q.device) - torch.arange(block_size, device=q.device)[:, None] + window - 1
    q_map = q.unflatten(2, (block_size, block_size))
    bias_h = torch.einsum("nhyxd,yud->nhyxu", q_map, rel_height[index])
    bias_w = torch.einsum("nhyxd,xwd->nhyxw", q_map, rel_width[index])
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).reshape(*q.shape[:3], window * window)
    return from_blocks(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), block_size, height, width)


def flex_attend(q, k, v, rel_height, rel_width, *, block_size: int, halo_size: int) -> torch.Tensor:
    """Gathered windows and FlexAttention, the products of q with the two tables computed before; to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    height, width = q.shape[1:3]
    window = block_size + 2 * halo_size
    q = blocks(q, block_size)
    k, v = windows(k, block_size, halo_size), windows(v, block_size, halo_size)
    q_height, q_width = q @ rel_height.T, q @ rel_width.T  # batch * blocks, heads, queries, rows of the table

    def add_relative(score, b, h, i, j):
        bias_h = q_height[b, h, i, j // window - i // block_size + window - 1]
        bias_w = q_width[b, h, i, j % window - i % block_size + window - 1]
        return score + bias_h + bias_w

    return from_blocks(flex_attention(q, k, v, score_mod=add_relative), block_size, height, width)


class PeerLayer(nn.Module):
    """A HaloAttention layer, parameters and all, around another attention function. Shape: as HaloAttention."""

    def __init__(self, layer: HaloAttention, attend: Callable[..., torch.Tensor]):
        super().__init__()
        self.layer, self.attend = layer, attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        q, k, v = layer.project(x)
        tables = layer.pos_embed.height_rel, layer.pos_embed.width_rel
        out = self.attend(q, k, v, *tables, block_size=layer.block_size, halo_size=layer.halo_size)
        return out.flatten(3).permute(0, 3, 1, 2)


class PeerOp(nn.Module):
    """An attention function with all its tensors as parameters: q and, in one tensor as a layer has them, k and v.

    Shape: none -> (batch, side, side, heads, dim). `attend` takes q, k, v and the tables of a halo attention.
    """

    def __init__(self, attend, batch: int, side: int, heads: int, dim: int, block_size: int, halo_size: int):
        super().__init__()
        self.attend = attend
        generator = torch.Generator().manual_seed(0)
        rows = 2 * (block_size + 2 * halo_size) - 1
        self.q = nn.Parameter(torch.randn(batch, side, side, heads, dim, generator=generator))
        self.kv = nn.Parameter(torch.randn(batch, side, side, heads, 2 * dim, generator=generator))
        self.height_rel = nn.Parameter(torch.randn(rows, dim, generator=generator) * dim**-0.5)
        self.width_rel = nn.Parameter(torch.randn(rows, dim, generator=generator) * dim**-0.5)

    def forward(self) -> torch.Tensor:
        k, v = self.kv.chunk(2, dim=-1)
        return self.attend(self.q, k, v, self.height_rel, self.width_rel)


class _Held(nn.Module):
    """Takes the place of a projection: always returns the same tensor."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.x


class TimmOp(nn.Module):
    """What timm's HaloAttn does apart from its projections, on the tensors of a PeerOp in timm's layout."""

    def __init__(self, op: PeerOp, block_size: int, halo_size: int):
        super().__init__()
        batch, side, _, heads, dim = op.q.shape
        attn = HaloAttn(heads * dim, num_heads=heads, dim_head=dim, block_size=block_size, halo_size=halo_size)
        attn.q, attn.kv = (_Held(x.detach().flatten(3).permute(0, 3, 1, 2).contiguous()) for x in (op.q, op.kv))
        attn.pos_embed.height_rel, attn.pos_embed.width_rel = op.height_rel, op.width_rel
        self.attn, self.heads = attn, heads
        self.register_buffer("x", torch.empty(batch, heads * dim, side, side))  # only its shape counts

    def forward(self) -> torch.Tensor:
        return self.attn(self.x).unflatten(1, (self.heads, -1)).permute(0, 3, 4, 1, 2)

"""MaAST's map encoder (Seymour et al. 2021, arXiv 2103.11374): attention over a top-down map of class ids."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import blocked_attention

ATTENTIONS = ("row", "axial", "halo", "global")
POSITIONS = ("distance", "offsets")


class BlockedMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention over a map in blocks with a halo, with the parameters of `torch.nn.MultiheadAttention`."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, known: torch.Tensor, block_size: tuple[int, int], halo: int
    ) -> torch.Tensor:
        """(batch, H, W, dim) -> (batch, H, W, dim), sizes in cells.

        Cells where `known` (batch, H, W) is false are not used as keys.
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))  # batch, H, W, 3, heads, head_dim
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        out = blocked_attention(q, k, v, block_size, halo, key_mask=known)  # batch, heads, H, W, head_dim
        return self.out_proj(out.permute(0, 2, 3, 1, 4).flatten(-2))


class MapAttentionLayer(nn.TransformerEncoderLayer):
    """A post-norm transformer layer over a map whose cells attend in blocks.

    Parameters and their names are those of `torch.nn.TransformerEncoderLayer`; with one block over the whole map it
    computes the same, except that there is no dropout on the attention weights.

    Shape: x (batch, H, W, dim), known (batch, H, W) -> (batch, H, W, dim).
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, hidden, dropout, activation=F.gelu, batch_first=True, **dd)
        self.self_attn.__class__ = BlockedMultiheadAttention  # its forward is called, where hooks fetch parameters

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, known: torch.Tensor, block_size: tuple[int, int], halo: int = 0
    ) -> torch.Tensor:
        x = self.norm1(x + self.dropout1(self.attend(x, known, block_size, halo)))
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm2(x + self.dropout2(self.linear2(hidden)))

    def attend(self, x: torch.Tensor, known: torch.Tensor, block_size: tuple[int, int], halo: int) -> torch.Tensor:
        """Attention in blocks with a halo, sizes in cells: (batch, H, W, dim) -> (batch, H, W, dim).

        Cells where `known` (batch, H, W) is false are not used as keys.
        """
        return self.self_attn(x, known, block_size, halo)


class MapAttentionEncoder(nn.Module):
    """Encodes an egocentric top-down map of class ids into one vector.

    Class and position embeddings, layer norm, dropout; transformer layers; average over all cells, linear layer, tanh.
    Cells of class 0 are unknown: nothing attends to them, and the map's mean holds them too. A cell that sees no known
    cell gets zeros from the attention. The agent stands in cell (H // 2, W // 2).

    Args:
        attention: "row": every cell attends to its row (as the closest public code does). "axial": to its row in the
            first layer, its column in the second, and so on. "halo": to its block of block_size x block_size cells
            grown by halo_size. "global": to all cells.
        num_classes: class ids run from 0 to num_classes; 40 in the paper.
        dim: channels; 128 in the paper.
        out_dim: length of the vector; 512 in the paper.
        depth: transformer layers; 2 in the paper.
        num_heads: must divide `dim`; 4 in the paper.
        hidden: width of the layers' MLP; 64 in the paper.
        dropout: 0.1 in the paper.
        positions: "distance" (the paper's): an embedding of num_positions rows, row
            round((num_positions - 1) * exp(-d^2 / (2 * sigma^2))) at d cells from the agent. It tells far from near
            but not left from right, so that but for "halo" the vector of a map with odd sides is that of the mirrored
            map. "offsets" (this package's choice): one embedding of the row's offset from the agent's and one of the
            column's, 2 * max_offset + 1 rows each; further cells share the last row.
        num_positions: 20 makes up the paper's number of parameters.
        sigma: cells (this package's choice).
        max_offset: cells; 20 serves 40 x 40.
        block_size, halo_size: cells, for "halo" (this package's choice).

    Shape: (batch, H, W) of torch.int64, any H, W >= 1 -> (batch, out_dim), within [-1, 1].

    Raises:
        ValueError: for sizes or names that do not fit, a map that is not int64, or class ids outside 0 to num_classes
            (checked on the CPU only: elsewhere it would wait for the device).
    """

    def __init__(
        self,
        attention: str = "row",
        num_classes: int = 40,
        dim: int = 128,
        out_dim: int = 512,
        depth: int = 2,
        num_heads: int = 4,
        hidden: int = 64,
        dropout: float = 0.1,
        positions: str = "distance",
        num_positions: int = 20,
        sigma: float = 10.0,
        max_offset: int = 20,
        block_size: int = 8,
        halo_size: int = 4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(map(repr, POSITIONS))}, got {positions!r}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{dim=} cannot be divided among {num_heads=}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"need block_size >= 1 and halo_size >= 0, got {block_size=}, {halo_size=}")
        if min(num_classes, num_positions) < 1 or max_offset < 0 or sigma <= 0:
            raise ValueError(
                "need num_classes and num_positions >= 1, max_offset >= 0, sigma > 0, "
                f"got {num_classes=}, {num_positions=}, {max_offset=}, {sigma=}"
            )
        self.attention, self.num_classes, self.positions = attention, num_classes, positions
        self.num_positions, self.sigma, self.max_offset = num_positions, sigma, max_offset
        self.block_size, self.halo_size = block_size, halo_size
        self.class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=0, **dd)
        rows = [num_positions] if positions == "distance" else [2 * max_offset + 1] * 2
        self.position_embeds = nn.ModuleList(nn.Embedding(n, dim, **dd) for n in rows)
        self.norm = nn.LayerNorm(dim, **dd)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(MapAttentionLayer(dim, num_heads, hidden, dropout, **dd) for _ in range(depth))
        self.head = nn.Linear(dim, out_dim, **dd)

    def position_indices(self, height: int, width: int, device=None) -> list[torch.Tensor]:
        """A row of each position embedding for every cell, (height, width) or what broadcasts to it."""
        rows = torch.arange(height, device=device)[:, None] - height // 2
        cols = torch.arange(width, device=device)[None, :] - width // 2
        if self.positions == "offsets":
            return [x.clamp(-self.max_offset, self.max_offset) + self.max_offset for x in (rows, cols)]
        near = torch.exp((rows**2 + cols**2) / (-2 * self.sigma**2))
        return [((self.num_positions - 1) * near).round().long()]

    def blocks(self, layer: int, height: int, width: int) -> tuple[tuple[int, int], int]:
        """Block size and halo size of a layer."""
        if self.attention == "halo":
            return (self.block_size, self.block_size), self.halo_size
        if self.attention == "global":
            return (height, width), 0
        return ((height, 1) if self.attention == "axial" and layer % 2 else (1, width)), 0

    def forward_features(self, maps: torch.Tensor) -> torch.Tensor:
        """(batch, H, W) -> (batch, H, W, dim), before the average."""
        _check_maps(maps, self.num_classes)
        known = maps != 0
        size = maps.shape[1], maps.shape[2]
        x = self.class_embed(maps)
        for embed, index in zip(self.position_embeds, self.position_indices(*size, maps.device), strict=True):
            x = x + embed(index)
        x = self.dropout(self.norm(x))
        for i, layer in enumerate(self.layers):
            x = layer(x, known, *self.blocks(i, *size))
        return x

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.forward_features(maps).mean((1, 2))))


def _check_maps(maps: torch.Tensor, num_classes: int) -> None:
    if maps.ndim != 3 or maps.dtype != torch.int64 or 0 in maps.shape:
        raise ValueError(f"expected maps (batch, H, W) of torch.int64, got {tuple(maps.shape)} of {maps.dtype}")
    if maps.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = maps.min().item(), maps.max().item()
    if low < 0 or high > num_classes:
        raise ValueError(f"class ids must lie in 0 to {num_classes}, got {low} to {high}")

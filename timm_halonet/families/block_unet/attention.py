"""Block-wise self-attention for organ segmentation (Jiang et al., arXiv 1909.05054), one-sided and symmetric."""

import torch
from torch import nn

from ...ops import blocked_attention, scriptable_halo_attention
from ...ops.options import check_integers, make_options


class BlockSelfAttention2d(nn.Module):
    """x + attention(x): the pixels of a block attend, with one head, to a window of which the block is a part.

    q, k and v are 1x1 convolutions with bias and as many channels as the input; the logits are q.k, neither scaled nor
    with positions. Windows are clipped to the map. Two layers in sequence let every pixel see beyond its own window
    (the paper's choice).

    Args:
        dim: channels.
        block_size: pixels, >= 1; 24 in the paper.
        window_size: pixels, >= block_size; 36 in the paper.
        symmetric: False (the paper's block-by-block scan with overlap): the window reaches window_size - block_size
            pixels beyond the block to the bottom and to the right. True: half as many on each of the four sides, at
            the same cost.

    Shape: (batch, dim, H, W), any H, W >= 1 -> the same.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
    """

    def __init__(
        self,
        dim: int,
        block_size: int = 24,
        window_size: int = 36,
        symmetric: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_integers(dim=dim, block_size=block_size, window_size=window_size)
        overlap = window_size - block_size
        if block_size < 1 or overlap < 0:
            raise ValueError(f"need 1 <= block_size <= window_size, got {block_size=}, {window_size=}")
        if symmetric and overlap % 2:
            raise ValueError(
                f"a symmetric window needs the same number of pixels on both sides, got {block_size=}, {window_size=}; "
                f"window_size={window_size - 1} or {window_size + 1} would do"
            )
        self.dim = dim
        self.block_size = block_size
        self.window_size = window_size
        self.symmetric = symmetric
        # top, bottom, left, right
        self.halo = (overlap // 2,) * 4 if symmetric else (0, overlap, 0, overlap)
        # of the fused op, where the halo is one that it knows
        self.options = make_options(block_size, self.halo[0], 1, 1.0, False, True, "true") if self.fused else None
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, device=device, dtype=dtype)

    @property
    def fused(self) -> bool:
        """Whether the function is the fused op's: the same halo on all sides. The op then takes tables of zeros."""
        return len(set(self.halo)) == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected a map (batch, {self.dim}, height, width), got shape {tuple(x.shape)}")
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).chunk(3, -1)  # batch, H, W, dim
        if self.options is not None:
            zeros = q.new_zeros(2 * self.window_size - 1, self.dim)
            q, k, v = (y.unsqueeze(3) for y in (q, k, v))  # batch, H, W, 1 head, dim
            out = scriptable_halo_attention(q, k, v, zeros, zeros, self.options).squeeze(3)
        else:
            q, k, v = (y.unsqueeze(1) for y in (q, k, v))  # batch, 1 head, H, W, dim
            out = blocked_attention(q, k, v, self.block_size, self.halo, scale=1.0).squeeze(1)
        return x + out.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, window_size={self.window_size}, symmetric={self.symmetric}"

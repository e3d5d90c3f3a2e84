"""Focal self-attention, version 1: a window, a ring around it, and pooled windows farther away (arXiv 2107.00641)."""

import torch
import torch.nn.functional as F
from torch import nn

from ...ops import blocked_attention, cut_windows

torch.fx.wrap("_attend")  # one node in an fx graph


class FocalAttention(nn.Module):
    """Multi-head attention of the queries of a window to three kinds of keys (arXiv 2107.00641, section 3.2).

    The keys of a window are of three kinds: its own pixels; a ring of `ring_size` pixels around it; and pooled windows.
    For the last, learned weights pool every window to one pixel. The keys are the `pooled_windows` x `pooled_windows`
    pixels around the window's own that lie inside the map. All of them go through the same projection, and each kind
    has its own table of biases.

    Args:
        dim: input and output channels.
        num_heads: heads; must divide `dim`.
        window_size: pixels, >= 1.
        ring_size: pixels, >= 0.
        pooled_windows: windows, odd.
        padding: "circular": the map is filled up with zeros to whole windows, whose keys and values (the projection's
            biases) take part, and the ring goes on at the other side of the map (the authors' code). "masked": only
            pixels of the map are keys of window and ring (this package's choice); pooling still fills up with zeros.
        qkv_bias: bias of the projection to queries, keys and values.

    Shape: (batch, height, width, dim) -> the same; any height, width >= 1. In TorchScript the attention itself is a
    call of Python: it runs, but cannot be saved (torch.jit.trace and torch.export can).

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        ring_size: int = 3,
        pooled_windows: int = 7,
        padding: str = "circular",
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{dim} channels cannot be divided among num_heads={num_heads}")
        if window_size < 1 or ring_size < 0:
            raise ValueError(f"need window_size >= 1 and ring_size >= 0, got {window_size=}, {ring_size=}")
        if pooled_windows < 1 or pooled_windows % 2 == 0:
            raise ValueError(f"pooled_windows must be odd, so that the window is in their middle, got {pooled_windows}")
        if padding not in ("circular", "masked"):
            raise ValueError(f"padding must be 'circular' or 'masked', got {padding!r}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.ring_size = ring_size
        self.pooled_windows = pooled_windows
        self.padding = padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.pool = nn.Linear(window_size**2, 1, **dd)
        # by offset of the query from the key, rows and columns
        self.window_bias = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        ring = (window_size + 2 * ring_size) ** 2 - window_size**2
        # by query and key, both row by row; None without a ring
        self.ring_bias = nn.Parameter(torch.empty(num_heads, window_size**2, ring, **dd)) if ring else None
        # by row and column of the query in its window less that of the key among the pooled ones
        rows = window_size + pooled_windows - 1
        self.pooled_bias = nn.Parameter(torch.empty(num_heads, rows, rows, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Pooling starts as the mean; the window's biases as 0, the others normal with standard deviation 0.02.

        As the authors' layers do (their model then overwrites the mean with normal weights; this one does not).
        """
        nn.init.constant_(self.pool.weight, 1 / self.window_size**2)
        nn.init.zeros_(self.pool.bias)
        nn.init.zeros_(self.window_bias)
        if self.ring_bias is not None:
            nn.init.trunc_normal_(self.ring_bias, std=0.02)
        nn.init.trunc_normal_(self.pooled_bias, std=0.02)

    def _project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(batch, height, width, dim) -> queries, keys, values, each (batch, heads, height, width, dim of a head)."""
        batch, height, width, _ = x.shape
        return self.qkv(x).reshape(batch, height, width, 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5).unbind(0)

    def _bias(self) -> torch.Tensor:
        """(heads, 1, queries, keys), the keys of window and ring row by row, then the pooled ones."""
        window = _by_offset(self.window_bias, self.window_size)  # heads, queries, key rows, key columns
        pooled = _by_offset(self.pooled_bias, self.pooled_windows).flatten(2)
        if self.ring_bias is None:
            return torch.cat([window.flatten(2), pooled], 2).unsqueeze(1)
        strip = self.ring_size * (self.window_size + 2 * self.ring_size)  # keys above the window, and below
        sides = 2 * self.ring_size * self.window_size
        above, beside, below = self.ring_bias.split([strip, sides, strip], 2)
        beside = beside.reshape(window.shape[0], window.shape[1], self.window_size, 2 * self.ring_size)
        left, right = beside.chunk(2, 3)
        middle = torch.cat([left, window, right], 3).flatten(2)
        return torch.cat([above, middle, below, pooled], 2).unsqueeze(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        size = self.window_size
        # no remainders: torch.export takes minutes to simplify them, these sums are simple
        down, across = (height + size - 1) // size, (width + size - 1) // size
        whole = F.pad(x, (0, 0, 0, across * size - width, 0, down * size - height))
        windows = whole.reshape(batch, down, size, across, size, dim).permute(0, 1, 3, 5, 2, 4).flatten(4)
        pooled = self.pool(windows).squeeze(4)  # batch, down, across, dim
        _, pooled_k, pooled_v = self._project(pooled)
        inside = pooled.new_ones(1, 1, down, across, 1)
        q, k, v = self._project(whole if self.padding == "circular" else x)
        out = _attend(
            q,
            k,
            v,
            self._bias(),
            _around(pooled_k, self.pooled_windows),
            _around(pooled_v, self.pooled_windows),
            _around(inside, self.pooled_windows).squeeze(4) > 0,
            size,
            self.ring_size,
            self.padding,
        )
        out = out[:, :, :height, :width].permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(out)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, ring_size={self.ring_size}, "
            f"pooled_windows={self.pooled_windows}, padding={self.padding!r}"
        )


def _by_offset(table: torch.Tensor, keys: int) -> torch.Tensor:
    """(heads, queries + keys - 1, the same) -> (heads, queries ** 2, keys, keys), by the offset query - key."""
    return table.unfold(1, keys, 1).unfold(2, keys, 1).flip(3, 4).flatten(1, 2)


def _around(x: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, heads, down, across, dim) -> (batch, heads, down * across, size * size, dim), zeros outside the map."""
    ring = size // 2
    return cut_windows(F.pad(x, (0, 0, ring, ring, ring, ring)), (size, size), (1, 1))


@torch.jit.ignore
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    pooled_keys: torch.Tensor,
    pooled_values: torch.Tensor,
    pooled_mask: torch.Tensor,
    window_size: int,
    ring_size: int,
    padding: str,
) -> torch.Tensor:
    return blocked_attention(
        q,
        k,
        v,
        window_size,
        ring_size,
        bias=bias,
        extra_keys=pooled_keys,
        extra_values=pooled_values,
        extra_mask=pooled_mask if pooled_keys.shape[3] > 1 else None,
        padding=padding,
    )

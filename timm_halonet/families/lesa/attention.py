"""Locally enhanced self-attention: a convolution and global attention, fused by a gate (arXiv 2107.05637)."""

import torch
from torch import nn

torch.fx.wrap("_check_map")  # one node each in an fx graph: they look at sizes
torch.fx.wrap("_relative_rows")


class FlattenedRelativePositions(nn.Module):
    """One table for a map of one size, indexed by the offset of the flattened positions, shared by the heads.

    Args:
        feat_size: (height, width) of the map, pixels.
        dim_qk: query and key channels of a head.
        dim_v: value channels of a head.
    """

    kinds = 2  # of logits: query with position, key with position

    def __init__(self, feat_size: tuple[int, int], dim_qk: int, dim_v: int, device=None, dtype=None):
        super().__init__()
        self.feat_size = (int(feat_size[0]), int(feat_size[1]))
        self.dims = [dim_qk, dim_qk, dim_v]
        rows = 2 * self.feat_size[0] * self.feat_size[1] - 1
        self.table = nn.Parameter(torch.empty(sum(self.dims), rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation dim_v ** -0.5 (the authors' code)."""
        nn.init.normal_(self.table, std=self.dims[2] ** -0.5)

    def _by_offset(self, table: torch.Tensor) -> torch.Tensor:
        """(dim, 2 * N - 1) -> (dim, N, N), whose [:, i, j] belongs to the offset i - j."""
        return table.unfold(1, self.feat_size[0] * self.feat_size[1], 1).flip(2)

    def forward(self, q: torch.Tensor, k: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, dim_qk, N) twice -> (batch, 2 * heads, N queries, N keys), and the positions of values.

        Those are (dim_v, N, N), by query and key. They are handed over here, since hooks of offloading and sharding
        fetch parameters for the forward alone.
        """
        q = _check_map(q, height, width, self.feat_size)
        table: torch.Tensor = self.table
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles both sides of an `and`)
            if self._forward_hooks:
                table = table.clone()  # a hook may free what it fetched, before the positions of values are used
        for_q, for_k, for_v = table.split(self.dims)
        # query i meets the offset i - j, key j the offset j - i
        with_q = torch.einsum("bgci,cij->bgij", q, self._by_offset(for_q))
        with_k = torch.einsum("bgcj,cji->bgij", k, self._by_offset(for_k))
        return torch.cat([with_q, with_k], 1), self._by_offset(for_v)


class HeightWidthRelativePositions(nn.Module):
    """A table of heights and one of widths, for maps of any size, shared by the heads.

    Offsets beyond the tables take their outermost row (this package's choice).

    Args:
        feat_size: (height, width), the largest map whose offsets all have rows of their own, pixels.
        dim_qk: query and key channels of a head.
    """

    kinds = 1  # of logits: query with position

    def __init__(self, feat_size: tuple[int, int], dim_qk: int, device=None, dtype=None):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * int(feat_size[0]) - 1, dim_qk, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * int(feat_size[1]) - 1, dim_qk, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation dim_qk ** -0.5 (the authors' code)."""
        for table in (self.height_rel, self.width_rel):
            nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, q: torch.Tensor, k: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, dim_qk, N) twice -> (batch, heads, N queries, N keys), and no positions of values, (0,)."""
        batch, heads, dim, positions = q.shape
        q = q.reshape(batch, heads, dim, height, width)
        high = torch.einsum("bgcyx,yuc->bgyxu", q, _relative_rows(self.height_rel, height))
        wide = torch.einsum("bgcyx,xvc->bgyxv", q, _relative_rows(self.width_rel, width))
        return (high[..., :, None] + wide[..., None, :]).reshape(batch, heads, positions, positions), q.new_empty(0)


class LocallyEnhancedSelfAttention(nn.Module):
    """Local term plus gated context term (arXiv 2107.05637, section 3), ending in ReLU, in the place of a 3x3 conv.

    The local term is a grouped 3x3 and a 1x1 convolution, the context term global attention whose logits (content and
    positions, each head's with its own BatchNorm) are not scaled.

    Args:
        dim: input and output channels, a multiple of 2 * num_heads.
        feat_size: (height, width) of the map, pixels; see `rel_pos`.
        stride: average pooling of the output by this factor (as the authors' code does).
        num_heads: heads; the groups of the 3x3 convolution too.
        rel_pos: "flattened": one table for a map of exactly `feat_size`, for queries, keys and values (the paper's for
            classification). "height_width": a table of heights and one of widths, for queries, for maps of any size
            (the authors' for detection).

    Shape: (batch, dim, height, width) -> (batch, dim, height // stride, width // stride).

    Raises:
        ValueError: for sizes that do not fit, with the numbers; in use, for a map of another size than the table's.
    """

    position_values: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        feat_size: tuple[int, int],
        stride: int = 1,
        num_heads: int = 8,
        rel_pos: str = "flattened",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"channels must be a multiple of 2 * num_heads, got {dim=}, {num_heads=}")
        if min(feat_size) < 1:
            raise ValueError(f"need a map of at least one pixel, got feat_size={tuple(feat_size)}")
        if rel_pos not in ("flattened", "height_width"):
            raise ValueError(f"rel_pos must be 'flattened' or 'height_width', got {rel_pos!r}")
        self.num_heads = num_heads
        self.dim_head_qk = dim // num_heads // 2
        self.dim_head_v = dim // num_heads
        self.position_values = rel_pos == "flattened"
        self.local = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=num_heads, bias=False, **dd),
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.qkv = nn.Conv2d(dim, 2 * dim, 1, bias=False, **dd)
        self.bn_qkv = nn.BatchNorm2d(2 * dim, **dd)
        self.pos_embed: FlattenedRelativePositions | HeightWidthRelativePositions
        if self.position_values:
            self.pos_embed = FlattenedRelativePositions(feat_size, self.dim_head_qk, self.dim_head_v, **dd)
        else:
            self.pos_embed = HeightWidthRelativePositions(feat_size, self.dim_head_qk, **dd)
        self.bn_logits = nn.BatchNorm2d((1 + self.pos_embed.kinds) * num_heads, **dd)
        self.bn_context = nn.BatchNorm1d(dim * (2 if self.position_values else 1), **dd)
        self.gate = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * dim, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.Sigmoid(),
        )
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal by fan-in for queries, keys and values, and the tables; convolutions are left to the model."""
        nn.init.normal_(self.qkv.weight, std=self.qkv.weight.shape[1] ** -0.5)
        self.pos_embed.reset_parameters()

    def _context(self, x: torch.Tensor) -> torch.Tensor:
        batch, chs, height, width = x.shape
        positions = height * width
        qkv = self.bn_qkv(self.qkv(x)).reshape(batch, self.num_heads, -1, positions)
        # each batch, heads, channels of a head, positions
        q, k, v = qkv.split([self.dim_head_qk, self.dim_head_qk, self.dim_head_v], 2)
        with_positions, for_values = self.pos_embed(q, k, height, width)
        logits = torch.cat([q.transpose(2, 3) @ k, with_positions], 1)
        logits = self.bn_logits(logits).view(batch, -1, self.num_heads, positions, positions).sum(1)
        attn = logits.softmax(-1)
        context = v @ attn.transpose(2, 3)  # batch, heads, channels of a head, positions
        if self.position_values:
            # channel by channel: content, position
            positional = torch.einsum("bgij,cij->bgci", attn, for_values)
            pairs = torch.stack([context, positional], 3).reshape(batch, 2 * chs, positions)
            context = self.bn_context(pairs).view(batch, chs, 2, positions).sum(2)
        else:
            context = self.bn_context(context.reshape(batch, chs, positions))
        return context.reshape(batch, chs, height, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = self.local(x)
        context = self._context(x)
        gate = self.gate(torch.cat([local, context], 1))
        return self.act(self.pool(local + gate * context))


def _check_map(x: torch.Tensor, height: int, width: int, feat_size: tuple[int, int]) -> torch.Tensor:
    """x, if the map has the size that the table is for."""
    if torch.jit.is_scripting():
        return x
    if (height, width) != tuple(feat_size):
        raise ValueError(
            f"rel_pos='flattened' is for maps of {feat_size[0]}x{feat_size[1]} pixels, got {height}x{width}; build "
            "with img_size= of these images, or with rel_pos='height_width' for any size"
        )
    return x


def _relative_rows(table: torch.Tensor, length: int) -> torch.Tensor:
    """(2 * n - 1, dim) -> (length queries, length keys, dim): the rows of the offsets key - query."""
    position = torch.arange(length, device=table.device)
    reach = table.shape[0] // 2
    return table[(position[None, :] - position[:, None]).clamp(-reach, reach) + reach]

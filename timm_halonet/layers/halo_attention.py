"""Halo self-attention as a layer, with the parameters of `timm.layers.halo_attn.HaloAttn`."""

from types import NoneType

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import scriptable_halo_attention, use_backend
from ..ops.dispatch import exports, is_exporting
from ..ops.export import halo_attention_maps
from ..ops.options import Options, check_integers, make_options
from ..ops.packed import split_keys_and_values, split_queries_keys_and_values

torch.fx.wrap("scriptable_halo_attention")  # one node in an fx graph, whatever it does inside


def has_opacus_hooks(module: nn.Module) -> bool:
    """Whether Opacus takes every sample's gradient of the module's parameters, by hooks on its forward and backward.

    Opacus 1.6 reads maps as if they were contiguous, whatever their strides are: what goes into a convolution must be.
    """
    return any(getattr(hook, "__module__", "").startswith("opacus.") for hook in module._forward_hooks.values())


def are_one_convolution(q: nn.Module, kv: nn.Module, x: torch.Tensor) -> bool:
    """Whether one convolution of x with the weights of both does all that calls of both do.

    Not where something replaced, wrapped or watches one of them (another class, also of its parameters, a forward of
    its own, hooks), nor for an x that is more than numbers, as that of torch.fx or of sharding. Exported, two
    convolutions need no `cat` of their weights at every run; and if one of them learns, the other need not.
    """
    return (
        type(x) is torch.Tensor
        and _is_plain(q)
        and _is_plain(kv)
        and (q.bias is None) == (kv.bias is None)
        and q.weight.dtype == kv.weight.dtype
        and q.weight.requires_grad == kv.weight.requires_grad
        and not _has_any_global_hook()
        and not is_exporting()
    )


def _is_plain(conv: nn.Module) -> bool:
    """Whether a call of it is a 1x1 convolution and nothing else."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == conv.dilation == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
        and "forward" not in conv.__dict__
        and type(conv.weight) in (nn.Parameter, torch.Tensor)  # the latter in torch.func.functional_call
        and type(conv.bias) in (nn.Parameter, torch.Tensor, NoneType)
    )


class RelativePositionTables(nn.Module):
    """Two tables of relative positions, `height_rel` and `width_rel`, each (2 * window - 1, dim_head)."""

    def __init__(self, window: int, dim_head: int, device=None, dtype=None):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal with standard deviation dim_head ** -0.5 (timm's choice)."""
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tables. Called, not read from outside: hooks of offloading and sharding fetch parameters here.

        With x, (batch, ...), of which only the batch size counts: both tables for every sample as one tensor, (batch,
        2, rows, dim_head), so that its gradient is each sample's.
        """
        if torch.jit.is_scripting():
            return self.height_rel, self.width_rel
        else:
            if x is not None:
                return torch.stack([self.height_rel, self.width_rel]).expand(x.shape[0], -1, -1, -1)  # type: ignore
            if self._forward_hooks:  # one of them may free what it fetched, before the tables are used
                return self.height_rel.clone(), self.width_rel.clone()
            return self.height_rel, self.width_rel


class HaloAttention(nn.Module):
    """Halo attention (arXiv 2103.12731) over a map of any size, without an output projection.

    Parameters and their names are those of `timm.layers.halo_attn.HaloAttn`, whose arguments come first and mean the
    same. With `mask_border=False, strided_rel="grid"` it computes the same too.

    Args:
        dim: input channels.
        dim_out: output channels, all heads together; None for `dim`.
        feat_size: ignored; timm's other attention layers need it.
        stride: 1, or 2 for attention downsampling (the output has ceil(H / 2) x ceil(W / 2) pixels).
        num_heads: heads; must divide `dim_out`.
        dim_head: query and key channels of a head; None for make_divisible(dim_out * qk_ratio, 8) // num_heads.
        block_size: pixels, >= 1.
        halo_size: pixels, >= 0.
        qk_ratio: see `dim_head`.
        qkv_bias: bias in the two projections.
        avg_down: downsample by average pooling after attention at stride 1. Also done where stride does not divide
            block_size.
        scale_pos_embed: scale the relative logits like q.k.
        mask_border: keys outside the image get no weight (see `timm_halonet.ops.halo_attention`).
        strided_rel: relative position of strided queries, "true" or "grid" (see there).
        backend: name of a backend for this layer, see `timm_halonet.ops.use_backend`, which it outranks; None for the
            best that can run. "reference" has second derivatives, forward mode and torch.func. An attribute too.

    Shape: (batch, dim, H, W), any H, W >= 1 -> (batch, dim_out, ceil(H / stride), ceil(W / stride)) in channels_last.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
    """

    options: Options  # the annotation is for torch.jit.script
    backend: str | None

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_border: bool = True,
        strided_rel: str = "true",
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        from timm.layers import make_divisible  # here, so that importing the layers first does not import timm

        super().__init__()
        dim_out = dim_out or dim
        check_integers(dim=dim, dim_out=dim_out, num_heads=num_heads, block_size=block_size, halo_size=halo_size)
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride=}")
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"{dim_out} channels cannot be divided among num_heads={num_heads}")
        self.num_heads = num_heads
        self.dim_head_qk = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.dim_head_v = dim_out // num_heads
        check_integers(dim_head=self.dim_head_qk)
        if self.dim_head_qk < 1:
            raise ValueError(f"query and key heads have no channels: {dim_out=}, {qk_ratio=}, {num_heads=}")
        pool = stride > 1 and (avg_down or block_size % stride != 0)
        self.strided_rel = strided_rel
        use_backend(backend)  # refuses an unknown name
        self.backend = backend
        self.contiguous_output = False  # True in accelerated layers of timm, whose output is: one copy of it
        self.options = make_options(
            block_size,
            halo_size,
            1 if pool else stride,
            self.dim_head_qk**-0.5,
            scale_pos_embed,
            mask_border,
            strided_rel,
        )

        dim_qk = num_heads * self.dim_head_qk
        self.q = nn.Conv2d(dim, dim_qk, 1, stride=self.query_stride, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Conv2d(dim, dim_qk + dim_out, 1, bias=qkv_bias, device=device, dtype=dtype)
        self.pos_embed = RelativePositionTables(block_size + 2 * halo_size, self.dim_head_qk, device, dtype)
        # ceil_mode: an odd map's last row pools what it has, so sizes match those of a strided convolution
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if pool else nn.Identity()
        self.reset_parameters()

    @property
    def block_size(self) -> int:
        """Side of a block, in pixels."""
        return self.options.block_size

    @property
    def halo_size(self) -> int:
        """Width of the halo around a block, in pixels."""
        return self.options.halo_size

    @property
    def query_stride(self) -> int:
        """Pixels from one query to the next; 1 where pooling does the downsampling."""
        return self.options.query_stride

    @property
    def scale(self) -> float:
        """The factor of q.k: (query channels of a head) ** -0.5."""
        return self.options.scale

    @property
    def scale_pos_embed(self) -> bool:
        """Whether the relative logits are scaled like q.k."""
        return self.options.scale_rel

    @property
    def mask_border(self) -> bool:
        """Whether keys outside the image get no weight."""
        return self.options.mask_border

    def reset_parameters(self) -> None:
        """Truncated normal by fan-in for the projections (timm's choice), and the tables."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.weight.shape[1] ** -0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.pos_embed.reset_parameters()

    def _split_heads(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)  # batch, heads * dim, H, W -> batch, H, W, heads * dim
        # not x.unflatten: traced for ONNX, it fixes H and W
        return x.reshape(x.shape[0], x.shape[1], x.shape[2], self.num_heads, dim)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values as (batch, height, width, heads, dim) views of one or two outputs."""
        if are_one_convolution(self.q, self.kv, x):
            weight = torch.cat([self.q.weight, self.kv.weight])
            biases = [bias for bias in (self.q.bias, self.kv.bias) if bias is not None]
            bias = torch.cat(biases) if biases else None
            qkv = nn.functional.conv2d(x, weight, bias).permute(0, 2, 3, 1)
            return split_queries_keys_and_values(qkv, self.num_heads, self.dim_head_qk)
        q = self._split_heads(self.q(x), self.dim_head_qk)
        k, v = split_keys_and_values(self.kv(x).permute(0, 2, 3, 1), self.num_heads, self.dim_head_qk)
        return q, k, v

    def _attend_apart(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """One sample at a time, each with tables of its own."""
        outputs = [
            scriptable_halo_attention(q1, k1, v1, both[0], both[1], self.options, self.backend)
            for q1, k1, v1, both in zip(q.split(1), k.split(1), v.split(1), tables, strict=True)
        ]
        return torch.cat(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._attend_exported(x)
        else:
            return self._attend(x)

    def _attend_exported(self, x: torch.Tensor) -> torch.Tensor:
        """Takes the maps as they are, without changes of layout that would stay in the graph."""
        rel_height, rel_width = self.pos_embed()
        out = self.pool(halo_attention_maps(self.q(x), self.kv(x), rel_height, rel_width, self.num_heads, self.options))
        return out.contiguous() if self.contiguous_output else out

    @torch.jit.unused
    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        if self.backend is None and exports(x):
            return self._attend_exported(x)
        q, k, v = self.project(x)
        apart = has_opacus_hooks(self.pos_embed)
        if apart:
            out = self._attend_apart(q, k, v, self.pos_embed(x.detach()))
        else:
            rel_height, rel_width = self.pos_embed()
            out = scriptable_halo_attention(q, k, v, rel_height, rel_width, self.options, self.backend)
        # batch, H, W, heads, dim -> batch, heads * dim, H, W in channels_last
        out = self.pool(out.flatten(3).permute(0, 3, 1, 2))
        return out.contiguous() if self.contiguous_output or apart else out

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, halo_size={self.halo_size}, num_heads={self.num_heads}, "
            f"query_stride={self.query_stride}, mask_border={self.mask_border}, strided_rel={self.strided_rel!r}"
        )

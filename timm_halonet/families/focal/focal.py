"""Focal Transformers, version 1 (arXiv 2107.00641): a pyramid like Swin's, on focal attention, for any image size.

Not timm's FocalNet, which has no attention. This is a fresh implementation; the authors' code is microsoft's
Focal-Transformer (MIT licence), whose checkpoints checkpoint.py converts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp, get_act_layer, trunc_normal_
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import register_model
from torch import nn

from ...layers.halo_attention import has_opacus_hooks
from ...models._base import base_cfg, build, default_cfgs_of, override
from ...models._pyramid import PyramidNet
from .attention import FocalAttention
from .checkpoint import checkpoint_filter_fn

__all__ = ["FocalBlock", "FocalCfg", "FocalStage", "FocalTransformer", "checkpoint_filter_fn"]


@dataclass(frozen=True)
class FocalCfg:
    """The architecture of one Focal Transformer; table 1 of the paper."""

    dim: int = 96  # channels of the first stage, doubled by each next one
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # for each stage
    drop_path_rate: float = 0.2  # of the last block, rising linearly from 0
    conv_embed: bool = False  # overlapping convolutions before the stages, 7x7 and 3x3, in place of 4x4 and 2x2
    window_size: int = 7  # pixels
    ring_sizes: tuple[int, ...] = (3, 3, 3, 0)  # pixels, for each stage
    pooled_windows: tuple[int, ...] = (7, 5, 3, 1)  # for each stage
    padding: str = "circular"  # or "masked", saner for training from scratch; see FocalAttention
    mlp_ratio: float = 4.0  # hidden over block channels of the MLPs
    qkv_bias: bool = True
    act_layer: str = "gelu"
    image_size: int = 224  # the authors' training size; any size runs


cfgs: dict[str, FocalCfg] = dict(
    focal_transformer_tiny=FocalCfg(),
    focal_transformer_small=FocalCfg(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    focal_transformer_base=FocalCfg(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
)
cfgs.update({f"{name}_conv": replace(cfg, conv_embed=True) for name, cfg in cfgs.items()})


class FocalEmbed(nn.Module):
    """Strided convolution, with padding of the map to a multiple of its stride, and layer norm.

    Shape: (batch, in_chs, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_chs: int, dim: int, kernel_size: int, stride: int, padding: int, device=None, dtype=None):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(in_chs, dim, kernel_size, stride, padding, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, stride = x.shape[2], x.shape[3], self.stride
        down, across = (height + stride - 1) // stride, (width + stride - 1) // stride
        x = F.pad(x, (0, across * stride - width, 0, down * stride - height))
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles both sides of an `and`)
            if has_opacus_hooks(self.proj):
                x = x.contiguous()
        return self.norm(self.proj(x))


class FocalBlock(nn.Module):
    """Pre-norm transformer block: focal attention, then an MLP.

    Shape: (batch, H, W, dim) -> the same.
    """

    def __init__(self, cfg: FocalCfg, stage: int, drop_path_rate: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim = cfg.dim * 2**stage
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = FocalAttention(
            dim,
            num_heads=cfg.num_heads[stage],
            window_size=cfg.window_size,
            ring_size=cfg.ring_sizes[stage],
            pooled_windows=cfg.pooled_windows[stage],
            padding=cfg.padding,
            qkv_bias=cfg.qkv_bias,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), act_layer=get_act_layer(cfg.act_layer), **dd)
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FocalStage(nn.Module):
    """Downsampling (none in the first stage), then blocks.

    Shape: (batch, in_chs, H, W) -> (batch, dim, ceil(H / 2), ceil(W / 2)); the first stage keeps height and width.
    """

    def __init__(self, cfg: FocalCfg, stage: int, drop_path_rates: list[float], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if stage:
            dim = cfg.dim * 2**stage
            kernel_size, padding = (3, 1) if cfg.conv_embed else (2, 0)
            self.downsample = FocalEmbed(dim // 2, dim, kernel_size, 2, padding, **dd)
        self.blocks = nn.Sequential(*[FocalBlock(cfg, stage, rate, **dd) for rate in drop_path_rates])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)  # batch, H, W, dim
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


PER_STAGE = ("depths", "num_heads", "ring_sizes", "pooled_windows")


class FocalTransformer(PyramidNet):
    """Focal Transformer: patch embedding, four stages of focal attention blocks, layer norm, pooling, classifier.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes); any H, W (features at 1/4, 1/8, 1/16 and 1/32, sizes
    rounded up at each step).

    Args:
        cfg: the variant; any field of `FocalCfg` can be overridden by a keyword argument of its name.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        img_size: ignored, since any size runs.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument, with the known ones.
    """

    no_decay = ("window_bias", "ring_bias", "pooled_bias")  # the tables of biases

    def __init__(
        self,
        cfg: FocalCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__()
        cfg = override(cfg, kwargs, "FocalTransformer", ("global_pool", "img_size", "drop_rate"), PER_STAGE)
        _check_cfg(cfg)
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = FocalEmbed(in_chans, cfg.dim, *((7, 4, 2) if cfg.conv_embed else (4, 4, 0)), **dd)
        rates = torch.linspace(0, cfg.drop_path_rate, sum(cfg.depths), device="cpu").split(cfg.depths)
        self.stages = nn.Sequential(*[FocalStage(cfg, i, rates[i].tolist(), **dd) for i in range(4)])
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=cfg.dim * 2**i, reduction=4 * 2**i, module=f"stages.{i}") for i in range(4)
        ]
        self.num_features = cfg.dim * 8
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=1e-5, **dd)
        self._set_head(num_classes, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors': linear layers normal with standard deviation 0.02, biases 0; attention as `FocalAttention`."""
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for module in linear:
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for attn in [module for module in self.modules() if isinstance(module, FocalAttention)]:
            attn.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from the image to the classifier, a stage (coarse) or a block at a time."""
        stage = r"^stages\.(\d+)"
        fine: list[Any] = [(rf"{stage}\.downsample", (0,)), (rf"{stage}\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=[*([(stage, None)] if coarse else fine), (r"^norm", (99999,))])

    def forward_tail(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def _drop_tail(self) -> None:
        self.norm = nn.Identity()

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def _check_cfg(cfg: FocalCfg) -> None:
    for name in PER_STAGE:
        if len(getattr(cfg, name)) != 4:
            raise ValueError(f"{name} must have a number for each of the four stages, got {getattr(cfg, name)}")
    if cfg.dim < 1 or min(cfg.depths) < 1 or int(cfg.dim * cfg.mlp_ratio) < 1:
        raise ValueError(f"need channels and blocks, got dim={cfg.dim}, depths={cfg.depths}, mlp_ratio={cfg.mlp_ratio}")


def _create_focal(variant: str, pretrained: bool = False, **kwargs) -> FocalTransformer:
    return build(
        FocalTransformer,
        variant,
        pretrained,
        _base_cfg(variant),
        model_cfg=cfgs[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


def _base_cfg(variant: str) -> dict[str, Any]:
    """What a model of this architecture without weights tells timm about its input."""
    size = cfgs[variant].image_size
    return base_cfg(
        size,
        pool_size=(size // 32, size // 32),
        crop_pct=0.9,
        first_conv="stem.proj",
        classifier="head.fc",
        license="apache-2.0",
        paper_ids="arXiv:2107.00641",
        paper_name="Focal Self-attention for Local-Global Interactions in Vision Transformers",
    )


default_cfgs = default_cfgs_of({variant: _base_cfg(variant) for variant in cfgs})


@register_model
def focal_transformer_tiny(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal Transformer, 28.8 million parameters."""
    return _create_focal("focal_transformer_tiny", pretrained, **kwargs)


@register_model
def focal_transformer_small(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal Transformer, 51.0 million parameters."""
    return _create_focal("focal_transformer_small", pretrained, **kwargs)


@register_model
def focal_transformer_base(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal Transformer, 89.6 million parameters."""
    return _create_focal("focal_transformer_base", pretrained, **kwargs)


@register_model
def focal_transformer_tiny_conv(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """The tiny Focal Transformer with overlapping convolutions between the stages."""
    return _create_focal("focal_transformer_tiny_conv", pretrained, **kwargs)


@register_model
def focal_transformer_small_conv(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """The small Focal Transformer with overlapping convolutions between the stages."""
    return _create_focal("focal_transformer_small_conv", pretrained, **kwargs)


@register_model
def focal_transformer_base_conv(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """The base Focal Transformer with overlapping convolutions between the stages."""
    return _create_focal("focal_transformer_base_conv", pretrained, **kwargs)

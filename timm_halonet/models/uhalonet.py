"""U-HaloNet: halo attention in a plain transformer pyramid, with public ImageNet weights (arXiv 2211.05781).

The four models and their weights are those of OpenGVLab/STM-Evaluation (MIT licence), where they are called
unified_halo_{micro,tiny,small,base}. This is a fresh implementation on this package's attention, for any image size.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    Mlp,
    get_act_layer,
    trunc_normal_,
)
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

from ..layers import HaloAttention
from ._base import base_cfg, build, override
from ._pyramid import PyramidNet

__all__ = ["UHaloBlock", "UHaloNet", "UHaloNetCfg", "UHaloStage"]


@dataclass(frozen=True)
class UHaloNetCfg:
    """The architecture of one U-HaloNet."""

    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # a stage
    drop_path_rate: float = 0.0  # of the last block, rising linearly from 0; the authors' for training from scratch
    block_size: int = 7  # pixels
    halo_size: int = 3  # pixels
    mlp_ratio: float = 4.0  # hidden over block channels of the MLPs
    head_ratio: float = 1.5  # channels of the 1x1 convolution before pooling over those of the last stage
    layer_scale: float = 1e-6  # what the residual branches are multiplied by at first
    act_layer: str = "gelu"
    mask_border: bool = True  # keys outside the image get no weight
    backend: str | None = None  # of the attention, as in `HaloAttention`; "reference" has second derivatives
    image_size: int = 224  # the authors' training size; any size runs


cfgs: dict[str, UHaloNetCfg] = dict(
    uhalonet_micro=UHaloNetCfg(dims=(32, 64, 128, 256), depths=(2, 2, 9, 2), num_heads=(1, 2, 4, 8)),
    uhalonet_tiny=UHaloNetCfg(drop_path_rate=0.2),
    uhalonet_small=UHaloNetCfg(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    uhalonet_base=UHaloNetCfg(
        dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5
    ),
)


class UHaloBlock(nn.Module):
    """Pre-norm transformer block: halo attention with an output projection, then an MLP, each with a layer scale.

    Shape: (batch, H, W, dim) -> the same.
    """

    def __init__(self, cfg: UHaloNetCfg, dim: int, num_heads: int, drop_path_rate: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = HaloAttention(
            dim,
            num_heads=num_heads,
            dim_head=dim // num_heads,
            block_size=cfg.block_size,
            halo_size=cfg.halo_size,
            mask_border=cfg.mask_border,
            backend=cfg.backend,
            **dd,
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.ls1 = LayerScale(dim, cfg.layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), act_layer=get_act_layer(cfg.act_layer), **dd)
        self.ls2 = LayerScale(dim, cfg.layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the attention takes (batch, dim, H, W), and both permutations are views: its maps are channels_last
        attended = self.attn(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.ls1(self.proj(attended)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class UHaloStage(nn.Module):
    """Downsampling (none in the first stage, where in_chs is None), blocks, and a layer norm.

    Shape: (batch, in_chs or dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        cfg: UHaloNetCfg,
        in_chs: int | None,
        dim: int,
        num_heads: int,
        drop_path_rates: list[float],
        stride: int = 1,
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if in_chs is not None:
            conv = nn.Conv2d(in_chs, dim, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd)
            self.downsample = nn.Sequential(conv, LayerNorm2d(dim, eps=1e-6, **dd))
        self.blocks = nn.Sequential(*[UHaloBlock(cfg, dim, num_heads, rate, **dd) for rate in drop_path_rates])
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        x = x.permute(0, 2, 3, 1)  # batch, H, W, dim
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x.permute(0, 3, 1, 2))


class UHaloNet(PyramidNet):
    """U-HaloNet: stem, four stages of halo attention blocks, a 1x1 convolution, pooling, classifier.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes); any H, W (features at 1/4, 1/8, 1/16 and 1/32, sizes
    rounded up at each halving).

    Args:
        cfg: the variant; any field of `UHaloNetCfg` can be overridden by a keyword argument of its name.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        output_stride: 32, 16 or 8; later stages then keep the resolution, their convolutions dilated.
        img_size: ignored, since any size runs.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument, with the known ones.
    """

    def __init__(
        self,
        cfg: UHaloNetCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__()
        also = ("global_pool", "output_stride", "img_size", "drop_rate")
        cfg = override(cfg, kwargs, "UHaloNet", also, ("dims", "depths", "num_heads"), len(cfg.depths))
        _check_cfg(cfg, output_stride)
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        dim = cfg.dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            LayerNorm2d(dim // 2, eps=1e-6, **dd),
            get_act_layer(cfg.act_layer)(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
            LayerNorm2d(dim, eps=1e-6, **dd),
        )
        rates = torch.linspace(0, cfg.drop_path_rate, sum(cfg.depths), device="cpu").split(cfg.depths)
        stages = []
        reduction, dilation = 4, 1
        self.feature_info: list[dict[str, Any]] = []
        for i, (dim, num_heads) in enumerate(zip(cfg.dims, cfg.num_heads, strict=True)):
            stride = 2 if i > 0 and reduction < output_stride else 1
            in_chs = cfg.dims[i - 1] if i else None
            stages.append(UHaloStage(cfg, in_chs, dim, num_heads, rates[i].tolist(), stride, dilation, **dd))
            reduction *= stride
            dilation *= 2 if i > 0 and stride == 1 else 1
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = int(dim * cfg.head_ratio)
        self.final_conv: nn.Module = ConvNormAct(dim, self.num_features, 1, act_layer=cfg.act_layer, **dd)
        self._set_head(num_classes, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors': normal with standard deviation 0.02, biases 0; position tables as `HaloAttention` has them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from the image to the classifier, a stage (coarse) or a block at a time."""
        stage = r"^stages\.(\d+)"
        fine: list[Any] = [
            (rf"{stage}\.downsample", (0,)),
            (rf"{stage}\.blocks\.(\d+)", None),
            (rf"{stage}\.norm", (99998,)),
        ]
        return dict(stem=r"^stem", blocks=[*([(stage, None)] if coarse else fine), (r"^final_conv", (99999,))])

    def forward_tail(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_conv(x)

    def _drop_tail(self) -> None:
        self.final_conv = nn.Identity()


def _check_cfg(cfg: UHaloNetCfg, output_stride: int) -> None:
    if cfg.block_size < 1 or cfg.halo_size < 0:
        raise ValueError(
            f"need block_size >= 1 and halo_size >= 0, got block_size={cfg.block_size}, halo_size={cfg.halo_size}"
        )
    three = f"{cfg.dims}, {cfg.depths} and {cfg.num_heads}"
    if {len(cfg.dims), len(cfg.depths), len(cfg.num_heads)} != {4}:
        raise ValueError(f"dims, depths and num_heads must have a number for each of the four stages, got {three}")
    if min(cfg.dims) < 2 or min(cfg.depths) < 1 or min(cfg.num_heads) < 1:
        raise ValueError(f"need dims >= 2, depths and num_heads >= 1, got {three}")
    for i, (dim, heads) in enumerate(zip(cfg.dims, cfg.num_heads, strict=True)):
        if dim % heads:
            raise ValueError(f"stage {i + 1}: {dim} channels cannot be divided among {heads} heads")
    if int(cfg.dims[0] * cfg.mlp_ratio) < 1 or int(cfg.dims[-1] * cfg.head_ratio) < 1:
        raise ValueError(f"need channels, got mlp_ratio={cfg.mlp_ratio}, head_ratio={cfg.head_ratio}")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")


# beginnings of the authors' names -> of ours, outside the stages
_NAMES = (
    ("downsample_layers.0.stem.", "stem."),
    ("conv_head.0.", "final_conv.conv."),
    ("conv_head.1.", "final_conv.bn."),
    ("head.", "head.fc."),
)


def _our_name(name: str) -> str:
    for theirs, ours in _NAMES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    part = name.split(".")
    if part[0] == "downsample_layers":
        return ".".join(["stages", part[1], "downsample", *part[3:]])  # without "reduction"
    if part[0] == "stage_norms":
        return ".".join(["stages", part[1], "norm", *part[2:]])
    if part[0] == "stages":
        rest = part[3:]
        if rest[:2] == ["attn", "proj"]:
            rest = rest[1:]
        elif rest[0].startswith("gamma_"):
            rest = ["ls" + rest[0][-1], "gamma"]
        return ".".join(["stages", part[1], "blocks", part[2], *rest])
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict for `model`, from a checkpoint of the authors or one with this model's names.

    The authors' lies under "model" and has other names; layer scales and the query projection, there a linear layer,
    only change shape. Position tables of another window are interpolated linearly, end to end, as the authors do.
    """
    state_dict = state_dict.get("model", state_dict)
    if "downsample_layers.0.stem.0.weight" in state_dict:
        state_dict = {_our_name(name): x for name, x in state_dict.items()}
    own = model.state_dict()
    out = {}
    for name, x in state_dict.items():
        if name.endswith("attn.q.weight") and x.ndim == 2:
            x = x[:, :, None, None]
        elif name.endswith(".gamma"):
            x = x.flatten()
        elif name.endswith(("height_rel", "width_rel")) and name in own and len(x) != len(own[name]):
            # (rows, dim_head), resampled along the rows
            x = F.interpolate(x.float().t()[None], len(own[name]), mode="linear", align_corners=True)[0].t().to(x.dtype)
        out[name] = x
    return out


def _create_uhalonet(variant: str, pretrained: bool = False, **kwargs) -> UHaloNet:
    # the authors' training script stores its arguments, a Namespace, next to the weights; timm takes it in files only
    safe = torch.serialization.safe_globals([argparse.Namespace])
    with safe:
        return build(
            UHaloNet,
            variant,
            pretrained,
            model_cfg=cfgs[variant],
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
            **kwargs,
        )


def _cfg(variant: str) -> dict[str, Any]:
    release = "https://github.com/OpenGVLab/STM-Evaluation/releases/download/cls-ckpt"
    return base_cfg(
        224,
        url=f"{release}/unified_halonet_{variant.removeprefix('uhalonet_')}.pth",
        pool_size=(7, 7),
        crop_pct=0.875,
        first_conv="stem.0",
        classifier="head.fc",
        license="mit",
        origin_url="https://github.com/OpenGVLab/STM-Evaluation",
        paper_ids="arXiv:2211.05781",
        paper_name="Demystify Transformers & Convolutions in Modern Image Deep Networks",
    )


default_cfgs = generate_default_cfgs({f"{variant}.stm_in1k": _cfg(variant) for variant in cfgs})


@register_model
def uhalonet_micro(pretrained: bool = False, **kwargs) -> UHaloNet:
    """U-HaloNet, 4.4 million parameters."""
    return _create_uhalonet("uhalonet_micro", pretrained, **kwargs)


@register_model
def uhalonet_tiny(pretrained: bool = False, **kwargs) -> UHaloNet:
    """U-HaloNet, 31.5 million parameters."""
    return _create_uhalonet("uhalonet_tiny", pretrained, **kwargs)


@register_model
def uhalonet_small(pretrained: bool = False, **kwargs) -> UHaloNet:
    """U-HaloNet, 52.8 million parameters."""
    return _create_uhalonet("uhalonet_small", pretrained, **kwargs)


@register_model
def uhalonet_base(pretrained: bool = False, **kwargs) -> UHaloNet:
    """U-HaloNet, 93.3 million parameters."""
    return _create_uhalonet("uhalonet_base", pretrained, **kwargs)

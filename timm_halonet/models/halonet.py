"""HaloNets H0 to H7 and the convolution / attention hybrids of arXiv 2103.12731, on timm's ByobNet.

What the paper leaves open is an argument, and the defaults are this package's choice: `act_layer`, `mask_border`,
`scale_pos_embed`, `strided_rel` (see `HaloNetCfg`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath
from timm.models import _registry
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import register_model
from timm.models.byobnet import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    LayerFn,
    create_shortcut,
    register_block,
)
from torch import nn

from ..layers import HaloAttention
from ..layers.fold_norm import fold_into_conv, fold_into_values
from ..layers.max_pool import MaxPool2d
from ._base import CheckedModel, build, check_images, default_cfgs_of, override, paper_cfg

__all__ = ["HaloBottleneck", "HaloNet", "HaloNetCfg"]

torch.fx.wrap("check_images")


@dataclass(frozen=True)
class HaloNetCfg:
    """The architecture of one HaloNet; table 6 of the paper for H0 to H7."""

    block_size: int = 8  # pixels
    halo_size: int = 3  # pixels
    value_ratio: float = 1.0  # r_v: value channels over query channels
    expansion: float = 1.0  # r_b: block output channels over query channels
    depths: tuple[int, ...] = (3, 3, 10, 3)  # blocks of each stage
    image_size: int = 256  # the paper's training size; any size runs
    num_features: int = 0  # d_f: width of the 1x1 convolution before pooling; 0 for none
    num_heads: tuple[int, ...] = (4, 8, 8, 8)  # for each stage
    base_width: int = 64  # query channels of the first stage, doubled by each next one
    conv_stages: tuple[int, ...] = ()  # stages, counted from 1, whose attention is a 3x3 convolution
    stem_chs: int = 64
    act_layer: str = "relu"
    norm_layer: str = "batchnorm"
    mask_border: bool = True  # keys outside the image get no weight
    scale_pos_embed: bool = False  # scale the relative logits like q.k
    strided_rel: str = "true"  # relative position of strided queries: from their pixel, or "grid" as timm does
    backend: str | None = None  # of the attention, as in `HaloAttention`; "reference" has second derivatives


cfgs: dict[str, HaloNetCfg] = dict(
    halonet_h0=HaloNetCfg(expansion=0.5, depths=(3, 3, 7, 3)),
    halonet_h1=HaloNetCfg(),
    halonet_h2=HaloNetCfg(expansion=1.25, depths=(3, 3, 11, 3)),
    halonet_h3=HaloNetCfg(block_size=10, expansion=1.5, depths=(3, 3, 12, 3), image_size=320, num_features=1024),
    halonet_h4=HaloNetCfg(
        block_size=12, halo_size=2, expansion=3.0, depths=(3, 3, 12, 3), image_size=384, num_features=1280
    ),
    halonet_h5=HaloNetCfg(
        block_size=14,
        halo_size=2,
        value_ratio=2.5,
        expansion=2.0,
        depths=(3, 3, 23, 3),
        image_size=448,
        num_features=1536,
    ),
    halonet_h6=HaloNetCfg(
        halo_size=4, value_ratio=3.0, expansion=2.75, depths=(3, 3, 24, 3), image_size=512, num_features=1536
    ),
    halonet_h7=HaloNetCfg(
        block_size=10, value_ratio=4.0, expansion=3.5, depths=(3, 3, 26, 3), image_size=600, num_features=2048
    ),
)
cfgs.update(
    halonet_h4_conv12=replace(cfgs["halonet_h4"], conv_stages=(1, 2)),
    halonet_h7_conv1=replace(cfgs["halonet_h7"], conv_stages=(1,)),
    halonet_h7_conv12=replace(cfgs["halonet_h7"], conv_stages=(1, 2)),
    halonet_h7_conv123=replace(cfgs["halonet_h7"], conv_stages=(1, 2, 3)),
)


class HaloBottleneck(nn.Module):
    """Post-activation bottleneck: 1x1 conv to C, halo attention with C * value_ratio values, 1x1 conv to the output.

    Shape: (batch, in_chs, H, W) -> (batch, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        bottle_ratio: float = 1.0,
        group_size: int | None = None,
        downsample: str = "conv1x1",
        layers: LayerFn | None = None,
        drop_block=None,
        drop_path_rate: float = 0.0,
        mid_chs: int = 64,
        value_chs: int = 64,
        attn_kwargs: dict[str, Any] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        layers = layers or LayerFn()
        self.shortcut = create_shortcut(
            downsample, in_chs, out_chs, stride=stride, dilation=dilation, apply_act=False, layers=layers, **dd
        )
        self.conv1_1x1 = layers.conv_norm_act(in_chs, mid_chs, 1, **dd)
        self.self_attn = HaloAttention(
            mid_chs, value_chs, stride=stride, qk_ratio=mid_chs / value_chs, **(attn_kwargs or {}), **dd
        )
        self.post_attn = layers.norm_act(value_chs, **dd)
        self.conv3_1x1 = layers.conv_norm_act(value_chs, out_chs, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.act = layers.act(inplace=True)

    def init_weights(self, zero_init_last: bool = False) -> None:
        if zero_init_last:
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.self_attn.reset_parameters()

    def reparameterize(self) -> None:
        """For inference: make the batch norms a part of the weights before them (timm.utils.reparameterize_model)."""
        self.post_attn = fold_into_values(self.self_attn, self.post_attn)
        for block in (self.conv1_1x1, self.conv3_1x1, self.shortcut):
            if isinstance(block, ConvNormAct):
                fold_into_conv(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.conv1_1x1(x)
        x = self.self_attn(x)
        x = self.post_attn(x)
        x = self.conv3_1x1(x)
        x = self.drop_path(x)
        if self.shortcut is not None:
            x = x + self.shortcut(shortcut)
        return self.act(x)


register_block("halo_bottle", HaloBottleneck)


def _byob_cfg(cfg: HaloNetCfg) -> ByoModelCfg:
    """The same model in ByobNet's terms."""
    blocks = []
    for i, (depth, heads) in enumerate(zip(cfg.depths, cfg.num_heads, strict=True)):
        mid_chs = cfg.base_width * 2**i
        value_chs = round(mid_chs * cfg.value_ratio)
        out_chs = round(mid_chs * cfg.expansion)
        stride = 1 if i == 0 else 2
        if i + 1 in cfg.conv_stages:
            blocks.append(ByoBlockCfg("bottle", d=depth, c=out_chs, s=stride, br=mid_chs / out_chs))
            continue
        for what, chs in (("query", mid_chs), ("value", value_chs)):
            if chs % heads:
                raise ValueError(f"stage {i + 1}: {chs} {what} channels cannot be divided among {heads} heads")
        attn_kwargs = dict(
            num_heads=heads,
            dim_head=mid_chs // heads,
            block_size=cfg.block_size,
            halo_size=cfg.halo_size,
            mask_border=cfg.mask_border,
            scale_pos_embed=cfg.scale_pos_embed,
            strided_rel=cfg.strided_rel,
            backend=cfg.backend,
        )
        block_kwargs = dict(mid_chs=mid_chs, value_chs=value_chs, attn_kwargs=attn_kwargs)
        blocks.append(ByoBlockCfg("halo_bottle", d=depth, c=out_chs, s=stride, block_kwargs=block_kwargs))
    return ByoModelCfg(
        blocks=tuple(blocks),
        stem_type="7x7",
        stem_pool="maxpool",
        stem_chs=cfg.stem_chs,
        num_features=cfg.num_features,
        act_layer=cfg.act_layer,
        norm_layer=cfg.norm_layer,
    )


# of ByobNet, in addition to those that HaloNet names
_BYOB_ARGUMENTS = ("global_pool", "output_stride", "img_size", "drop_rate", "drop_path_rate", "zero_init_last")


class HaloNet(CheckedModel, ByobNet):
    """HaloNet: a ResNet-like pyramid whose bottlenecks attend locally.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes); any H, W (features at 1/2, 1/4, 1/8, 1/16 and 1/32, sizes
    rounded up).

    Args:
        cfg: the variant; any field of `HaloNetCfg` can be overridden by a keyword argument of its name.
        num_classes, in_chans, global_pool, output_stride, drop_rate, drop_path_rate, zero_init_last: as in timm.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument, with the known ones.
    """

    def __init__(self, cfg: HaloNetCfg, num_classes: int = 1000, in_chans: int = 3, device=None, dtype=None, **kwargs):
        theirs = {name: kwargs.pop(name) for name in _BYOB_ARGUMENTS if name in kwargs}
        per_stage = ("depths", "num_heads", "conv_stages")
        cfg = override(cfg, kwargs, "HaloNet", _BYOB_ARGUMENTS, per_stage, len(cfg.depths))
        _check_cfg(cfg)
        super().__init__(_byob_cfg(cfg), num_classes, in_chans, device=device, dtype=dtype, **theirs)
        self.stem.pool = MaxPool2d(3, 2, 1)  # timm's, faster under torch.compile

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As torch's.

        Raises:
            ValueError: the state dict is another model's (timm's own halonet_h1 among them), or holds NaN or infinity.
        """
        own = self.state_dict()
        table = "stages.0.0.self_attn.pos_embed.height_rel"
        if table in own and table in state_dict:
            theirs, ours = tuple(state_dict[table].shape), tuple(own[table].shape)
            if theirs == (ours[0], 8) and ours[1] == 16:
                raise ValueError(
                    f"{table} is {theirs}, here {ours}: a state dict of "
                    "timm's own halonet_h1 (8 heads in stage 1), which timm_halonet replaces in the registry; load it "
                    "into timm.models.byoanet.halonet_h1()"
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(check_images(x, self.in_chans))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final_conv(x)


def _check_cfg(cfg: HaloNetCfg) -> None:
    if cfg.block_size < 1 or cfg.halo_size < 0:
        raise ValueError(
            f"need block_size >= 1 and halo_size >= 0, got block_size={cfg.block_size}, halo_size={cfg.halo_size}"
        )
    if len(cfg.depths) != len(cfg.num_heads):
        raise ValueError(f"depths and num_heads need a number for each stage, got {cfg.depths} and {cfg.num_heads}")
    if min(cfg.depths) < 1 or min(cfg.num_heads) < 1 or cfg.base_width < 1:
        raise ValueError(
            f"need depths, num_heads and base_width >= 1, got {cfg.depths}, {cfg.num_heads}, {cfg.base_width}"
        )
    wrong = set(cfg.conv_stages) - set(range(1, len(cfg.depths) + 1))
    if wrong:
        raise ValueError(f"conv_stages counts from 1 to {len(cfg.depths)}, got {cfg.conv_stages}")


def _create_halonet(variant: str, pretrained: bool = False, **kwargs) -> HaloNet:
    # without weights the model is the paper's (1000 classes, its image size), not the default checkpoint's
    return build(
        HaloNet,
        variant,
        pretrained,
        _base_cfg(variant),
        model_cfg=cfgs[variant],
        feature_cfg=dict(flatten_sequential=True),
        **kwargs,
    )


def _base_cfg(variant: str) -> dict[str, Any]:
    """What a model of this architecture without weights tells timm about its input."""
    return paper_cfg(cfgs[variant].image_size, first_conv="stem.conv1.conv", classifier="head.fc")


default_cfgs = default_cfgs_of({variant: _base_cfg(variant) for variant in cfgs})


def _forget(name: str, module: str) -> None:
    """Take timm's own model of that name out of its registry, as if it had never been registered.

    timm has an untrained halonet_h1, with other widths and heads; registering over it would warn at every import, and
    before timm 1.0.31 leave its entries behind. It stays importable as timm.models.byoanet.halonet_h1.
    """
    if _registry._model_to_module.get(name) != module:
        return
    for entry in [*_registry._model_with_tags.pop(name, []), name]:
        _registry._model_pretrained_cfgs.pop(entry, None)
        _registry._model_has_pretrained.discard(entry)
    _registry._model_default_cfgs.pop(name, None)
    _registry._module_to_models[module].discard(name)
    del _registry._model_to_module[name], _registry._model_entrypoints[name]


_forget("halonet_h1", "byoanet")  # the last thing before ours is there, so that a failure above leaves timm's


@register_model
def halonet_h0(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H0."""
    return _create_halonet("halonet_h0", pretrained, **kwargs)


@register_model
def halonet_h1(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H1."""
    return _create_halonet("halonet_h1", pretrained, **kwargs)


@register_model
def halonet_h2(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H2."""
    return _create_halonet("halonet_h2", pretrained, **kwargs)


@register_model
def halonet_h3(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H3."""
    return _create_halonet("halonet_h3", pretrained, **kwargs)


@register_model
def halonet_h4(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H4."""
    return _create_halonet("halonet_h4", pretrained, **kwargs)


@register_model
def halonet_h5(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H5."""
    return _create_halonet("halonet_h5", pretrained, **kwargs)


@register_model
def halonet_h6(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H6."""
    return _create_halonet("halonet_h6", pretrained, **kwargs)


@register_model
def halonet_h7(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7."""
    return _create_halonet("halonet_h7", pretrained, **kwargs)


@register_model
def halonet_h4_conv12(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H4 with 3x3 convolutions in stages 1 and 2, for transfer (paper, section 4.5)."""
    return _create_halonet("halonet_h4_conv12", pretrained, **kwargs)


@register_model
def halonet_h7_conv1(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7 with 3x3 convolutions in stage 1."""
    return _create_halonet("halonet_h7_conv1", pretrained, **kwargs)


@register_model
def halonet_h7_conv12(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7 with 3x3 convolutions in stages 1 and 2."""
    return _create_halonet("halonet_h7_conv12", pretrained, **kwargs)


@register_model
def halonet_h7_conv123(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7 with 3x3 convolutions in stages 1 to 3."""
    return _create_halonet("halonet_h7_conv123", pretrained, **kwargs)

"""LESA: ResNets with locally enhanced self-attention in their last two stages (arXiv 2107.05637), on timm's ByobNet."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

from ...models._base import CheckedModel, base_cfg, build, check_images, default_cfgs_of
from .attention import LocallyEnhancedSelfAttention
from .checkpoint import checkpoint_filter_fn

__all__ = ["LesaCfg", "LesaResNet", "checkpoint_filter_fn"]

torch.fx.wrap("check_images")


@dataclass(frozen=True)
class LesaCfg:
    """The architecture of one LESA ResNet; section 4.1 of the paper."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks of each stage; the last keeps the resolution of the third
    base_width: int = 64  # channels within a bottleneck of the first stage, doubled by each next one
    num_heads: int = 8
    rel_pos: str = "flattened"  # or "height_width", for images of any size; see LocallyEnhancedSelfAttention
    image_size: int = 224  # the paper's training size


cfgs: dict[str, LesaCfg] = dict(
    lesa_resnet50=LesaCfg(),
    lesa_wide_resnet50_2=LesaCfg(base_width=128),
)


def _byob_cfg(cfg: LesaCfg) -> ByoModelCfg:
    """The same model in ByobNet's terms."""
    conv = dict(type="bottle", br=cfg.base_width / 256)
    attn = dict(type="self_attn", br=cfg.base_width / 256, s=1, block_kwargs=dict(post_attn_na=False))
    one, two, three, four = cfg.depths
    return ByoModelCfg(
        blocks=(
            ByoBlockCfg(d=one, c=256, s=1, **conv),
            ByoBlockCfg(d=two, c=512, s=2, **conv),
            (ByoBlockCfg(d=1, c=1024, s=2, **conv), ByoBlockCfg(d=three - 1, c=1024, **attn)),
            ByoBlockCfg(d=four, c=2048, **attn),
        ),
        stem_type="7x7",
        stem_pool="maxpool",
        stem_chs=64,
        self_attn_layer=LocallyEnhancedSelfAttention,
        self_attn_kwargs=dict(num_heads=cfg.num_heads, rel_pos=cfg.rel_pos),
    )


class LesaResNet(CheckedModel, ByobNet):
    """ResNet (stride in the 3x3 convolutions) that attends globally in stage 3, after its first block, and stage 4.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes). Features at 1/2, 1/4, 1/8 and 1/16, sizes rounded up. With
    features_only and a 4 among out_indices there is the last of them once more, max-pooled to 1/32. H and W are those
    of `img_size` where rel_pos is "flattened", else any.

    Args:
        cfg: the variant; any field of `LesaCfg` can be overridden by a keyword argument of its name.
        num_classes, in_chans: as in timm.
        img_size: height and width, or one number for both, of the images (rel_pos "flattened") or of the largest
            images whose positions all have rows of their own in the tables ("height_width"). None for
            `cfg.image_size`.
        kwargs: as in timm's ByobNet, its global_pool, output_stride, drop_rate, drop_path_rate and zero_init_last
            among them.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument.
    """

    no_decay = (".table", ".height_rel", ".width_rel")  # the relative position tables

    def __init__(
        self,
        cfg: LesaCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        **kwargs,
    ):
        ours = {f.name: kwargs.pop(f.name) for f in fields(LesaCfg) if f.name in kwargs}
        cfg = replace(cfg, **ours)
        if len(cfg.depths) != 4 or min(cfg.depths) < 1 or cfg.base_width < 1:
            raise ValueError(f"need four depths >= 1 and base_width >= 1, got {cfg.depths} and {cfg.base_width}")
        # ByobNet rounds the sizes of maps down, its convolutions round up
        size = [-(-length // 16) * 16 for length in to_2tuple(img_size or cfg.image_size)]
        super().__init__(_byob_cfg(cfg), num_classes, in_chans, img_size=tuple(size), **kwargs)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(check_images(x, self.in_chans))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final_conv(x)


def _create_lesa(variant: str, pretrained: bool = False, **kwargs) -> LesaResNet:
    if kwargs.get("rel_pos") == "height_width":
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        kwargs["pretrained_cfg_overlay"] = {"fixed_input_size": False, **overlay}
    asked = kwargs.get("out_indices")
    pooled: tuple[int, ...] = ()
    if kwargs.get("features_only") and isinstance(asked, list | tuple) and 4 in asked:
        pooled = tuple(asked)
        kwargs["out_indices"] = tuple(sorted({*asked, 3} - {4}))
    model = build(
        LesaResNet,
        variant,
        pretrained,
        _base_cfg(variant),
        model_cfg=cfgs[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )
    if pooled:
        _add_pooled_map(model, pooled)
    return model


def _add_pooled_map(features: Any, out_indices: tuple[int, ...]) -> None:
    """A fifth map, at 1/32: the last, max-pooled as in torchvision's `LastLevelMaxPool`. LESA's own ends at 1/16.

    For decoders that count on the five maps of a ResNet, such as those of segmentation_models_pytorch.
    """
    info, last = features.feature_info, list(features)[-1]
    features["pool"] = nn.MaxPool2d(1, 2)
    features.return_layers["pool"] = "4"
    if 3 not in out_indices:
        del features.return_layers[last]
    info.info.append({**info.info[3], "reduction": 32, "module": "pool", "index": 4})
    info.out_indices = out_indices


def _base_cfg(variant: str) -> dict[str, Any]:
    """What a model of this architecture without weights tells timm about its input."""
    size = cfgs[variant].image_size
    return base_cfg(
        size,
        interpolation="bilinear",
        fixed_input_size=True,
        pool_size=(size // 16, size // 16),
        crop_pct=0.875,
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        license="apache-2.0",
        paper_ids="arXiv:2107.05637",
        paper_name="Locally Enhanced Self-Attention",
    )


default_cfgs = default_cfgs_of({variant: _base_cfg(variant) for variant in cfgs})


@register_model
def lesa_resnet50(pretrained: bool = False, **kwargs) -> LesaResNet:
    """ResNet-50 with locally enhanced self-attention."""
    return _create_lesa("lesa_resnet50", pretrained, **kwargs)


@register_model
def lesa_wide_resnet50_2(pretrained: bool = False, **kwargs) -> LesaResNet:
    """Wide ResNet-50-2 with locally enhanced self-attention."""
    return _create_lesa("lesa_wide_resnet50_2", pretrained, **kwargs)

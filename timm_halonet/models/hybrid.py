"""SE-ResNets whose last stage attends: the detection backbones of arXiv 2103.12731, on timm's ResNet.

The paper says: an SE-ResNet, halo attention in the three blocks of the last stage, block size 8 or 32, halo 3. The rest
is this package's choice. Attention takes the place of the 3x3 convolution and is followed by its batch norm and
activation. As in the last stage of a HaloNet, there are 8 heads, and strided queries downsample in the stage's first
block. Squeeze-and-excitation stays where timm has it.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._registry import register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..layers import HaloAttention
from ._base import CheckedModel, build, check_images, default_cfgs_of, override, paper_cfg

__all__ = ["HaloResNet", "HaloResNetCfg", "checkpoint_filter_fn"]

torch.fx.wrap("check_images")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HaloResNetCfg:
    """The architecture of one SE-ResNet with halo attention in the last stage."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    block_size: int = 8  # pixels
    halo_size: int = 3  # pixels
    num_heads: int = 8
    mask_border: bool = True  # keys outside the image get no weight
    scale_pos_embed: bool = False  # scale the relative logits like q.k
    strided_rel: str = "true"  # relative position of strided queries: from their pixel, or "grid" as timm does
    backend: str | None = None  # of the attention, as in `HaloAttention`; "reference" has second derivatives
    image_size: int = 224  # that of timm's SE-ResNets; any size runs


cfgs: dict[str, HaloResNetCfg] = dict(
    seresnet50_halo8=HaloResNetCfg(),
    seresnet50_halo32=HaloResNetCfg(block_size=32),
    seresnet101_halo8=HaloResNetCfg(depths=(3, 4, 23, 3)),
)

# arguments of timm's ResNet that the variant decides
_FIXED = {"self", "block", "layers", "block_args"}
_RESNET_ARGUMENTS = [name for name in inspect.signature(ResNet.__init__).parameters if name not in _FIXED]


class HaloResNet(CheckedModel, ResNet):
    """timm's SE-ResNet, with halo attention in place of the 3x3 convolutions of the last stage.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes); any H, W (features at 1/2, 1/4, 1/8, 1/16 and 1/32, sizes
    rounded up).

    Args:
        cfg: the variant; any field of `HaloResNetCfg` can be overridden by a keyword argument of its name.
        output_stride: 32, 16 or 8. Where the last stage keeps the resolution, its attention does too; windows keep
            their size in pixels of the map (nothing is dilated but convolutions).
        img_size: ignored, since any size runs.
        kwargs: those of timm's ResNet (num_classes, in_chans, drop_path_rate, stem_type, ...).

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument, with the known ones.
    """

    def __init__(
        self,
        cfg: HaloResNetCfg,
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ):
        theirs = {name: kwargs.pop(name) for name in _RESNET_ARGUMENTS if name in kwargs}
        cfg = override(cfg, kwargs, "HaloResNet", [*_RESNET_ARGUMENTS, "img_size"])
        if len(cfg.depths) != 4 or min(cfg.depths) < 1:
            raise ValueError(f"depths must be four numbers from 1 up, got {cfg.depths}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        super().__init__(
            Bottleneck,
            tuple(cfg.depths),
            output_stride=output_stride,
            block_args=dict(attn_layer="se"),
            device=device,
            dtype=dtype,
            **theirs,
        )
        for block in self.layer4:
            conv = block.conv2
            block.conv2 = HaloAttention(
                conv.in_channels,
                conv.out_channels,
                stride=conv.stride[0],
                num_heads=cfg.num_heads,
                block_size=cfg.block_size,
                halo_size=cfg.halo_size,
                scale_pos_embed=cfg.scale_pos_embed,
                mask_border=cfg.mask_border,
                strided_rel=cfg.strided_rel,
                backend=cfg.backend,
                device=device,
                dtype=dtype,
            )

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's for the convolutions, `HaloAttention`'s for the attention."""
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(check_images(x, self.in_chans)))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict for `model`, from one of its own or of timm's plain SE-ResNet of the same depth.

    Of the second the last stage's 3x3 convolutions have no place here: they are left out with a warning, and the
    attention keeps the values that it has in `model`. Everything else must match, so loading stays strict. timm calls
    this by itself: `timm.create_model("seresnet50_halo8", pretrained=True, pretrained_cfg_overlay=dict(file=PATH))`,
    or `dict(hf_hub_id="timm/seresnet50.a1_in1k")` for timm's ImageNet weights.
    """
    own = model.state_dict()
    dropped = [
        name
        for name in state_dict
        if name.endswith(".conv2.weight") and name not in own and f"{name.removesuffix('weight')}q.weight" in own
    ]
    if not dropped:
        return state_dict
    _logger.warning(
        f"weights of a plain SE-ResNet: {', '.join(dropped)} left out; the halo attention in their place is untrained"
    )
    out = {name: x for name, x in state_dict.items() if name not in dropped}
    places = tuple(name.removesuffix("weight") for name in dropped)
    return {**out, **{name: x for name, x in own.items() if name.startswith(places)}}


def _create_hybrid(variant: str, pretrained: bool = False, **kwargs) -> HaloResNet:
    return build(
        HaloResNet,
        variant,
        pretrained,
        _base_cfg(variant),
        model_cfg=cfgs[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def _base_cfg(variant: str) -> dict[str, Any]:
    """What a model of this architecture without weights tells timm about its input."""
    return paper_cfg(cfgs[variant].image_size, first_conv="conv1", classifier="fc")


default_cfgs = default_cfgs_of({variant: _base_cfg(variant) for variant in cfgs})


@register_model
def seresnet50_halo8(pretrained: bool = False, **kwargs) -> HaloResNet:
    """SE-ResNet-50, halo attention with blocks of 8x8 in the last stage."""
    return _create_hybrid("seresnet50_halo8", pretrained, **kwargs)


@register_model
def seresnet50_halo32(pretrained: bool = False, **kwargs) -> HaloResNet:
    """SE-ResNet-50, halo attention with blocks of 32x32 in the last stage."""
    return _create_hybrid("seresnet50_halo32", pretrained, **kwargs)


@register_model
def seresnet101_halo8(pretrained: bool = False, **kwargs) -> HaloResNet:
    """SE-ResNet-101, halo attention with blocks of 8x8 in the last stage."""
    return _create_hybrid("seresnet101_halo8", pretrained, **kwargs)

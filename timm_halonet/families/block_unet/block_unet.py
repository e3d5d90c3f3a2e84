"""A U-Net with block-wise self-attention, with its own encoder or any timm backbone's."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import BlockSelfAttention2d


def double_conv(in_chs: int, out_chs: int) -> nn.Sequential:
    """Twice 3x3 convolution with bias, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for chs in (in_chs, out_chs):
        layers += [nn.Conv2d(chs, out_chs, 3, padding=1), nn.BatchNorm2d(out_chs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PlainEncoder(nn.Module):
    """The U-Net's own encoder: five maps at 1, 1/2, 1/4, 1/8 and 1/16, (1, 2, 4, 8, 8) * width channels."""

    def __init__(self, in_chans: int, width: int):
        super().__init__()
        self.channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.stages = nn.ModuleList(map(double_conv, [in_chans, *self.channels], self.channels))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for i, stage in enumerate(self.stages):
            # ceil_mode: an odd map's last row pools what it has, and a map of one pixel stays one
            x = stage(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            features.append(x)
        return features


class BackboneEncoder(nn.Module):
    """The feature maps of a timm model, finest first."""

    def __init__(self, name: str, in_chans: int, **kwargs):
        from timm import create_model  # here, so that importing this module does not import timm

        super().__init__()
        self.backbone = create_model(name, features_only=True, in_chans=in_chans, **kwargs)
        self.channels = self.backbone.feature_info.channels()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.backbone(x)
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and its kin
            features = [f.permute(0, 3, 1, 2) for f in features]
        return features


class UpBlock(nn.Module):
    """Bilinear upsampling to `size`, the encoder's map of that size if there is one, `double_conv`."""

    def __init__(self, in_chs: int, skip_chs: int, out_chs: int):
        super().__init__()
        self.conv = double_conv(in_chs + skip_chs, out_chs)

    def forward(self, x: torch.Tensor, size: torch.Size, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.conv(x if skip is None else torch.cat([skip, x], 1))


class BlockAttentionUNet(nn.Module):
    """A U-Net whose decoder attends block by block just before its last upsampling (arXiv 1909.05054).

    With its own encoder the decoder's widths are (4, 2, 1, 1) * width, and the attention stands at half the image's
    size, on `width` channels. Over a timm backbone there is one step a map of it, widths double from the finest to the
    coarsest, and the last step, to the image's size, has no map of the encoder (this package's choice).

    Args:
        num_classes: channels of the output, the background's among them.
        in_chans: channels of the image.
        width: 64 in the paper.
        backbone: None for the U-Net's own encoder, or the name of any timm model that has `features_only`, such as
            "halonet_h0".
        attention_layers: how many `BlockSelfAttention2d` in sequence, 0 for a plain U-Net; 2 in the paper.
        block_size, window_size, symmetric: see `BlockSelfAttention2d`.
        **backbone_kwargs: for `timm.create_model`: pretrained, img_size, out_indices ...

    Shape: (batch, in_chans, H, W) -> (batch, num_classes, H, W), logits; any H, W that the backbone takes, and any at
    all with the U-Net's own encoder (training's batch norm wants more than one value a channel: from 17 pixels on).

    Raises:
        ValueError: for numbers that do not fit.
    """

    def __init__(
        self,
        num_classes: int = 7,
        in_chans: int = 1,
        *,
        width: int = 64,
        backbone: str | None = None,
        attention_layers: int = 2,
        block_size: int = 24,
        window_size: int = 36,
        symmetric: bool = False,
        **backbone_kwargs,
    ):
        super().__init__()
        if min(num_classes, in_chans, width) < 1 or attention_layers < 0:
            raise ValueError(
                "need num_classes, in_chans and width >= 1, attention_layers >= 0, "
                f"got {num_classes=}, {in_chans=}, {width=}, {attention_layers=}"
            )
        if backbone is None and backbone_kwargs:
            raise ValueError(f"{', '.join(backbone_kwargs)}: arguments of a backbone, and backbone= is not given")
        self.in_chans = in_chans
        self.encoder: nn.Module
        if backbone is None:
            self.encoder = PlainEncoder(in_chans, width)
            skips = self.encoder.channels[-2::-1]
        else:
            self.encoder = BackboneEncoder(backbone, in_chans, **backbone_kwargs)
            skips = [*self.encoder.channels[-2::-1], 0]
        widths = [width * 2 ** max(0, len(skips) - 2 - i) for i in range(len(skips))]  # ... 4, 2, 1, 1
        in_chs = [self.encoder.channels[-1], *widths[:-1]]
        self.decoder = nn.ModuleList(map(UpBlock, in_chs, skips, widths))
        sizes = (block_size, window_size, symmetric)
        self.attention = nn.Sequential(*(BlockSelfAttention2d(in_chs[-1], *sizes) for _ in range(attention_layers)))
        self.head = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (batch, {self.in_chans}, height, width), got shape {tuple(x.shape)}")
        size = x.shape[2:]
        *skips, x = self.encoder(x)
        for up in self.decoder[:-1]:
            skip = skips.pop()
            x = up(x, skip.shape[2:], skip)
        x = self.attention(x)
        x = self.decoder[-1](x, size, skips.pop() if skips else None)
        return self.head(x)

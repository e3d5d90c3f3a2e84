"""Context-only organs: six alike discs in a fixed layout, to be told apart by where the others are.

Every image has all six. They share texture, brightness and size, and the layout is moved at random (and turned,
scaled and jittered a little), so that neither a pixel's surroundings nor its place in the image says which organ it is.
A U-Net alone is compared with one that has block-wise self-attention (arXiv 1909.05054) before its last upsampling.
"""

import argparse
import math
import sys
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from runs import TEST_SEED, Batch, Task, main
from torch import nn

from timm_halonet.families.block_unet.block_unet import BlockAttentionUNet
from timm_halonet.report.plots import COLORS

# row and column from the layout's centre, in 64ths of the image's side
LAYOUT = ((-9.0, -11.5), (-11.5, 0.0), (-8.5, 11.5), (2.5, -6.0), (2.5, 6.0), (11.5, 0.0))
RADIUS = 2.6
# of the layout: radians, factor, and 64ths for the last two
ROTATION, SCALING, JITTER, SHIFT = math.radians(10), 0.1, 0.7, 13.0
NOISE = 0.5  # standard deviation of the texture; organs are 1 brighter than the rest


def make_images(count: int, size: int, generator: torch.Generator) -> Batch:
    """Images (count, 1, size, size) and classes (count, size, size), 0 for the background, organs from 1."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    organs = len(LAYOUT)
    angle, scale = ROTATION * uniform(1), 1 + SCALING * uniform(1)
    y, x = torch.tensor(LAYOUT).unbind(1)
    turned = torch.stack([y * angle.cos() - x * angle.sin(), y * angle.sin() + x * angle.cos()], 1)
    unit = size / 64
    centre = size / 2 + unit * (scale[:, None] * turned + JITTER * uniform(2, organs) + SHIFT * uniform(2, 1))
    radius = unit * RADIUS * (1 + 0.15 * uniform(organs))
    pixel = torch.arange(size) + 0.5
    dy, dx = pixel[:, None] - centre[:, 0, :, None, None], pixel - centre[:, 1, :, None, None]
    inside = dy**2 + dx**2 < radius[..., None, None] ** 2  # count, organs, size, size
    classes = (inside * torch.arange(1, organs + 1)[:, None, None]).amax(1)
    images = (classes > 0).float() + NOISE * torch.randn(count, size, size, generator=generator)
    return images[:, None], classes


def dice(predicted: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Dice coefficient of each organ, the mean over images: (images, H, W) twice -> (organs,)"""
    organs = torch.arange(1, len(LAYOUT) + 1, device=classes.device)[:, None, None]
    a, b = predicted[:, None] == organs, classes[:, None] == organs
    return (2 * (a & b).sum((2, 3)) / (a.sum((2, 3)) + b.sum((2, 3))).clamp(min=1)).mean(0)


class Organs(Task):
    """U-Nets with and without block attention at segmenting synthetic organs, judged by mean Dice."""

    name = "organs"
    variants: ClassVar = {
        "unet": "U-Net",
        "one_sided_1": "U-Net + 1 layer, one-sided",
        "one_sided_2": "U-Net + 2 layers, one-sided",
        "symmetric_2": "U-Net + 2 layers, symmetric",
    }
    scores: ClassVar = {"dice": "mean Dice"} | {f"dice_{n}": f"organ {n}" for n in range(1, len(LAYOUT) + 1)}
    options: ClassVar = {
        "width": (8, "channels of the U-Net's first stage; 64 in the paper"),
        "size": (64, "side of the images, in pixels"),
        "block_size": (6, "pixels of the map at half the image's size; 24 of 128 in the paper"),
        "window_size": (10, "pixels of that map; 36 in the paper"),
    }
    defaults: ClassVar = dict(steps=1200, batch_size=16, lr=3e-3, test_size=256)

    def model(self, variant: str, args: argparse.Namespace) -> nn.Module:
        layers = {"unet": 0, "one_sided_1": 1}.get(variant, 2)
        return BlockAttentionUNet(
            len(LAYOUT) + 1,
            width=args.width,
            attention_layers=layers,
            block_size=args.block_size,
            window_size=args.window_size,
            symmetric=variant == "symmetric_2",
        )

    def data(self, count: int, args: argparse.Namespace, generator: torch.Generator) -> Batch:
        return make_images(count, args.size, generator)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target)

    def judge(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        predicted = torch.cat([model(x).argmax(1) for x in inputs.split(32)])
        values = (100 * dice(predicted, targets)).tolist()
        return {"dice": sum(values) / len(values)} | {f"dice_{n}": v for n, v in enumerate(values, 1)}

    def notes(self, args: argparse.Namespace) -> str:
        """What place in the image alone tells, were all outlines known: the class most often seen at each pixel."""
        _, seen = make_images(4096, args.size, torch.Generator().manual_seed(TEST_SEED + 1))
        counts = torch.stack([(seen == n).sum(0) for n in range(1, len(LAYOUT) + 1)])
        _, classes = make_images(args.test_size, args.size, torch.Generator().manual_seed(TEST_SEED))
        guess = torch.where(classes > 0, counts.argmax(0) + 1, 0)
        score = 100 * dice(guess, classes).mean().item()
        return (
            "Given all outlines, naming each pixel of an organ after the class most often seen at its place in the "
            f"image would reach a mean Dice of {score:.1f} %: the rest is context."
        )

    def example(self, args: argparse.Namespace) -> Image.Image:
        """Three images and, below them, their classes."""
        images, classes = make_images(3, args.size, torch.Generator().manual_seed(TEST_SEED))
        gray = (images[:, 0, ..., None].expand(-1, -1, -1, 3) * 70 + 90).clamp(0, 255)
        hexes = ("#000000", *COLORS[: len(LAYOUT)])
        palette = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in hexes], dtype=torch.float32)
        rows = [torch.cat(list(x), 1) for x in (gray, palette[classes])]
        picture = Image.fromarray(torch.cat(rows).byte().numpy())
        factor = max(1, 192 // args.size)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sys.exit(main(Organs()))

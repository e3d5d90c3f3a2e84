"""Where a model looks: the attention of one block in each stage, drawn over the photo."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .layers import HaloAttention
from .ops import halo_attention_weights


@dataclass
class BlockAttention:
    """The attention of one block of one layer; rectangles are (top, left, bottom, right) on the layer's map."""

    name: str  # of the layer
    map_size: tuple[int, int]
    block: tuple[int, int, int, int]
    window: tuple[int, int, int, int]  # clipped to the map
    weights: torch.Tensor  # (map height, map width), sums to 1 where the border is masked


def attention_of(model: nn.Module, image: torch.Tensor, at: tuple[float, float]) -> list[BlockAttention]:
    """The attention, averaged over heads and the block's queries, of the block that holds a position.

    One entry a stage: its last halo attention layer.

    Args:
        model: a HaloNet, or any model with `HaloAttention` layers below `stages`.
        image: (1, channels, height, width), normalised.
        at: (y, x), each from 0 to 1, as a part of the image.

    Raises:
        ValueError: `at` outside the image, or a model without halo attention.
    """
    if not (0 <= at[0] < 1 and 0 <= at[1] < 1):
        raise ValueError(f"the position must lie in the image: 0 <= y, x < 1 as parts of it, got {at}")
    layers: dict[str, tuple[str, HaloAttention]] = {}  # stage -> its last layer
    for name, module in model.named_modules():
        if isinstance(module, HaloAttention):
            layers[".".join(name.split(".")[:2])] = (name, module)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no halo attention to look at")
    found: list[BlockAttention] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.append(_block_attention(name, module, args[0], at))
        )
        for name, module in layers.values()
    ]
    try:
        with torch.inference_mode():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _block_attention(name: str, layer: HaloAttention, x: torch.Tensor, at: tuple[float, float]) -> BlockAttention:
    height, width = x.shape[2:]
    size, halo = layer.block_size, layer.halo_size
    i, j = int(at[0] * height) // size, int(at[1] * width) // size
    # the block and its window alone: their pixels are all that the weights depend on
    top, left = max(0, i * size - halo), max(0, j * size - halo)
    bottom, right = min(height, (i + 1) * size + halo), min(width, (j + 1) * size + halo)
    q, k, _ = layer.project(x)
    weights = halo_attention_weights(
        q,
        k,
        layer.pos_embed.height_rel,
        layer.pos_embed.width_rel,
        block_size=size,
        halo_size=halo,
        query_stride=layer.query_stride,
        scale=layer.scale,
        scale_rel=layer.scale_pos_embed,
        mask_border=layer.mask_border,
        strided_rel=layer.strided_rel,
    )[0, i, j]  # heads, query rows, query columns, window, window
    stride = layer.query_stride
    rows = -(-(min(height, (i + 1) * size) - i * size) // stride)
    cols = -(-(min(width, (j + 1) * size) - j * size) // stride)
    mean = weights[:, :rows, :cols].float().mean(dim=(0, 1, 2))
    full = torch.zeros(height, width)
    first_row, first_col = i * size - halo, j * size - halo
    full[top:bottom, left:right] = mean[top - first_row : bottom - first_row, left - first_col : right - first_col]
    block = (i * size, j * size, min(height, (i + 1) * size), min(width, (j + 1) * size))
    return BlockAttention(name, (height, width), block, (top, left, bottom, right), full)


def draw(photo: Image.Image, found: list[BlockAttention], at: tuple[float, float], panel: int = 320) -> Image.Image:
    """The photo with the position marked, and beside it each layer's attention over it; panels `panel` pixels high.

    Bright is attended to; white is the block, grey its window.
    """
    width = max(1, round(panel * photo.width / photo.height))
    photo = photo.resize((width, panel), Image.Resampling.BICUBIC)
    caption, gap = 34, 8
    font = ImageFont.load_default(size=12)
    sheet = Image.new("RGB", ((width + gap) * (len(found) + 1) - gap, panel + caption), "white")
    titles = ["photo", *(f"{a.name.removesuffix('.self_attn')}, map {a.map_size[0]}x{a.map_size[1]}" for a in found)]
    details = [f"at y {at[0]:.2f}, x {at[1]:.2f}", *(_detail(a) for a in found)]
    for n, attention in enumerate([None, *found]):
        picture = photo if attention is None else _overlay(photo, attention)
        pen = ImageDraw.Draw(picture)
        y, x = at[0] * panel, at[1] * width
        if attention is not None:
            for box, color in ((attention.window, "#a0a0a0"), (attention.block, "white")):
                sy, sx = panel / attention.map_size[0], width / attention.map_size[1]
                pen.rectangle((box[1] * sx, box[0] * sy, box[3] * sx - 1, box[2] * sy - 1), outline=color, width=2)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#ff2020", outline="white")
        left = n * (width + gap)
        sheet.paste(picture, (left, caption))
        text = ImageDraw.Draw(sheet)
        text.text((left + 2, 2), titles[n], fill="black", font=font)
        text.text((left + 2, 17), details[n], fill="#505050", font=font)
    return sheet


def _detail(a: BlockAttention) -> str:
    def size(box: tuple[int, int, int, int]) -> str:
        return f"{box[2] - box[0]}x{box[3] - box[1]}"

    return f"block {size(a.block)}, window {size(a.window)}"


def _overlay(photo: Image.Image, a: BlockAttention) -> Image.Image:
    """The photo, dark where the attention is weak and tinted where it is strong."""
    heat = (a.weights / a.weights.max().clamp_min(1e-12)).sqrt()  # sqrt: weak attention stays visible
    mask = Image.fromarray((heat * 255).byte().numpy()).resize(photo.size, Image.Resampling.BILINEAR)
    dark = Image.blend(photo, Image.new("RGB", photo.size, "#101830"), 0.75)
    bright = Image.blend(photo, Image.new("RGB", photo.size, "#ffc000"), 0.35)
    return Image.composite(bright, dark, mask)

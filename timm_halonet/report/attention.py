"""Where a model looks: the attention of one block in each stage, drawn over the photo."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from ..layers import HaloAttention
from ..ops.reference import attention_weights_reference
from .plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    rel_height, rel_width = layer.pos_embed()
    # heads, query rows, query columns, window, window
    weights = attention_weights_reference(q, k, rel_height, rel_width, layer.options)[0, i, j]
    stride = layer.query_stride
    rows = -(-(min(height, (i + 1) * size) - i * size) // stride)
    cols = -(-(min(width, (j + 1) * size) - j * size) // stride)
    mean = weights[:, :rows, :cols].float().mean(dim=(0, 1, 2))
    full = torch.zeros(height, width)
    first_row, first_col = i * size - halo, j * size - halo
    full[top:bottom, left:right] = mean[top - first_row : bottom - first_row, left - first_col : right - first_col]
    block = (i * size, j * size, min(height, (i + 1) * size), min(width, (j + 1) * size))
    return BlockAttention(name, (height, width), block, (top, left, bottom, right), full)


@style()
def draw(photo: Image.Image, found: list[BlockAttention], at: tuple[float, float], panel: int = 320) -> "Figure":
    """The photo with the position marked, and next to it each layer's attention over it; panels `panel` pixels high.

    Bright is attended to; white is the block, grey its window.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    dpi, aspect = 100, photo.width / photo.height
    width = panel * min(max(aspect, 0.8), 3.0)  # of a cell: wide enough for the title, limited for panoramas
    scale = min(width / photo.width, panel / photo.height)
    photo = photo.resize([max(1, round(side * scale)) for side in photo.size], Image.Resampling.BICUBIC)
    figure = Figure(figsize=(width * (len(found) + 1) / dpi, (panel + 40) / dpi), dpi=dpi)
    figure.set_layout_engine("none")
    grid = dict(left=0, right=1, bottom=0, top=panel / (panel + 40), wspace=0.03)
    axes = figure.subplots(1, len(found) + 1, squeeze=False, gridspec_kw=grid)[0]
    # dark where the attention is weak, tinted where it is strong
    colors = LinearSegmentedColormap.from_list("attention", ["#101830c0", "#ffc00058"])
    for ax, attention in zip(axes, [None, *found], strict=True):
        height, width = attention.map_size if attention else (1, 1)
        place = dict(extent=(0, width, height, 0), aspect="auto")  # pixels of the map
        ax.imshow(photo, **place)
        title = f"photo\nat y {at[0]:.2f}, x {at[1]:.2f}"
        if attention:
            heat = attention.weights.sqrt().numpy()  # weak attention stays visible
            ax.imshow(heat, vmin=0, cmap=colors, interpolation="bilinear", interpolation_stage="data", **place)
            for (top, left, bottom, right), color in ((attention.window, "#a0a0a0"), (attention.block, "white")):
                box = ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.5))
                box.set(edgecolor=color)
            name = attention.name.removesuffix(".self_attn")
            title = f"{name}, map {height}x{width}\nblock {_size(attention.block)}, window {_size(attention.window)}"
        ax.plot(at[1] * width, at[0] * height, "o", color="#ff2020", markeredgecolor="white", markersize=6)
        ax.set_title(title, fontsize=8, loc="left")
        ax.set_box_aspect(1 / aspect)
        ax.set_anchor("W")
        ax.set_axis_off()
    return figure


def _size(box: tuple[int, int, int, int]) -> str:
    return f"{box[2] - box[0]}x{box[3] - box[1]}"

"""From an item of a dataset to what torchvision's detectors take, by transforms v2."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .configs import TrainCfg


class RandomScaleCrop(v2.Transform):
    """A square of the image at a random place and scale; outside the image it is black, and background.

    Unlike RandomResizedCrop the scale does not depend on the image's size: a cell is as large in a crop of a wide view
    as in one of a narrow view.

    Args:
        size: side of the result in pixels.
        scale: result over image, pixels; the middle of the range.
        jitter: range of a factor on it, drawn evenly on a logarithmic scale.
    """

    def __init__(self, size: int, scale: float = 1.0, jitter: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        if size < 1 or scale <= 0 or not 0 < jitter[0] <= jitter[1]:
            raise ValueError(
                f"need size >= 1, scale > 0 and 0 < jitter[0] <= jitter[1], got {size=}, {scale=}, {jitter=}"
            )
        self.size, self.scale, self.jitter = size, scale, jitter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        low, high = map(math.log, self.jitter)
        factor = self.scale * math.exp(low + (high - low) * torch.rand(()).item())
        side = max(1, round(self.size / factor))
        corner = [math.floor(torch.rand(()).item() * (abs(length - side) + 1)) for length in (height, width)]
        # in a larger image the square lies inside; a smaller image lies inside the square
        top, left = (c if length >= side else -c for c, length in zip(corner, (height, width), strict=True))
        return dict(top=top, left=left, height=side, width=side)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        inpt = self._call_kernel(F.crop, inpt, **params)  # first: what is cut off need not be resized
        return self._call_kernel(F.resize, inpt, size=[self.size, self.size], antialias=True)


class ToSample:
    """Image in float32 from 0 to 1, and a target of plain tensors: boxes, labels, masks and image_id.

    Objects of which less than a pixel's width or height is left are dropped.
    """

    def __call__(self, image: tv_tensors.Image, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        sample: dict[str, Any] = {"image_id": target["image_id"]}
        if "label_map" in target:
            masks, boxes = instances(target["label_map"].as_subclass(torch.Tensor)[0])
            sample.update(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64), masks=masks)
        else:
            sample.update(boxes=target["boxes"].as_subclass(torch.Tensor), labels=target["labels"])
            if "masks" in target:
                sample["masks"] = target["masks"].as_subclass(torch.Tensor)
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        keep = (sides >= 1).all(dim=1)
        for key in ("boxes", "labels", "masks"):
            if key in sample:
                sample[key] = sample[key][keep]
        return F.to_dtype(image, torch.float32, scale=True).as_subclass(torch.Tensor), sample


def instances(label_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N, H, W) in uint8 and boxes (N, 4) as x1, y1, x2, y2 of the instances of a label map (H, W)."""
    values = label_map.unique()
    values = values[values != 0]
    masks = label_map == values[:, None, None]
    if not len(values):
        return masks.byte(), torch.zeros(0, 4)
    edges = []
    for axis in (1, 2):  # columns, then rows
        there = masks.any(dim=axis).byte()
        edges += [there.argmax(dim=1), there.shape[1] - there.flip(1).argmax(dim=1)]
    x1, x2, y1, y2 = edges
    return masks.byte(), torch.stack([x1, y1, x2, y2], dim=1).float()


def evaluation_transform() -> v2.Compose:
    """`ToSample` alone, for images that are evaluated in full."""
    return v2.Compose([ToSample()])


def training_transform(cfg: TrainCfg, scale: float = 1.0) -> v2.Compose:
    """Crop, flips and colour, as the config says, then `ToSample`. All draw from PyTorch's generator of the process.

    Args:
        scale: the detector's.

    Raises:
        ValueError: flips that are not h, v, hv or none.
    """
    if cfg.flips not in ("h", "v", "hv", "none"):
        raise ValueError(f"flips is {cfg.flips!r}, expected h, v, hv or none")
    steps: list[Callable[..., Any]] = []
    if cfg.crop:
        steps.append(RandomScaleCrop(cfg.crop, scale, cfg.jitter))
    if "h" in cfg.flips:
        steps.append(v2.RandomHorizontalFlip())
    if "v" in cfg.flips:
        steps.append(v2.RandomVerticalFlip())
    if cfg.color:
        steps.append(v2.ColorJitter(cfg.color, cfg.color, cfg.color, cfg.color / 4))
    return v2.Compose([*steps, ToSample()])

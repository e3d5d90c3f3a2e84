"""Pictures of detections over photos."""

import colorsys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from . import rle

_CROWDED = 25  # objects beyond which boxes and scores would hide what is below them
_TITLE = 18  # pixels


def draw_detections(
    image: torch.Tensor, found: dict[str, Any], names: Sequence[str], boxes: bool | None = None
) -> torch.Tensor:
    """The photo with masks, boxes, names and scores on it, each object in its own colour.

    Of overlapping masks, the first is shown.

    Args:
        image: (3, H, W) in uint8.
        found: as `detect` gives it; scores may be missing, as in ground truth.
        names: of the classes, from label 1.
        boxes: whether to draw boxes; None: where there are no masks, or 25 objects at most. Up to as many have their
            score written, and their name where there is more than one class.

    Returns:
        (3, H, W) in uint8.
    """
    count = len(found["boxes"])
    if not count:
        return image
    # neighbours in the list get colours far apart: steps of the golden angle
    colors = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(n * 0.618 % 1, 0.85, 1.0)) for n in range(count)]
    height, width = image.shape[-2:]
    if "rles" in found:
        masks = torch.stack([torch.from_numpy(rle.decode(r, height, width)) for r in found["rles"]]).bool()
        masks &= masks.cumsum(0) == 1  # the first, which is the best, has a pixel: torchvision would blacken overlaps
        image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    if boxes is None:
        boxes = "rles" not in found or count <= _CROWDED
    if boxes:
        names_shown = [names[label - 1] if len(names) > 1 else "" for label in found["labels"].tolist()]
        scores = [f"{score:.2f}" for score in found["scores"].tolist()] if "scores" in found else [""] * count
        texts = [f"{name} {score}".strip() for name, score in zip(names_shown, scores, strict=True)]
        shown = texts if any(texts) and count <= _CROWDED else None
        image = draw_bounding_boxes(
            image, found["boxes"], shown, colors=colors, width=max(1, min(height, width) // 300)
        )
    return image


def contact_sheet(rows: Sequence[Sequence[tuple[str, torch.Tensor]]], cell: int = 320) -> Image.Image:
    """Pictures in rows, each fitted into a square of `cell` pixels, with its title above it.

    Args:
        rows: titles and pictures (3, H, W) in uint8.

    Raises:
        ValueError: no picture.
    """
    if not any(rows):
        raise ValueError("no pictures for a contact sheet")
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, len(rows) * (cell + _TITLE + 8) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for n, row in enumerate(rows):
        for m, (title, picture) in enumerate(row):
            # Pillow's own font has no further letters, and no two lines fit
            title = title.encode("latin-1", "backslashreplace").decode("latin-1").replace("\n", "\\n")
            x, y = 8 + m * (cell + 8), 8 + n * (cell + _TITLE + 8)
            while pen.textlength(title, font=font) > cell and len(title) > 4:
                title = title[: len(title) // 2 - 2] + "…" + title[len(title) // 2 + 2 :]
            pen.text((x, y), title, fill="#202020", font=font)
            photo = F.to_pil_image(picture)
            scale = cell / max(photo.size)
            photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
            sheet.paste(photo, (x, y + _TITLE))
    return sheet


def truth_of(annotations: Sequence[dict[str, Any]], labels: dict[Any, int], height: int, width: int) -> dict[str, Any]:
    """COCO annotations of an image, as `draw_detections` takes them; crowds are left out."""
    own = [a for a in annotations if not a.get("iscrowd")]
    boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found: dict[str, Any] = {"boxes": boxes, "labels": torch.tensor([labels[a["category_id"]] for a in own])}
    if own and all(a.get("segmentation") for a in own):
        found["rles"] = [rle.encode(rle.decode(a["segmentation"], height, width)) for a in own]
    return found

"""Masks as run lengths, by faster-coco-eval; the only room beside the evaluation that needs it."""

from importlib import import_module
from typing import Any

import numpy as np


def coco_tools(module: str = "faster_coco_eval") -> Any:
    """faster-coco-eval, or a module of it.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as e:
        raise RuntimeError(
            f"COCO's masks and scores need faster-coco-eval: pip install 'timm_halonet[detection]' ({e})"
        ) from None


def _mask_api() -> Any:
    return coco_tools("faster_coco_eval.core.mask")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of 0 and 1, as COCO's compressed run lengths."""
    rle = _mask_api().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": _text(rle["counts"])}


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def area(rle: dict[str, Any]) -> int:
    """Pixels of a mask."""
    return int(_mask_api().area(rle))


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons or run lengths as a mask (height, width) of 0 and 1 in uint8.

    Raises:
        ValueError: neither, or run lengths of another size.
    """
    api = _mask_api()
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon needs 6 numbers or more, x and y in turn")
            if not all(isinstance(v, (int, float)) and np.isfinite(v) for v in polygon):
                raise ValueError("a polygon has values that are no numbers")
        rle = api.merge(api.frPyObjects([[float(v) for v in polygon] for polygon in segmentation], height, width))
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        size = list(segmentation.get("size", ()))
        if size != [height, width]:
            raise ValueError(f"run lengths of a mask of {size} (height, width) in an image of {[height, width]}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts, default=0) < 0:
                raise ValueError(f"run lengths add up to {sum(counts)} pixels, the image has {height * width}")
            rle = api.frPyObjects(segmentation, height, width)
        else:
            rle = {"size": size, "counts": counts}
    else:
        raise ValueError(f"segmentation is {type(segmentation).__name__}, expected polygons or run lengths")
    return np.ascontiguousarray(api.decode(rle)).reshape(height, width)


def encode_label_map(label_map: np.ndarray) -> list[tuple[dict[str, Any], list[float]]]:
    """Run lengths and box (x, y, width, height) of each instance of a label map (H, W), in order of the labels."""
    found = []
    mask = np.zeros(label_map.shape, dtype=np.uint8, order="F")
    for value, (y1, y2, x1, x2) in label_boxes(label_map).items():
        inside = label_map[y1:y2, x1:x2] == value
        mask[y1:y2, x1:x2] = inside
        found.append((encode(mask), [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]))
        mask[y1:y2, x1:x2] = 0
    return found


def label_boxes(label_map: np.ndarray) -> dict[int, tuple[int, int, int, int]]:
    """Rows and columns, first and behind the last, of each value but 0."""
    rows, columns = np.nonzero(label_map)
    values, index = np.unique(label_map[rows, columns], return_inverse=True)
    height, width = label_map.shape
    first = np.tile(np.array([[height, width]]), (len(values), 1))
    last = np.zeros((len(values), 2), dtype=int)
    for axis, places in enumerate((rows, columns)):
        np.minimum.at(first[:, axis], index, places)
        np.maximum.at(last[:, axis], index, places + 1)
    return {int(v): (int(a[0]), int(b[0]), int(a[1]), int(b[1])) for v, a, b in zip(values, first, last, strict=True)}

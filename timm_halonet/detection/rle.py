"""Masks as run lengths, by faster-coco-eval; the only module next to the evaluation that needs it."""

from importlib import import_module
from typing import Any

import numpy as np

from .values import number, short, whole

MAX_COORDINATE = 10**6  # of a polygon, pixels: the decoder's memory grows with it


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
        ValueError: as `checked`.
    """
    api = _mask_api()
    given = checked(segmentation, height, width)
    try:
        if isinstance(given, list):
            given = api.merge(api.frPyObjects(given, height, width))
        elif isinstance(given["counts"], list):
            given = api.frPyObjects(given, height, width)
        return np.ascontiguousarray(api.decode(given)).reshape(height, width)
    except (RuntimeError, TypeError, IndexError) as e:
        raise ValueError(f"the segmentation cannot be decoded: {e}") from None


def checked(segmentation: Any, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """COCO's polygons or run lengths of a mask (height, width), as COCO tools take them: polygons of floats, or size
    and counts, a list of whole numbers or compressed text.

    Raises:
        ValueError: neither; a polygon of less than 3 points, or with what is not a number near the image; run lengths
            of another size, that do not add up, or whose text is broken.
    """
    if isinstance(segmentation, list):
        return [_polygon(polygon) for polygon in segmentation]
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError(f"segmentation is {type(segmentation).__name__}, expected polygons or run lengths")
    size, counts = segmentation.get("size"), segmentation["counts"]
    if not isinstance(size, list) or [whole(side) for side in size] != [height, width]:
        raise ValueError(f"run lengths of a mask of {short(size)} (height, width) in an image of {[height, width]}")
    if isinstance(counts, str):
        runs = _runs(counts)
    elif isinstance(counts, list):
        runs = [run for run in (whole(run, low=0) for run in counts) if run is not None]
        if len(runs) < len(counts):
            wrong = next(run for run in counts if whole(run, low=0) is None)
            raise ValueError(f"'counts' holds {short(wrong)}, expected whole numbers from 0")
        counts = runs
    else:
        raise ValueError(f"'counts' is {short(counts)}, expected a list of run lengths or compressed text")
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"run lengths add up to {sum(runs)} pixels, the image has {height * width}")
    return {"size": [height, width], "counts": counts}


def _polygon(polygon: Any) -> list[float]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon needs 6 numbers or more, x and y in turn, got {short(polygon)}")
    numbers = [number(value, -MAX_COORDINATE, MAX_COORDINATE) for value in polygon]
    if None in numbers:
        raise ValueError(
            f"a polygon has values that are not numbers up to {MAX_COORDINATE}: {short(polygon[numbers.index(None)])}"
        )
    return [float(value) for value in polygon]


def _runs(text: str) -> list[int]:
    """The run lengths in COCO's compressed text. A character, counted from "0", has 6 bits: 5 of the number, the lowest
    first, and one that says whether more follow. From the third run on, the number is the difference to the run before
    the last.

    Raises:
        ValueError: text of other characters, or one that is cut off.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"compressed run lengths {short(text)} are broken")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"compressed run lengths {short(text)} are cut off")
    return runs


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

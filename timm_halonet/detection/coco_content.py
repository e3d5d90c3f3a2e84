"""The content of a COCO file, every value checked: as COCO tools read it, or refused by file, entry and key."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_file
from .values import number, parse_json, short, whole

MAX_JSON_BYTES = 2**33
MAX_SIDE = 10**6  # of an image, pixels
MAX_COORDINATE = 1e9  # of a box, pixels
MAX_AREA = 1e10  # where COCO's evaluation ends

_EXPECTED = {
    "id": "a whole number",
    "image_id": "a whole number",
    "category_id": "a whole number",
    "file_name": "the name of a file",
    "height": f"a whole number from 1 to {MAX_SIDE}",
    "width": f"a whole number from 1 to {MAX_SIDE}",
    "name": "text",
    "bbox": "[x, y, width, height] with width, height >= 0",
    "area": f"a number from 0 to {MAX_AREA:g}",
    "iscrowd": "0 or 1",
    "segmentation": "polygons or run lengths",
}


@dataclass
class CocoContent:
    """What the datasets use of a COCO file, by id.

    An image has id, file_name, height and width; a category id and name; an annotation id, image_id, category_id,
    bbox, area and iscrowd, and with masks its segmentation, None where the file has none.
    """

    images: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]


def read_content(path: str | os.PathLike[str], masks: bool) -> CocoContent:
    """Reads a COCO file. Whole numbers may be written as floats; area is width x height and iscrowd 0 where the file
    leaves them out or has null; a category without a name has its id as name.

    Args:
        path: the file.
        masks: whether segmentations count. Their numbers are checked when they are used.

    Raises:
        ValueError: a value of a wrong type or range, one that is missing, two entries of one id, an image or category
            that does not exist; with file, entry and key.
    """
    path = Path(path)
    try:
        content = parse_json(read_file(path, MAX_JSON_BYTES), str(path))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}: not a COCO annotation file")
    images = {
        id_: {"id": id_, **{key: _value(entry, key, where) for key in ("file_name", "height", "width")}}
        for id_, entry, where in _entries(path, content, "images", "image")
    }
    categories = {
        id_: {"id": id_, "name": str(id_) if entry.get("name") is None else _value(entry, "name", where)}
        for id_, entry, where in _entries(path, content, "categories", "category")
    }
    annotations = {}
    for id_, entry, where in _entries(path, content, "annotations", "annotation"):
        image_id = _value(entry, "image_id", where)
        if image_id not in images:
            raise ValueError(f"{where}: 'image_id' is {image_id}, which is not among the images")
        where = f"{where} ({images[image_id]['file_name']})"
        category_id = _value(entry, "category_id", where)
        if category_id not in categories:
            known = ", ".join(map(str, sorted(categories)))
            raise ValueError(f"{where}: 'category_id' is {category_id}; the categories are {known}")
        box = _value(entry, "bbox", where)
        annotations[id_] = {
            "id": id_,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3] if entry.get("area") is None else _value(entry, "area", where),
            "iscrowd": 0 if entry.get("iscrowd") is None else _value(entry, "iscrowd", where),
        }
        if masks:
            given = entry.get("segmentation")
            annotations[id_]["segmentation"] = None if _empty(given) else _value(entry, "segmentation", where)
    return CocoContent(images, categories, annotations)


def _entries(path: Path, content: dict[str, Any], key: str, what: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Id, entry and where it stands, one after the other."""
    seen = set()
    for n, entry in enumerate(content[key]):
        where = f"{path}: {key}[{n}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {short(entry)}, expected an object with keys")
        id_ = _value(entry, "id", where)
        if id_ in seen:
            raise ValueError(f"{path}: {what} 'id' {id_} occurs twice; one of the two would be lost")
        seen.add(id_)
        yield id_, entry, f"{path}: {what} {id_}"


def _value(entry: dict[str, Any], key: str, where: str) -> Any:
    """The value of a key, in the type that it should have.

    Raises:
        ValueError: it is missing or something else.
    """
    if key not in entry:
        raise ValueError(f"{where} has no {key!r}")
    value = _as_expected(key, entry[key])
    if value is None:
        raise ValueError(f"{where}: {key!r} is {short(entry[key])}, expected {_EXPECTED[key]}")
    return value


def _as_expected(key: str, value: Any) -> Any:
    if key in ("id", "image_id", "category_id"):
        return whole(value)
    if key in ("height", "width"):
        return whole(value, 1, MAX_SIDE)
    if key == "file_name":
        return value if isinstance(value, str) and value else None
    if key == "name":  # of digits, for example
        return value if isinstance(value, str) else None if whole(value) is None else str(whole(value))
    if key == "bbox":
        return _box(value)
    if key == "area":
        return number(value, 0, MAX_AREA)
    if key == "iscrowd":
        return int(value) if isinstance(value, bool) else whole(value, 0, 1)
    return value if isinstance(value, (list, dict)) else None


def _box(value: Any) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    lows = (-MAX_COORDINATE, -MAX_COORDINATE, 0, 0)
    box = [number(v, low, MAX_COORDINATE) for v, low in zip(value, lows, strict=True)]
    return None if None in box else box  # type: ignore[return-value]


def _empty(segmentation: Any) -> bool:
    """No segmentation, or polygons without points."""
    return segmentation is None or (isinstance(segmentation, list) and all(part == [] for part in segmentation))

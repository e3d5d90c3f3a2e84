"""Where exporters put the JSON and the images of a split."""

import os
from collections.abc import Iterator
from pathlib import Path

from .coco import CocoDataset
from .dataset import DetectionDataset, Transform
from .files import open_files
from .label_maps import MaskDataset

# of one set without splits: FiftyOne, Label Studio, TACO
_WHOLE_SETS = ("labels.json", "result.json", "annotations.json")


def open_dataset(
    path: str | os.PathLike[str] | None,
    format: str | None,
    split: str,
    transform: Transform | None = None,
    masks: bool = True,
    *,
    annotations: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> DetectionDataset:
    """The dataset of a split.

    Args:
        path: for "masks" see `MaskDataset`. For "coco" a folder in the layout of COCO, CVAT, Datumaro, FiftyOne, Label
            Studio, Roboflow or TACO (docs/learn/detect.md lists them).
        format: "coco" or "masks"; may be None with `annotations`.
        split: its name, or "all" for the images of a set without splits.
        transform, masks: as `CocoDataset` has them.
        annotations: a COCO file, in place of a layout that is known.
        images: the folder of its images; default: `path`, or without one the file's folder.

    Raises:
        ValueError: another format, no such files, or what the dataset refuses.
    """
    if annotations is not None:
        if format == "masks":
            raise ValueError("a file of annotations is COCO's format, not that of masks: leave out one of the two")
        images = images or path or Path(annotations).parent
        return CocoDataset(images, annotations, transform, masks, (path,) if path else ())
    if images is not None:
        raise ValueError(f"the images {os.fspath(images)} need a file of annotations too")
    if path is None or path == "":
        raise ValueError("name the data: --data and --format, or --annotations")
    if format == "masks":
        return MaskDataset(path, split, transform)
    if format != "coco":
        raise ValueError(f"format is {format!r}, expected coco or masks")
    root = Path(path)
    if not root.is_dir():
        open_files(root)  # says what is wrong with any other file
        raise ValueError(
            f"{root} is a tar: unpack it for --format coco, or name it with --images and its JSON with --annotations"
        )
    for file, folders in _layouts(split):
        found = [root / folder for folder in folders if (root / folder).is_dir()]
        if (root / file).is_file() and found:
            return CocoDataset(found[0], root / file, transform, masks, (*found[1:], root))
    tried = "; ".join(
        f"{file} with {' or '.join(f'{folder}/' for folder in folders)}" for file, folders in _layouts(split)
    )
    there = sorted(str(file.relative_to(root)) for pattern in ("*.json", "*/*.json") for file in root.glob(pattern))
    raise ValueError(
        f"{root} has no split {split!r} in COCO's format; looked for {tried}. "
        + (f"It has {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}. " if there else "It has no JSON files. ")
        + "--annotations FILE --images FOLDER names any other"
    )


def _layouts(split: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Files of annotations, and the folders of their images in the order in which they are looked through."""
    yield f"annotations/instances_{split}.json", (split, f"images/{split}", "images", ".")
    yield f"{split}.json", (split, f"images/{split}", "images", "data", ".")
    yield f"{split}/_annotations.coco.json", (split,)
    for name in _WHOLE_SETS:
        yield f"{split}/{name}", (f"{split}/data", f"{split}/images", split)
    if split == "all":
        for name in _WHOLE_SETS:
            yield name, ("data", "images", ".")

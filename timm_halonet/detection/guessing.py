"""What a data set is, where the command line does not say."""

import os
from pathlib import PurePosixPath

from .coco import CocoDataset
from .coco_content import read_content
from .dataset import DetectionDataset
from .files import open_files

SPLITS = {
    "train": ("train", "train2017", "training"),
    "val": ("val", "valid", "validation", "val2017", "test"),
}


def guess_format(path: str | os.PathLike[str]) -> str:
    """ "coco" where there is a JSON of annotations, "masks" where there are label maps.

    Raises:
        ValueError: neither.
    """
    names = [PurePosixPath(name) for name in open_files(path).names]
    if any(name.suffix.lower() == ".json" and name.name != "split.json" for name in names):
        return "coco"
    if any({"labels", "masks"} & set(name.parts[:-1]) for name in names):
        return "masks"
    raise ValueError(
        f"{path} has neither a JSON of annotations (--format coco) nor a folder labels/ or masks/ (--format masks)"
    )


def guess_split(path: str | os.PathLike[str], format: str, kind: str) -> str | None:
    """The name that a split for training ("train") or evaluation ("val") has there; None where there is none.

    A COCO split is named by its JSON or the folder that holds it; one of label maps always goes by `kind`.
    """
    if format != "coco":
        return kind
    names = [PurePosixPath(name) for name in open_files(path).names if name.lower().endswith(".json")]
    found = {name.stem.removeprefix("instances_") for name in names} | {part for n in names for part in n.parts[:-1]}
    return next((split for split in SPLITS[kind] if split in found), None)


def has_masks(dataset: DetectionDataset) -> bool:
    """Whether every object has one; crowds and what is less than a pixel wide or high aside."""
    if not isinstance(dataset, CocoDataset):
        return True
    annotations = read_content(dataset.path, masks=True).annotations.values()
    own = [a["segmentation"] for a in annotations if not a["iscrowd"] and min(a["bbox"][2:]) >= 1]
    return bool(own) and None not in own

"""Images with label maps, whose pixel values count the instances."""

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from ..photos import load_image
from . import rle
from .dataset import DetectionDataset, Transform
from .files import Files, open_files
from .values import parse_json, short

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class MaskDataset(DetectionDataset):
    """Images and label maps of one class: 0 is background, each other value one instance.

    The layout, in a folder or in an uncompressed tar: images/NAME.jpg (or .png, .tif ...) and labels/NAME.png (or
    masks/), with a split.json of `{"train": [NAME, ...], "val": [...]}`; or train/images, train/labels and so on. One
    folder around all of it is fine.

    Args:
        path: the folder or tar.
        split: a split's name, or "all".
        transform: called with image and target.
        category: the name of the class.

    Raises:
        ValueError: a file that is missing, cannot be read or has another size than its partner; with its name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        transform: Transform | None = None,
        category: str = "object",
    ):
        self.files = open_files(path)
        self.source = str(self.files.path)
        self.transform = transform
        self.categories = [{"id": 1, "name": category}]
        self.notes = []
        self.names, self.labels = self._pairs(split)
        for name, label in zip(self.names, self.labels, strict=True):
            self._check(name, label)

    def _pairs(self, split: str) -> tuple[list[str], list[str]]:
        root, wanted = self._find_split(split)
        images = _by_stem(self.files, f"{root}images/", IMAGE_SUFFIXES)
        labels = _by_stem(self.files, f"{root}labels/", (".png", ".tif", ".tiff"))
        labels = labels or _by_stem(self.files, f"{root}masks/", (".png", ".tif", ".tiff"))
        stems = sorted(images) if wanted is None else [PurePosixPath(n).stem if n not in images else n for n in wanted]
        if wanted is None and (extra := sorted(set(labels) - set(images))):
            raise ValueError(f"{self.files.where(labels[extra[0]])} has no image ({len(extra)} such label maps)")
        for what, found in (("image", images), ("label map", labels)):
            missing = [stem for stem in stems if stem not in found]
            if missing:
                raise ValueError(
                    f"{self.files.where(root)}: {len(missing)} of {len(stems)} images of the split {split!r} have no "
                    f"{what}, {missing[0]!r} the first"
                )
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"{self.files.where(root)}: the split {split!r} names {twice[0]!r} more than once")
        if not stems:
            raise ValueError(f"{self.files.where(root)}: the split {split!r} has no images")
        return [images[stem] for stem in stems], [labels[stem] for stem in stems]

    def _find_split(self, split: str) -> tuple[str, list[str] | None]:
        """The folder that holds images/ and labels/, and the names that count; None for all of them."""
        folders = {str(parent) for name in self.files.names for parent in PurePosixPath(name).parents}
        roots = sorted((f[: -len("images")] for f in folders if f == "images" or f.endswith("/images")), key=len)
        for root in roots:
            if root.rstrip("/").endswith(split) and PurePosixPath(root).name == split:
                return root, None
        if not roots:
            raise ValueError(f"{self.files.path} has no folder images/; `--format masks` needs images/ and labels/")
        root = roots[0]
        if f"{root}split.json" in self.files.names:
            where = self.files.where(f"{root}split.json")
            splits = parse_json(self.files.read(f"{root}split.json"), where)
            if isinstance(splits, dict) and split in splits:
                return root, _names(splits[split], f"{where}: the split {split!r}")
            if split != "all":
                names = ", ".join(splits) if isinstance(splits, dict) else "none"
                raise ValueError(f"{where} has no split {split!r}; it has {names}")
        if split == "all":
            return root, None
        raise ValueError(
            f"{self.files.path} has no split {split!r}: neither a split.json next to images/ nor a folder "
            f"{split}/images/; the split 'all' takes every image"
        )

    def _check(self, name: str, label: str) -> None:
        """By the two headers, so that a whole set takes seconds."""
        *size, _ = self.header(name)
        *label_size, mode = self.header(label)
        if mode not in LABEL_MODES:
            raise ValueError(
                f"{self.files.where(label)} has the mode {mode}; a label map has one channel of whole numbers"
            )
        if size != label_size:
            raise ValueError(
                f"{self.files.where(label)} has {label_size[0]} x {label_size[1]} pixels (width, height), its image "
                f"{self.files.where(name)} has {size[0]} x {size[1]}"
            )

    def check(self) -> None:
        """Nothing: that was done when it was opened."""

    def has_objects(self) -> bool:
        return any(self.label_map(index).any() for index in range(len(self)))

    def match_categories(self, categories: Sequence[dict[str, Any]], whose: str = "the detector") -> None:
        """As in other sets. Label maps have no names, so a single class takes the name of that in `categories`."""
        if len(categories) == len(self.categories):
            self.categories = [{**self.categories[0], "name": str(categories[0].get("name"))}]
        super().match_categories(categories, whose)

    def label_map(self, index: int) -> np.ndarray:
        """The label map of an image, (H, W) in int32; 0 is background."""
        name = self.labels[index]
        try:
            data = self.files.read(name)
        except OSError as e:
            raise ValueError(f"{self.files.where(name)}: {e.strerror or e}") from None
        label_map = load_image(data, self.files.where(name)).astype(np.int32)
        if label_map.ndim != 2:
            raise ValueError(f"{self.files.where(name)} has {label_map.shape[2]} channels, a label map has one")
        return label_map

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        label_map = torch.from_numpy(self.label_map(index))[None]
        return {"image_id": index + 1, "label_map": tv_tensors.Mask(label_map)}

    def ground_truth(self) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, name in enumerate(self.names):
            label_map = self.label_map(index)
            height, width = label_map.shape
            images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
            for segmentation, box in rle.encode_label_map(label_map):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": 1,
                        "segmentation": segmentation,
                        "bbox": box,
                        "area": rle.area(segmentation),
                        "iscrowd": 0,
                    }
                )
        return {"images": images, "annotations": annotations, "categories": self.categories}


def _by_stem(files: Files, folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files.names:
        path = PurePosixPath(name)
        if f"{path.parent}/" == folder and path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{files.where(name)} and {files.where(found[path.stem])} have the same name")
            found[path.stem] = name
    return found


def _names(values: Any, where: str) -> list[str]:
    """The names of a split: text, or whole numbers as text."""
    if not isinstance(values, list):
        raise ValueError(f"{where} is {short(values)}, expected a list of names")
    for n, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"{where}: entry {n} is {short(value)}, expected a name")
    return [str(value) for value in values]

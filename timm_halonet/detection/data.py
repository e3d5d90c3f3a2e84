"""Images and their objects: COCO JSON, or label maps whose pixel values count the instances.

Nothing is dropped in silence: what cannot be used is an error that names file and annotation, and what is handled as
COCO tools do is said in `notes`.
"""

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..inference import to_rgb
from .files import Files, open_files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")

Transform = Callable[[tv_tensors.Image, dict[str, Any]], Any]


class DetectionDataset(Dataset):
    """What the two formats have in common.

    An item is an image (3, H, W) in uint8 and a target: image_id; labels (N) from 1; boxes (N, 4) as x1, y1, x2, y2 and
    masks (N, H, W), or a label_map (1, H, W) in place of both. A transform, if there is one, makes of it what it will.

    Attributes:
        names: of the images.
        categories: dicts of id and name, in the order of the labels from 1.
        notes: what was handled, in sentences.
    """

    files: Files
    names: list[str]
    categories: list[dict[str, Any]]
    notes: list[str]
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        image = self.image(index)
        target = self.target(index, image)
        return self.transform(image, target) if self.transform else (image, target)

    def image(self, index: int) -> tv_tensors.Image:
        """The image in RGB, (3, H, W) in uint8; grey is repeated, 16 bits are scaled to 8, EXIF orientation is applied.

        Raises:
            ValueError: it cannot be read; with its name.
        """
        photo = np.array(read_image(self.files, self.names[index]))
        return tv_tensors.Image(torch.from_numpy(photo).permute(2, 0, 1))

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def ground_truth(self) -> dict[str, Any]:
        """Images, annotations and categories as a COCO file has them, for the evaluation."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """With the background."""
        return len(self.categories) + 1


def read_image(files: Files, name: str) -> Image.Image:
    """An image in RGB.

    Raises:
        ValueError: it cannot be read; with its name.
    """
    try:
        with Image.open(io.BytesIO(files.read(name))) as file:
            file.load()
            return to_rgb(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{files.where(name)}: not an image that Pillow can read ({e})") from None


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
            splits = _load_json(self.files.read(f"{root}split.json"), self.files.where(f"{root}split.json"))
            if isinstance(splits, dict) and isinstance(splits.get(split), list):
                return root, [str(name) for name in splits[split]]
            if split != "all":
                names = ", ".join(splits) if isinstance(splits, dict) else "none"
                raise ValueError(f"{self.files.where(root + 'split.json')} has no split {split!r}; it has {names}")
        if split == "all":
            return root, None
        raise ValueError(
            f"{self.files.path} has no split {split!r}: neither a split.json beside images/ nor a folder "
            f"{split}/images/; the split 'all' takes every image"
        )

    def _check(self, name: str, label: str) -> None:
        """By the two headers, so that a whole set takes seconds."""
        sizes = []
        for n in (name, label):
            try:
                with Image.open(io.BytesIO(self.files.read(n))) as file:
                    turned = file.getexif().get(0x0112, 1) >= 5
                    sizes.append(file.size[::-1] if turned else file.size)
                    mode = file.mode
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                raise ValueError(f"{self.files.where(n)}: not an image that Pillow can read ({e})") from None
        if mode not in LABEL_MODES:
            raise ValueError(
                f"{self.files.where(label)} has the mode {mode}; a label map has one channel of whole numbers"
            )
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{self.files.where(label)} has {sizes[1][0]} x {sizes[1][1]} pixels (width, height), its image "
                f"{self.files.where(name)} has {sizes[0][0]} x {sizes[0][1]}"
            )

    def label_map(self, index: int) -> np.ndarray:
        """(H, W) in int32."""
        name = self.labels[index]
        try:
            with Image.open(io.BytesIO(self.files.read(name))) as file:
                return np.array(file).astype(np.int32)
        except (OSError, SyntaxError, ValueError) as e:
            raise ValueError(f"{self.files.where(name)}: {e}") from None

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        label_map = torch.from_numpy(self.label_map(index))[None]
        return {"image_id": index + 1, "label_map": tv_tensors.Mask(label_map)}

    def ground_truth(self) -> dict[str, Any]:
        from . import rle

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


def _load_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as e:
        raise ValueError(f"{where} is no JSON: {e}") from None


class CocoDataset(DetectionDataset):
    """Images in a folder and a COCO JSON file of their objects.

    Category ids become labels from 1, in ascending order. As COCO tools do: boxes are clipped to their image, boxes
    without area and crowds (`iscrowd`) are no training targets but stay in the evaluation, images without annotations
    are background. `notes` counts what was clipped or left out.

    Args:
        images: the folder.
        annotations: the file.
        transform: called with image and target.
        masks: whether targets have masks; then every annotation needs a segmentation.

    Raises:
        ValueError: a missing image, an annotation of an unknown image or category, a broken box, two entries of one id
            ...; with the file and the annotation's id.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        transform: Transform | None = None,
        masks: bool = True,
    ):
        self.files = open_files(images)
        self.path = Path(annotations)
        self.transform = transform
        self.masks = masks
        self.notes = []
        try:
            content = _load_json(self.path.read_bytes(), str(self.path))
        except OSError as e:
            raise ValueError(f"{self.path} cannot be read: {e.strerror or e}") from None
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise ValueError(f"{self.path} has no list {key!r}: not a COCO annotation file")
        self._images = self._unique(content["images"], "image", ("file_name", "height", "width"))
        categories = self._unique(content["categories"], "category", ())
        self.categories = [{"id": i, "name": str(categories[i].get("name", i))} for i in sorted(categories)]
        self._labels = {category["id"]: n + 1 for n, category in enumerate(self.categories)}
        self._annotations = self._unique(content["annotations"], "annotation", ("image_id", "category_id", "bbox"))
        self.image_ids = list(self._images)
        self.names = [str(self._images[i]["file_name"]) for i in self.image_ids]
        there = set(self.files.names)
        missing = [name for name in self.names if name not in there]
        if missing:
            raise ValueError(
                f"{self.files.where(missing[0])} does not exist, which {self.path} lists; {len(missing)} of "
                f"{len(self.names)} images are missing"
            )
        if not self.names:
            raise ValueError(f"{self.path} lists no images")
        self._of_image: dict[Any, list[dict[str, Any]]] = {i: [] for i in self.image_ids}
        self._take_annotations()

    def _unique(self, entries: list[Any], what: str, keys: Sequence[str]) -> dict[Any, dict[str, Any]]:
        found: dict[Any, dict[str, Any]] = {}
        for n, entry in enumerate(entries):
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
                raise ValueError(f"{self.path}: {what} {n} of the list has no whole number as id")
            if entry["id"] in found:
                raise ValueError(f"{self.path}: {what} id {entry['id']} occurs twice; one of the two would be lost")
            for key in keys:
                if key not in entry:
                    raise ValueError(f"{self.path}: {what} {entry['id']} has no {key!r}")
            found[entry["id"]] = entry
        return found

    def _take_annotations(self) -> None:
        clipped, empty, crowds = [], [], 0
        for id_, annotation in self._annotations.items():
            where = f"{self.path}: annotation {id_}"
            image = self._images.get(annotation["image_id"])
            if image is None:
                raise ValueError(f"{where} belongs to the image {annotation['image_id']!r}, which is not in the list")
            where = f"{where} ({image['file_name']})"
            if annotation["category_id"] not in self._labels:
                known = ", ".join(map(str, self._labels))
                raise ValueError(f"{where} has the category {annotation['category_id']!r}; the categories are {known}")
            box = annotation["bbox"]
            numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
            if not numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                raise ValueError(f"{where} has the box {box!r}, expected [x, y, width, height] with width, height >= 0")
            if self.masks and not annotation.get("iscrowd") and not annotation.get("segmentation"):
                raise ValueError(f"{where} has no segmentation, which a mask head needs; boxes alone train faster_rcnn")
            x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
            inside = (
                *(min(max(x, 0.0), image["width"]) for x in (x1, x2)),
                *(min(max(y, 0.0), image["height"]) for y in (y1, y2)),
            )
            if annotation.get("iscrowd"):
                crowds += 1
            elif inside[1] <= inside[0] or inside[3] <= inside[2]:
                empty.append(f"{id_} ({image['file_name']})")
            else:
                # COCO's own boxes are rounded to 0.01 pixels
                if max(inside[0] - x1, x2 - inside[1], inside[2] - y1, y2 - inside[3]) > 0.02:
                    clipped.append(f"{id_} ({image['file_name']})")
                target = {**annotation, "box": [inside[0], inside[2], inside[1], inside[3]]}
                self._of_image[annotation["image_id"]].append(target)
        for found, what in (
            (clipped, "reach out of their image and were clipped to it"),
            (empty, "have no area inside their image and are left out of training, not out of the evaluation"),
        ):
            if found:
                some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
                self.notes.append(f"{self.path}: {len(found)} boxes {what}: annotation {some}")
        if crowds:
            self.notes.append(f"{self.path}: {crowds} crowds are left out of training, not out of the evaluation")
        background = sum(not entries for entries in self._of_image.values())
        if background:
            self.notes.append(f"{self.path}: {background} of {len(self.names)} images have no objects to train on")

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        entry = self._images[self.image_ids[index]]
        height, width = image.shape[-2:]
        if (entry["height"], entry["width"]) != (height, width):
            raise ValueError(
                f"{self.files.where(self.names[index])} has {width} x {height} pixels (width, height), {self.path} "
                f"says {entry['width']} x {entry['height']}"
            )
        found = self._of_image[entry["id"]]
        boxes = torch.tensor([a["box"] for a in found], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "image_id": entry["id"],
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in found], dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(self._decode(found, height, width))
        return target

    def _decode(self, annotations: list[dict[str, Any]], height: int, width: int) -> torch.Tensor:
        from . import rle

        masks = torch.zeros(len(annotations), height, width, dtype=torch.uint8)
        for n, annotation in enumerate(annotations):
            try:
                masks[n] = torch.from_numpy(rle.decode(annotation["segmentation"], height, width))
            except ValueError as e:
                name = self._images[annotation["image_id"]]["file_name"]
                raise ValueError(f"{self.path}: annotation {annotation['id']} ({name}): {e}") from None
        return masks

    def ground_truth(self) -> dict[str, Any]:
        annotations = []
        for annotation in self._annotations.values():
            width, height = annotation["bbox"][2:]
            # what COCO's evaluator cannot do without, where a file leaves it out
            annotations.append({"area": width * height, "iscrowd": 0, **annotation})
        return {"images": list(self._images.values()), "annotations": annotations, "categories": self.categories}


def open_dataset(
    path: str | os.PathLike[str], format: str, split: str, transform: Transform | None = None, masks: bool = True
) -> DetectionDataset:
    """The dataset of a split.

    Args:
        path: for "masks" see `MaskDataset`. For "coco" a folder with annotations/instances_SPLIT.json and SPLIT/, or
            SPLIT.json and SPLIT/ or images/, or SPLIT/_annotations.coco.json beside the images.
        format: "coco" or "masks".

    Raises:
        ValueError: another format, no such files, or what the dataset refuses.
    """
    if format == "masks":
        return MaskDataset(path, split, transform)
    if format != "coco":
        raise ValueError(f"format is {format!r}, expected coco or masks")
    root = Path(path)
    layouts = (
        (root / "annotations" / f"instances_{split}.json", root / split),
        (root / f"{split}.json", root / split),
        (root / f"{split}.json", root / "images"),
        (root / split / "_annotations.coco.json", root / split),
    )
    for annotations, images in layouts:
        if annotations.is_file() and images.is_dir():
            return CocoDataset(images, annotations, transform, masks)
    tried = "; ".join(f"{a.relative_to(root)} with {i.relative_to(root)}/" for a, i in layouts)
    raise ValueError(f"{root} has no split {split!r} in COCO's format; looked for {tried}")

"""Images with a COCO JSON file of their objects."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import tv_tensors

from . import rle
from .coco_content import read_content
from .dataset import DetectionDataset, Transform
from .files import Files, TarFiles, open_files


class CocoDataset(DetectionDataset):
    """Images in a folder and a COCO JSON file of their objects.

    Category ids become labels from 1, in ascending order. As COCO tools do: boxes are clipped to their image, boxes
    without area and crowds (`iscrowd`) are not training targets but stay in the evaluation, images without
    annotations are background. `notes` counts what was clipped or left out.

    Args:
        images: the folder, or an uncompressed tar.
        annotations: the file.
        transform: called with image and target.
        masks: whether targets have masks; then every object with an area needs a segmentation.
        other_folders: where the images may lie if the first of them is not in `images`; then its parent and the folder
            of `annotations` are looked through.

    Raises:
        ValueError: a missing image, an annotation of an unknown image or category, a value of a wrong type, two entries
            of one id ...; with the file, the annotation's id and the key.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        transform: Transform | None = None,
        masks: bool = True,
        other_folders: Sequence[str | os.PathLike[str]] = (),
    ):
        self.files = open_files(images)
        self.path = Path(annotations)
        self.source = str(self.path)
        self.transform = transform
        self.masks = masks
        self.notes = []
        content = read_content(self.path, masks)
        self._images, self._annotations = content.images, content.annotations
        self.categories = [content.categories[i] for i in sorted(content.categories)]
        self.image_ids = list(self._images)
        if not self.image_ids:
            raise ValueError(f"{self.path} lists no images")
        self.names = self._find([entry["file_name"] for entry in self._images.values()], other_folders)
        if twice := len(self.names) - len(set(self.names)):
            self.notes.append(f"{self.path}: {twice} images have the file of another one, each with objects of its own")
        self._of_image: dict[int, list[dict[str, Any]]] = {i: [] for i in self.image_ids}
        self._take_annotations()

    def _find(self, names: list[str], other_folders: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The images by the names that `self.files` has for them; all in the folder that has the first."""
        folders = [self.files]
        if not isinstance(self.files, TarFiles):
            others = (*map(Path, other_folders), self.files.path.parent, self.path.parent)
            folders += [Files(folder) for folder in dict.fromkeys(others)]
        self.files = next((files for files in folders if files.find(names[0])), self.files)
        found = [self.files.find(name) for name in names]
        if None in found:
            first = found.index(None)
            hint = "; absolute paths of another machine have to be made relative" if _absolute(names[first]) else ""
            raise ValueError(
                f"{self.path}: image {self.image_ids[first]}: 'file_name': {self.files.where(names[first])} "
                f"{self.files.why_not(names[first])}; {found.count(None)} of {len(names)} images are missing{hint}"
            )
        return [name for name in found if name]

    def _take_annotations(self) -> None:
        clipped, empty, narrow, crowds = [], [], [], 0
        for id_, annotation in self._annotations.items():
            image = self._images[annotation["image_id"]]
            said = f"{id_} ({image['file_name']})"
            x, y, w, h = annotation["bbox"]
            x1, x2 = (min(max(v, 0.0), image["width"]) for v in (x, x + w))
            y1, y2 = (min(max(v, 0.0), image["height"]) for v in (y, y + h))
            if annotation["iscrowd"]:
                crowds += 1
            elif x2 <= x1 or y2 <= y1:
                empty.append(said)
            elif min(x2 - x1, y2 - y1) < 1:
                narrow.append(said)
            elif self.masks and annotation["segmentation"] is None:
                raise ValueError(
                    f"{self.path}: annotation {said} has no 'segmentation', which a mask head needs; boxes alone train "
                    "faster_rcnn"
                )
            else:
                # COCO's own boxes are rounded to 0.01 pixels
                if max(x1 - x, x + w - x2, y1 - y, y + h - y2) > 0.02:
                    clipped.append(said)
                self._of_image[annotation["image_id"]].append({**annotation, "box": [x1, y1, x2, y2]})
        left_out = "are left out of training, not out of the evaluation"
        for found, what in (
            (clipped, "reach out of their image and were clipped to it"),
            (empty, f"have no area inside their image and {left_out}"),
            (narrow, f"are less than a pixel wide or high inside their image and {left_out}"),
        ):
            if found:
                some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
                self.notes.append(f"{self.path}: {len(found)} boxes {what}: annotation {some}")
        if crowds:
            self.notes.append(f"{self.path}: {crowds} crowds {left_out}")
        background = sum(not entries for entries in self._of_image.values())
        if background:
            self.notes.append(f"{self.path}: {background} of {len(self.names)} images have no objects to train on")

    def image(self, index: int) -> tv_tensors.Image:
        image = super().image(index)
        self._check_size(index, *image.shape[:0:-1])
        return image

    def _check_size(self, index: int, width: int, height: int) -> None:
        entry = self._images[self.image_ids[index]]
        if (entry["height"], entry["width"]) != (height, width):
            raise ValueError(
                f"{self.files.where(self.names[index])} has {width} x {height} pixels (width, height), {self.path} "
                f"says {entry['width']} x {entry['height']}"
            )

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        image_id = self.image_ids[index]
        height, width = image.shape[-2:]
        found = self._of_image[image_id]
        labels = {category["id"]: n for n, category in enumerate(self.categories, 1)}
        boxes = torch.tensor([a["box"] for a in found], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "image_id": image_id,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([labels[a["category_id"]] for a in found], dtype=torch.int64),
        }
        if self.masks:
            masks = torch.zeros(len(found), height, width, dtype=torch.uint8)
            for mask, annotation in zip(masks, found, strict=True):
                mask.copy_(torch.from_numpy(rle.decode(self._segmentation(annotation), height, width)))
            target["masks"] = tv_tensors.Mask(masks)
        return target

    def _segmentation(self, annotation: dict[str, Any]) -> list[list[float]] | dict[str, Any]:
        """As COCO tools take it, checked; that of an object without area may be an empty mask."""
        image = self._images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        where = f"{self.path}: annotation {annotation['id']} ({image['file_name']})"
        if annotation["segmentation"] is None:
            if annotation["iscrowd"]:
                raise ValueError(f"{where} has no 'segmentation', which scores of masks need")
            return {"size": [height, width], "counts": [height * width]}
        try:
            return rle.checked(annotation["segmentation"], height, width)
        except ValueError as e:
            raise ValueError(f"{where}: 'segmentation': {e}") from None

    def ground_truth(self) -> dict[str, Any]:
        annotations = [
            {**a, "segmentation": self._segmentation(a)} if self.masks else a for a in self._annotations.values()
        ]
        return {"images": list(self._images.values()), "annotations": annotations, "categories": self.categories}

    def has_objects(self) -> bool:
        return any(self._of_image.values())

    def check(self) -> None:
        self.ground_truth()
        for index, name in enumerate(self.names):
            width, height, _ = self.header(name)
            self._check_size(index, width, height)


def _absolute(name: str) -> bool:
    return posixpath.isabs(name.replace("\\", "/")) or name[1:2] == ":"

"""What the formats of `timm-halonet detect` have in common: images and their objects.

Nothing is dropped in silence: what cannot be used is an error that names file and annotation, and what is handled as
COCO tools do is said in `notes`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..photos import decode_photo, image_header
from .files import Files

Transform = Callable[[tv_tensors.Image, dict[str, Any]], Any]


class DetectionDataset(Dataset):
    """What the two formats have in common.

    An item is an image (3, H, W) in uint8 and a target: image_id; labels (N) from 1; boxes (N, 4) as x1, y1, x2, y2 and
    masks (N, H, W), or a label_map (1, H, W) in place of both. A transform, if there is one, makes of it what it will.

    Attributes:
        source: the file or folder of the objects, for messages.
        names: of the images.
        categories: dicts of id and name, in the order of the labels from 1.
        notes: what was handled, in sentences.
    """

    source: str
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
        """The image in RGB, (3, H, W) in uint8, as `timm_halonet.photos.to_rgb` makes it; EXIF orientation is applied.

        Raises:
            ValueError: it cannot be read; with its name.
        """
        name = self.names[index]
        try:
            photo = decode_photo(self.files.read(name), self.files.where(name))
        except OSError as e:
            raise ValueError(f"{self.files.where(name)}: {e.strerror or e}") from None
        return tv_tensors.Image(torch.from_numpy(np.array(photo)).permute(2, 0, 1))

    def target(self, index: int, image: torch.Tensor) -> dict[str, Any]:
        """The target of the image at `index`, as the class describes it.

        Raises:
            ValueError: objects that cannot be used; with file and annotation.
        """
        raise NotImplementedError

    def ground_truth(self) -> dict[str, Any]:
        """Images, annotations and categories as a COCO file has them, for the evaluation.

        Raises:
            ValueError: an annotation that cannot be scored; with its file and id.
        """
        raise NotImplementedError

    def has_objects(self) -> bool:
        """Whether there is an object to train on."""
        raise NotImplementedError

    def check(self) -> None:
        """Reads what else could fail late, the images' headers and all annotations: for a set that is evaluated after
        hours of training.

        Raises:
            ValueError: as the items and `ground_truth` would; with the file.
        """
        raise NotImplementedError

    def match_categories(self, categories: Sequence[dict[str, Any]], whose: str = "the detector") -> None:
        """Puts the categories of this set, and with them its labels, into the order of others of the same names.

        Args:
            categories: dicts of id and name; their ids may be others.
            whose: they are, for messages.

        Raises:
            ValueError: the names differ; with those that do.
        """
        own = [category["name"] for category in self.categories]
        names = [str(category.get("name")) for category in categories]
        if own == names:
            return
        if differences := _differences(Counter(own), Counter(names), whose):
            raise ValueError(f"{self.source} has other categories than {whose}: {differences}")
        if len(set(own)) < len(own):
            [(twice, _)] = Counter(own).most_common(1)
            raise ValueError(
                f"{self.source}: {twice!r} is the name of several categories, in another order than those of {whose}"
            )
        by_name = {category["name"]: category for category in self.categories}
        self.categories = [by_name[name] for name in names]
        self.notes.append(
            f"{self.source}: the categories have other ids than those of {whose} and are matched by their names"
        )

    @property
    def num_classes(self) -> int:
        """The number of categories, and one for the background."""
        return len(self.categories) + 1

    def header(self, name: str) -> tuple[int, int, str]:
        """Width and height of an image, EXIF orientation applied, and Pillow's mode.

        Raises:
            ValueError: it cannot be read; with its name.
        """
        try:
            with self.files.open(name) as file:
                return image_header(file, self.files.where(name))
        except OSError as e:
            raise ValueError(f"{self.files.where(name)}: {e.strerror or e}") from None


def fingerprint(dataset: Any) -> str:
    """Tells a data set from others: a hash of the names of its images, without their folders, and its categories."""
    names = [PurePosixPath(name).name for name in dataset.names]
    categories = [str(category["name"]) for category in getattr(dataset, "categories", ())]
    return hashlib.sha256("\n".join([*names, "", *categories]).encode(errors="surrogatepass")).hexdigest()[:16]


def _differences(own: Counter[str], other: Counter[str], whose: str) -> str:
    parts = []
    for who, names in (("it", list((own - other).elements())), (whose, list((other - own).elements()))):
        if names:
            some = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            parts.append(f"only {who} has {some}")
    return "; ".join(parts)

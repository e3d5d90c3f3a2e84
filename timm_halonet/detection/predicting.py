"""What `timm-halonet detect predict` does: pictures and JSON of what a detector finds."""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import nn
from torchvision.transforms.v2 import functional as F

from ..files import cut_name, whole_file
from ..photos import find_photos, open_photo, photo_error
from ..report.progress import progress_bar, say
from .data import DetectionDataset
from .drawing import contact_sheet, draw_detections, truth_of
from .evaluation import detect, to_coco
from .storage import write_json

PREDICTIONS_NAME = "predictions.json"
_MADE_BY = ("Software", "timm-halonet detect predict")  # in the pictures: the next run does not take them for photos


class Predictor:
    """Draws detections, image by image, and collects them.

    Args:
        model: a detector in evaluation mode, on its device.
        categories: dicts of id and name, in the order of the labels from 1.
        score: detections below it are left out.
        amp: type for autocast, or None.

    Attributes:
        rows: of the contact sheet: titles and pictures.
        found: for predictions.json.
        failed: images that could not be read.

    Raises:
        ValueError: a score that is none.
    """

    def __init__(
        self, model: nn.Module, categories: list[dict[str, Any]], score: float = 0.5, amp: torch.dtype | None = None
    ):
        if not 0 <= score <= 1:
            raise ValueError(f"--score is {score}, expected 0 to 1")
        self.model, self.categories, self.score, self.amp = model, categories, score, amp
        self.names = [str(category["name"]) for category in categories]
        self.rows: list[list[tuple[str, torch.Tensor]]] = []
        self.found: list[dict[str, Any]] = []
        self.failed = 0

    def draw_photos(self, paths: Iterable[str | os.PathLike[str]], out: Path) -> int:
        """Photos and folders of them; a file that cannot be read is named and skipped.

        Returns:
            How many could not be read.
        """
        for path in progress_bar(photos_in(paths), unit="photo"):
            self._take(path, partial(_read_photo, path), out)
        self._write(out, columns=3)
        return self.failed

    def draw_dataset(self, dataset: DetectionDataset, count: int, out: Path) -> int:
        """Images of a dataset, evenly spaced, with the truth next to what was found; one that cannot be read is named
        and skipped.

        Returns:
            How many could not be read.

        Raises:
            ValueError: count below 1, or annotations that cannot be used.
        """
        if count < 1:
            raise ValueError(f"--count is {count}, expected 1 or more")
        truth = dataset.ground_truth()
        labels = {category["id"]: n + 1 for n, category in enumerate(dataset.categories)}

        def read(index: int) -> tuple[torch.Tensor, dict[str, Any]]:
            image = dataset.image(index).as_subclass(torch.Tensor)
            own = [a for a in truth["annotations"] if a["image_id"] == truth["images"][index]["id"]]
            return image, truth_of(own, labels, *image.shape[-2:])

        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
        for index in progress_bar(chosen, unit="image"):
            self._take(dataset.names[index], partial(read, int(index)), out)
        self._write(out, columns=4)
        return self.failed

    def _take(self, name: str, read: Callable[[], tuple[torch.Tensor, dict[str, Any] | None]], out: Path) -> None:
        """Draws one image, of which `read` gives pixels and truth; an error is printed in one line."""
        try:
            image, truth = read()
            found = self._detect(image)
        except Exception as e:  # a broken file, one that is too large or too long: the others go on
            say(f"timm-halonet: error: {photo_error(name, e)}", sys.stderr)
            self.failed += 1
            return
        self._draw(name, image, found, out, truth)

    def _detect(self, image: torch.Tensor) -> dict[str, Any]:
        [found] = detect(self.model, [image.float() / 255], amp=self.amp)
        keep = [n for n, score in enumerate(found["scores"].tolist()) if score >= self.score]
        return {k: [v[n] for n in keep] if isinstance(v, list) else v[keep] for k, v in found.items()}

    def _draw(
        self, name: str, image: torch.Tensor, found: dict[str, Any], out: Path, truth: dict[str, Any] | None
    ) -> None:
        self.found.append(
            {
                "file": name,
                "height": image.shape[-2],
                "width": image.shape[-1],
                "detections": to_coco(name, found, self.categories),
            }
        )
        stem = Path(name).stem
        title = os.fsencode(stem).decode("utf-8", "replace")  # fonts have no letters for bytes that are not UTF-8
        picture = draw_detections(image, found, self.names)
        row = [(f"{title}: {len(found['boxes'])} found", picture)]
        if truth is not None:
            row.insert(0, (f"{title}: {len(truth['boxes'])} labelled", draw_detections(image, truth, self.names)))
        self.rows.append(row)
        # numbered: photos of two folders may have one name
        _write_png(F.to_pil_image(picture), out / f"{len(self.rows):04}_{cut_name(stem, 240)}.png")

    def _write(self, out: Path, columns: int) -> None:
        write_json(out / PREDICTIONS_NAME, self.found)
        if not self.rows:
            return
        cells = [cell for row in self.rows for cell in row]
        sheet = contact_sheet([cells[n : n + columns] for n in range(0, len(cells), columns)])
        _write_png(sheet, out / "sheet.png")


def _read_photo(path: str) -> tuple[torch.Tensor, None]:
    return torch.from_numpy(np.array(open_photo(path))).permute(2, 0, 1), None


def photos_in(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files named, and those below the folders named except for what `predict` wrote into them.

    Raises:
        ValueError: a path that does not exist, or a folder without files.
    """
    found = []
    for path in paths:
        files = find_photos([path])
        found += [file for file in files if not _made_here(file)] if Path(path).is_dir() else files
    return found


def _made_here(file: str) -> bool:
    if Path(file).name == PREDICTIONS_NAME:
        return True
    if not file.endswith(".png"):
        return False
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get(_MADE_BY[0]) == _MADE_BY[1]
    except Exception:  # a broken photo, which is to be named when its turn comes
        return False


def _write_png(picture: Image.Image, path: Path) -> None:
    while path.exists() and not _made_here(str(path)):  # somebody's photo
        path = path.with_name(f"{path.stem}_{path.suffix}")
    about = PngImagePlugin.PngInfo()
    about.add_text(*_MADE_BY)
    with whole_file(path) as temporary:
        picture.save(temporary, pnginfo=about)

"""Where exporters put JSON and images, and how they write file names."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import CocoDataset
from timm_halonet.detection.data import open_dataset

from ..support.detection_samples import coco_content, write_coco


@pytest.mark.parametrize("layout", ["instances", "beside", "images", "roboflow"])
def test_coco_layouts(tmp_path, layout):
    content, pictures = coco_content(2, 0)
    write_coco(tmp_path, content, pictures)
    annotations = tmp_path / "annotations" / "instances_train.json"
    if layout in ("beside", "images"):
        annotations.rename(tmp_path / "train.json")
    if layout == "images":
        (tmp_path / "train").rename(tmp_path / "images")
    if layout == "roboflow":
        annotations.rename(tmp_path / "train" / "_annotations.coco.json")
    assert len(open_dataset(tmp_path, "coco", "train")) == 2
    with pytest.raises(ValueError, match=r"has no split 'val'.*annotations/instances_val.json with val/"):
        open_dataset(tmp_path, "coco", "val")
    with pytest.raises(ValueError, match="format is 'voc', expected coco or masks"):
        open_dataset(tmp_path, "voc", "train")


EXPORTS = {
    "COCO": ("annotations/instances_val.json", "val", "val"),
    "CVAT and Datumaro": ("annotations/instances_val.json", "images/val", "val"),
    "CVAT, one set": ("annotations/instances_default.json", "images", "default"),
    "FiftyOne": ("labels.json", "data", "all"),
    "FiftyOne by name": ("labels.json", "data", "labels"),
    "FiftyOne, splits": ("val/labels.json", "val/data", "val"),
    "Label Studio": ("result.json", "images", "all"),
    "Label Studio by name": ("result.json", "images", "result"),
    "TACO": ("annotations.json", ".", "all"),
    "TACO's own splits": ("annotations_0_val.json", ".", "annotations_0_val"),
    "Roboflow": ("valid/_annotations.coco.json", "valid", "valid"),
}


def export(root, file, folder, name=lambda name: name, sub=""):
    """JSON and images where they are named; the pictures in them, by file name."""
    content, pictures = coco_content(2, 0)
    (root / folder / sub).mkdir(parents=True, exist_ok=True)
    for n, picture in pictures.items():
        Image.fromarray(picture).save(root / folder / sub / n)
    for entry in content["images"]:
        entry["file_name"] = name(entry["file_name"])
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))
    return list(pictures.values())


def same(dataset, pictures):
    return [np.array_equal(dataset.image(n).permute(1, 2, 0), p) for n, p in enumerate(pictures)] == [True, True]


@pytest.mark.parametrize("layout", EXPORTS)
def test_layouts_of_exporters(tmp_path, layout):
    file, folder, split = EXPORTS[layout]
    pictures = export(tmp_path, file, folder)
    assert same(open_dataset(tmp_path, "coco", split), pictures)


NAMES = {
    "dot": lambda root, file, folder: "./batch_1/{}",
    "windows": lambda root, file, folder: "batch_1\\{}",
    "dots": lambda root, file, folder: "batch_1/../batch_1//{}",
    "from the top": lambda root, file, folder: f"{folder}/batch_1/{{}}",
    "from the top, windows": lambda root, file, folder: f"{folder}\\batch_1\\{{}}".replace("/", "\\"),
    "from the JSON": lambda root, file, folder: os.path.relpath(root / folder, (root / file).parent) + "/batch_1/{}",
    "absolute": lambda root, file, folder: f"{root / folder}/batch_1/{{}}",
}


@pytest.mark.parametrize("layout", EXPORTS)
@pytest.mark.parametrize("name", NAMES)
def test_file_names_of_exporters(tmp_path, layout, name):
    file, folder, split = EXPORTS[layout]
    pictures = export(tmp_path, file, folder, NAMES[name](tmp_path, file, folder).format, sub="batch_1")
    assert same(open_dataset(tmp_path, "coco", split), pictures)


def test_a_name_with_a_back_slash_is_taken_as_it_is(tmp_path):
    pictures = export(tmp_path, "val.json", "val", lambda n: f"a\\{n}")
    for n in ("0.png", "1.png"):
        (tmp_path / "val" / n).rename(tmp_path / "val" / f"a\\{n}")
    assert same(open_dataset(tmp_path, "coco", "val"), pictures)


def test_up_from_a_linked_folder(tmp_path):
    pictures = export(tmp_path / "disk", "unused.json", "photos")
    export(tmp_path / "set", "val.json", "unused", lambda n: f"../val/{n}")
    (tmp_path / "set" / "val").symlink_to(tmp_path / "disk" / "photos")
    assert same(open_dataset(tmp_path / "set", "coco", "val"), pictures)


def test_images_of_a_tar(tmp_path):
    pictures = export(tmp_path, "val.json", "val", lambda n: f".\\{n}")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "val", arcname=".")
    assert same(CocoDataset(tmp_path / "val.tar", tmp_path / "val.json"), pictures)


def test_all_images_come_from_one_folder(tmp_path):
    """One that is missing is not taken from another split's folder."""
    export(tmp_path, "annotations/instances_val.json", "images/val")
    (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "val" / "1.png").read_bytes())
    (tmp_path / "images" / "val" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"images/val/1.png does not exist; 1 of 2 images are missing"):
        open_dataset(tmp_path, "coco", "val")


@pytest.mark.parametrize("name", ["/home/me/{}", "C:\\data\\{}", "C:/data/{}"])
def test_absolute_paths_of_another_machine(tmp_path, name):
    export(tmp_path, "val.json", "val", lambda n: name.format(n))
    with pytest.raises(
        ValueError, match=r"image 10: 'file_name': .* absolute paths of another machine have to be made"
    ):
        open_dataset(tmp_path, "coco", "val")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("\0.png", r"cannot be read \(embedded null byte\)"),
        ("\ud800.png", "cannot be read"),
        ("a" * 300, r"cannot be read \(File name too long\)"),
        ("..", "is not a regular file"),
        (".", "is not a regular file"),
        ("/", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("val", "does not exist"),
    ],
)
def test_file_names_that_cannot_be(tmp_path, name, why):
    export(tmp_path, "val.json", "val", lambda n: name if n == "1.png" else n)
    with pytest.raises(ValueError, match=rf"(?s)val.json: image 11: 'file_name': .* {why}.*; 1 of 2 images are"):
        open_dataset(tmp_path, "coco", "val")


def test_files_that_are_named(tmp_path):
    pictures = export(tmp_path, "somewhere/mine.json", "else/where")
    file, images = tmp_path / "somewhere" / "mine.json", tmp_path / "else" / "where"
    assert same(open_dataset(None, None, "val", annotations=file, images=images), pictures)
    assert same(open_dataset(images, "coco", "val", annotations=file), pictures)
    for picture in images.iterdir():
        picture.rename(file.parent / picture.name)
    assert same(open_dataset(None, None, "val", annotations=file), pictures)
    for arguments, message in (
        (dict(annotations=file, images=tmp_path / "nowhere"), "nowhere does not exist"),
        (dict(images=images), "else/where need a file of annotations too"),
        (dict(annotations=tmp_path / "no.json"), "no.json cannot be read: No such file"),
        (dict(), "name the data: --data and --format, or --annotations"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(None, None, "val", **arguments)
    with pytest.raises(ValueError, match="COCO's format, not that of masks"):
        open_dataset(None, "masks", "val", annotations=file)


def test_an_unknown_layout_says_what_there_is(tmp_path):
    export(tmp_path, "somewhere/mine.json", "else")
    with pytest.raises(ValueError, match=r"It has somewhere/mine.json. --annotations FILE --images FOLDER names any"):
        open_dataset(tmp_path, "coco", "val")

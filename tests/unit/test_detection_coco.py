"""COCO files: targets and ground truth, what is handled and what is refused."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import CocoDataset, rle
from timm_halonet.detection.transforms import evaluation_transform

from ..support.detection_samples import coco_content, write_coco


def coco(tmp_path, change=None, masks=True, count=3):
    content, pictures = coco_content(count, 0)
    if change:
        change(content)
    write_coco(tmp_path, content, pictures)
    return CocoDataset(tmp_path / "train", tmp_path / "annotations" / "instances_train.json", masks=masks)


def set_in(key, value, index=1):
    return lambda content: content["annotations"][index].__setitem__(key, value)


def test_coco(tmp_path):
    dataset = coco(tmp_path)
    assert dataset.categories == [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    assert dataset.num_classes == 3
    image, target = dataset[0]
    content, pictures = coco_content(3, 0)
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(pictures["0.png"]))
    own = [a for a in content["annotations"] if a["image_id"] == 10]
    assert target["labels"].tolist() == [2] * len(own)  # category 7 is the second
    for box, mask, annotation in zip(target["boxes"].tolist(), target["masks"], own, strict=True):
        x, y, w, h = annotation["bbox"]
        assert box == [x, y, x + w, y + h]
        expected = torch.zeros(64, 64, dtype=torch.uint8)
        expected[y : y + h, x : x + w] = 1
        assert torch.equal(mask.as_subclass(torch.Tensor), expected)
    assert target["image_id"] == 10
    assert [note.split(": ")[1] for note in dataset.notes] == ["1 of 3 images have no objects to train on"]
    assert dataset.ground_truth()["annotations"] == content["annotations"]


def test_coco_boxes_at_and_beyond_the_border(tmp_path):
    """As COCO tools do: clipped for training, those without area left out of it; the evaluation has them all."""

    def change(content):
        boxes = ([-5, 10, 20, 20], [50, 50, 30, 30], [70, 5, 10, 10], [5, 5, 0, 9], [5, 5, 9, 9])
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box
        content["annotations"][4]["iscrowd"] = 1

    dataset = coco(tmp_path, change)
    assert dataset[0][1]["boxes"].tolist()[:2] == [[0, 10, 15, 30], [50, 50, 64, 64]]
    assert len(dataset[0][1]["boxes"]) == 2
    notes = "\n".join(dataset.notes)
    assert "2 boxes reach out of their image and were clipped to it: annotation 1 (0.png), 2 (0.png)" in notes
    assert "2 boxes have no area inside their image" in notes and "annotation 3 (0.png), 4 (0.png)" in notes
    assert "1 crowds are left out of training" in notes
    truth = dataset.ground_truth()["annotations"]
    assert [a["bbox"] for a in truth[:3]] == [[-5, 10, 20, 20], [50, 50, 30, 30], [70, 5, 10, 10]]


def test_boxes_below_a_pixel_are_said(tmp_path):
    """Left out of training with a note, also where clipping made them so; evaluated as they are."""

    def change(content):
        boxes = ([20, 20, 0.9, 30], [20, 20, 30, 0.5], [63.5, 10, 20, 20], [20, 20, 1, 1])
        for annotation, box in zip(content["annotations"], boxes, strict=True):
            annotation.update(bbox=box, image_id=10)
        content["annotations"][0]["segmentation"] = []

    dataset = coco(tmp_path, change, count=2)
    image, target = dataset[0]
    assert target["boxes"].tolist() == [[20, 20, 21, 21]]
    assert len(evaluation_transform()(image, target)[1]["boxes"]) == 1
    [note] = [note for note in dataset.notes if "less than a pixel" in note]
    assert "3 boxes are less than a pixel wide or high inside their image and are left out of training" in note
    assert note.endswith("annotation 1 (0.png), 2 (0.png), 3 (0.png)")
    assert [a["bbox"][2] for a in dataset.ground_truth()["annotations"]] == [0.9, 30, 20, 1]


def test_coco_run_lengths(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[3:9, 20:31] = 1
    flat = mask.ravel(order="F")
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], flat, [2]])))).tolist()
    if flat[0]:
        counts = [0, *counts]

    def change(content):
        content["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": counts}
        content["annotations"][1]["segmentation"] = rle.encode(mask)

    target = coco(tmp_path, change)[0][1]
    for n in (0, 1):
        assert np.array_equal(target["masks"][n].numpy(), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("category_id", 91), r"annotation 2 \(0.png\): 'category_id' is 91; the categories are 3, 7"),
        (set_in("image_id", 99), "annotation 2: 'image_id' is 99, which is not among the images"),
        (set_in("id", 1), "annotation 'id' 1 occurs twice"),
        (set_in("id", "one"), r"annotations\[1\]: 'id' is 'one', expected a whole number"),
        (set_in("bbox", [1, 2, 3]), r"annotation 2 \(0.png\): 'bbox' is \[1, 2, 3\], expected \[x, y, width, height\]"),
        (set_in("bbox", [1, 2, -3, 4]), "width, height >= 0"),
        (set_in("bbox", [1, 2, float("nan"), 4]), r"annotation 2 \(0.png\): 'bbox' is \[1, 2, nan, 4\]"),
        (set_in("segmentation", []), r"annotation 2 \(0.png\) has no 'segmentation', which a mask head needs"),
        (set_in("segmentation", "all"), r"annotation 2 \(0.png\): 'segmentation' is 'all', expected polygons"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotation 2 \(0.png\) has no 'bbox'"),
        (lambda c: c["images"][1].pop("width"), "image 11 has no 'width'"),
        (
            lambda c: c["images"][1].update(file_name="gone.png"),
            r"train/gone.png does not exist.*1 of 3 images are missing",
        ),
        (lambda c: c["images"].append(dict(c["images"][0])), "image 'id' 10 occurs twice"),
        (lambda c: c.pop("categories"), "has no list 'categories': not a COCO annotation file"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
    ],
)
def test_broken_coco_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        coco(tmp_path, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(width=60), r"train/0.png has 64 x 64 pixels .width, height., .* says 60 x 64"),
        (set_in("segmentation", [[1, 2, 3, 4]]), r"annotation 2 \(0.png\): 'segmentation': a polygon needs 6 numbers"),
        (set_in("segmentation", [[1, 2, 3, 4, 5, "6"]]), r"a polygon has values that are not numbers .*: '6'"),
        (
            set_in("segmentation", {"size": [9, 9], "counts": [81]}),
            r"a mask of \[9, 9\] .height, width. in an image of",
        ),
        (set_in("segmentation", {"size": [64, 64], "counts": [5]}), "add up to 5 pixels, the image has 4096"),
        (set_in("segmentation", {"size": [64, 64]}), "segmentation is dict, expected polygons or run lengths"),
        (set_in("segmentation", {"size": None, "counts": [4096]}), "a mask of None .height, width. in an image of"),
        (set_in("segmentation", {"size": [64, 64], "counts": None}), "'counts' is None, expected a list"),
        (set_in("segmentation", {"size": [64, 64], "counts": [4095, "1"]}), "'counts' holds '1', expected whole"),
        (set_in("segmentation", {"size": [64, 64], "counts": [4095.5, 0.5]}), "'counts' holds 4095.5, expected whole"),
        (
            set_in("segmentation", {"size": [64, 64], "counts": [4100, -4]}),
            "'counts' holds -4, expected whole",
        ),
        (set_in("segmentation", {"size": [64, 64], "counts": "zz!!"}), "compressed run lengths 'zz!!' are broken"),
        (set_in("segmentation", {"size": [64, 64], "counts": "P2P"}), "compressed run lengths 'P2P' are cut off"),
        (set_in("segmentation", {"size": [64, 64], "counts": "o" * 99}), "compressed run lengths 'ooo.*' are broken"),
        (set_in("segmentation", {"size": [64, 64], "counts": "1"}), "add up to 1 pixels, the image has 4096"),
        (set_in("segmentation", [[10, 8, 40, 8, 40, 1e30]]), r"a polygon has values that are not numbers .*: 1e\+30"),
    ],
)
def test_broken_coco_items(tmp_path, change, message):
    """In training when the image's turn comes; before anything is evaluated."""
    dataset = coco(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        dataset[0]
    with pytest.raises(ValueError, match=message):
        dataset.check()


def test_boxes_alone_do_for_boxes(tmp_path):
    target = coco(tmp_path, set_in("segmentation", []), masks=False)[0][1]
    assert "masks" not in target and len(target["boxes"]) == 4


def test_json_that_is_cut_off(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(coco_content(2, 0)[0])[:-20])
    with pytest.raises(ValueError, match=r"instances_train.json is not JSON: "):
        CocoDataset(tmp_path / "train", path)
    with pytest.raises(ValueError, match=r"nowhere.json cannot be read"):
        CocoDataset(tmp_path / "train", tmp_path / "nowhere.json")


def test_two_entries_of_one_file_are_said(tmp_path):
    content, pictures = coco_content(2, 0)
    content["images"][1]["file_name"] = content["images"][0]["file_name"]
    data = write_coco(tmp_path, content, pictures)
    dataset = CocoDataset(data / "train", data / "annotations" / "instances_train.json")
    assert any("1 images have the file of another one" in note for note in dataset.notes)

"""Every value of a COCO file in every wrong type: the right value, or an error that names file, entry and key."""

import json
import math

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import CocoDataset, average_precision, rle

from ..support.detection_samples import coco_content, write_coco

MISSING = object()
HUGE = 10**400  # a float would overflow
WRONG = {
    "missing": MISSING,
    "null": None,
    "text": "text",
    "empty text": "",
    "digits": "10",
    "list": [1],
    "empty list": [],
    "list of null": [None] * 4,
    "dict": {"a": 1},
    "true": True,
    "fraction": 1.5,
    "negative": -1,
    "nan": math.nan,
    "infinity": math.inf,
    "huge": HUGE,
    "huge float": 1e300,
}
KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
# what is right by the format or by what COCO tools do; all else is refused
RIGHT = {
    ("images", "file_name"): {},
    ("categories", "name"): {
        "missing": "7",
        "null": "7",
        "text": "text",
        "empty text": "",
        "digits": "10",
        "negative": "-1",
    },
    ("annotations", "id"): {"negative": -1},
    ("annotations", "area"): {"missing": 169, "null": 169, "fraction": 1.5},
    ("annotations", "iscrowd"): {"missing": 0, "null": 0, "true": 1},
}
PLACES = [(part, key, kind) for part, keys in KEYS.items() for key in keys for kind in WRONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    content, pictures = coco_content(2, 0)
    return write_coco(tmp_path_factory.mktemp("coco"), content, pictures)


def opened(folder, content, tmp_path, masks=True):
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(content))
    return CocoDataset(folder / "train", path, masks=masks)


def use(dataset):
    """All that training and evaluation ask of it; the scores of the truth itself."""
    for n in range(len(dataset)):
        dataset[n]
    dataset.check()
    truth = dataset.ground_truth()
    found = []
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            found.append({**{k: annotation[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9})
            if dataset.masks:
                found[-1]["segmentation"] = rle.encode(rle.decode(annotation["segmentation"], 64, 64))
    return truth, average_precision(truth, found)


@pytest.mark.parametrize(("part", "key", "kind"), PLACES, ids=lambda v: str(v).replace(" ", "_"))
def test_wrong_values(folder, tmp_path, part, key, kind):
    content, _ = coco_content(2, 0)
    first = content[part][0]
    if WRONG[kind] is MISSING:
        del first[key]
    else:
        first[key] = WRONG[kind]
    right = RIGHT.get((part, key), {})
    if kind in right:
        truth, scores = use(opened(folder, content, tmp_path))
        entries = {"images": 0, "categories": 1, "annotations": 0}  # category 7 is the second
        value = truth[part][entries[part]][key]
        assert value == right[kind] and type(value) is not bool
        assert scores["box"]["AP"] == scores["mask"]["AP"] == 1.0
        return
    with pytest.raises(ValueError) as error:
        use(opened(folder, content, tmp_path))
    text = str(error.value)
    assert "spoilt.json: " in text and "\n" not in text and len(text) < 400
    entry = {"images": "image 10", "categories": "category 7", "annotations": "annotation 1"}[part]
    if kind == "negative" and key == "id":  # an id that may be, and that others refer to
        assert "'image_id' is 10" in text or "'category_id' is 7" in text
    else:
        assert repr(key) in text and (f"{part}[0]" if key == "id" else f"{entry}") in text


def test_whole_numbers_as_floats(folder, tmp_path):
    """As pandas writes them."""
    content, _ = coco_content(2, 0)
    expected = CocoDataset(folder / "train", folder / "annotations" / "instances_train.json").ground_truth()
    size = [64, 64]
    content["annotations"][0]["segmentation"] = {"size": size, "counts": [64.0, 4032.0]}
    for part, keys in KEYS.items():
        for entry in content[part]:
            for key in keys:
                if isinstance(entry.get(key), int):
                    entry[key] = float(entry[key])
    truth, scores = use(opened(folder, content, tmp_path))
    assert truth["images"] == expected["images"] and truth["categories"] == expected["categories"]
    assert all(type(a[k]) is int for a in truth["annotations"] for k in ("id", "image_id", "category_id", "iscrowd"))
    assert truth["annotations"][0]["segmentation"] == {"size": size, "counts": [64, 4032]}
    assert scores["box"]["AP"] == scores["mask"]["AP"] == 1.0


@pytest.mark.parametrize("box", [[1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, HUGE], [1, 2, 3, True], [math.inf] * 4])
def test_wrong_values_in_a_box(folder, tmp_path, box):
    content, _ = coco_content(2, 0)
    content["annotations"][0]["bbox"] = box
    with pytest.raises(ValueError, match=r"spoilt.json: annotation 1 \(0.png\): 'bbox' is \[.*expected \[x, y, width"):
        opened(folder, content, tmp_path)


@pytest.mark.parametrize("part", KEYS)
@pytest.mark.parametrize("value", [None, "text", 3, ["text"], [None], [[]]], ids=str)
def test_parts_and_entries_of_a_wrong_type(folder, tmp_path, part, value):
    content, _ = coco_content(2, 0)
    content[part] = value
    with pytest.raises(ValueError, match=rf"spoilt.json has no list '{part}'|spoilt.json: {part}\[0\] is .*an object"):
        opened(folder, content, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '{"images": ' + "9" * 5000 + "}", "\0"])
def test_files_that_are_not_coco(folder, tmp_path, text):
    path = tmp_path / "spoilt.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"spoilt.json is not JSON: |spoilt.json has no list 'images'"):
        CocoDataset(folder / "train", path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(folder, tmp_path, encoding):
    content, _ = coco_content(2, 0)
    content["categories"][0]["name"] = "Zelle Ä 細胞"
    path = tmp_path / "marked.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert CocoDataset(folder / "train", path).categories[1]["name"] == "Zelle Ä 細胞"


def test_broken_segmentations_do_not_matter_to_boxes(folder, tmp_path):
    content, _ = coco_content(2, 0)
    content["annotations"][0]["segmentation"] = {"size": None, "counts": "zz!!"}
    _, scores = use(opened(folder, content, tmp_path, masks=False))
    assert scores["box"]["AP"] == 1.0 and "mask" not in scores

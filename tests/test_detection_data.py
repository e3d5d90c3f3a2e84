"""The two formats, what is refused and what is handled, augmentation."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from torchvision import tv_tensors
from torchvision.transforms import v2

from timm_halonet.detection import CocoDataset, MaskDataset, rle
from timm_halonet.detection.configs import TrainCfg
from timm_halonet.detection.data import open_dataset
from timm_halonet.detection.transforms import (
    RandomScaleCrop,
    evaluation_transform,
    instances,
    training_transform,
)

from .detection_samples import coco_content, discs, write_coco, write_masks


def naive_instances(label_map: np.ndarray):
    """Boxes and masks of a label map, one value after the other."""
    boxes, masks = [], []
    for value in sorted(set(label_map.ravel().tolist()) - {0}):
        mask = label_map == value
        rows, columns = np.nonzero(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(mask)
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(masks)


def test_masks_folder_tar_and_subfolders_agree(tmp_path):
    folder = write_masks(tmp_path / "set", train=3, val=2)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, arcname="some/nuclei")
    for split in ("train", "val"):
        for sub in ("images", "labels"):
            (tmp_path / "deep" / split / sub).mkdir(parents=True)
            for path in (folder / sub).glob(f"{split}*"):
                shutil.copy(path, tmp_path / "deep" / split / sub)
    sets = [MaskDataset(tmp_path / name, "train") for name in ("set", "set.tar", "deep")]
    expected = list(discs(3, 0))
    for dataset in sets:
        assert len(dataset) == 3
        for n, (picture, labels) in enumerate(expected):
            image, target = dataset[n]
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(picture))
            assert torch.equal(target["label_map"][0], torch.from_numpy(labels.astype(np.int32)))
    assert len(MaskDataset(tmp_path / "set.tar", "all")) == 5
    assert [len(MaskDataset(tmp_path / name, "val")) for name in ("set", "set.tar", "deep")] == [2, 2, 2]


def test_targets_from_label_maps(tmp_path):
    dataset = MaskDataset(write_masks(tmp_path, train=3), "train", evaluation_transform())
    for n, (_, labels) in enumerate(discs(3, 0)):
        image, target = dataset[n]
        boxes, masks = naive_instances(labels)
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        assert target["boxes"].tolist() == boxes.tolist()
        assert np.array_equal(target["masks"].numpy(), masks.reshape(target["masks"].shape))
        assert target["labels"].tolist() == [1] * len(boxes)
    assert len(target["boxes"]) == 0  # the last image holds nothing, and stays


def test_ground_truth_of_label_maps(tmp_path):
    truth = MaskDataset(write_masks(tmp_path, train=3), "train").ground_truth()
    for n, (_, labels) in enumerate(discs(3, 0)):
        own = [a for a in truth["annotations"] if a["image_id"] == n + 1]
        boxes, masks = naive_instances(labels)
        assert [a["bbox"] for a in own] == [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.tolist()]
        for annotation, mask in zip(own, masks, strict=True):
            assert np.array_equal(rle.decode(annotation["segmentation"], 64, 64), mask)
            assert annotation["area"] == mask.sum()


def test_instances_of_a_crop_equal_the_cropped_whole():
    labels = next(discs(2, 5))[1].astype(np.int32)[10:50, 20:60]
    masks, boxes = instances(torch.from_numpy(labels))
    expected_boxes, expected_masks = naive_instances(labels)
    assert boxes.tolist() == expected_boxes.tolist()
    assert np.array_equal(masks.numpy(), expected_masks)
    assert instances(torch.zeros(4, 5, dtype=torch.int32))[0].shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "labels" / "train1.png").unlink(),
            r"1 of 3 images of the split 'train' have no label map, 'train1'",
        ),
        (lambda f: (f / "images" / "train2.png").unlink(), r"no image, 'train2' the first"),
        (
            lambda f: Image.new("I;16", (64, 60)).save(f / "labels" / "train0.png"),
            r"labels/train0.png has 64 x 60 pixels .width, height., its image .*images/train0.png has 64 x 64",
        ),
        (lambda f: Image.new("RGB", (64, 64)).save(f / "labels" / "train0.png"), r"labels/train0.png has the mode RGB"),
        (lambda f: (f / "images" / "train1.png").write_bytes(b"no image"), r"images/train1.png: not an image"),
        (lambda f: (f / "split.json").write_text("{"), r"split.json is no JSON"),
        (lambda f: (f / "split.json").write_text('{"val": []}'), r"split.json has no split 'train'; it has val"),
        (lambda f: (f / "split.json").write_text('{"train": []}'), r"the split 'train' has no images"),
        (lambda f: (f / "split.json").write_text('{"train": ["train0", "train0"]}'), r"names 'train0' more than once"),
        (lambda f: (f / "split.json").unlink(), r"neither a split.json beside images/ nor a folder train/images/"),
        (lambda f: Image.new("L", (64, 64)).save(f / "images" / "train0.jpg"), r"have the same name"),
        (lambda f: (f / "images").rename(f / "pictures"), r"has no folder images/"),
    ],
)
def test_broken_mask_folders(tmp_path, spoil, message):
    folder = write_masks(tmp_path / "set", train=3)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        MaskDataset(folder, "train")


def test_broken_tars(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname="set")
    with pytest.raises(ValueError, match=r"set.tar.gz is no uncompressed tar .*; unpack it"):
        MaskDataset(tmp_path / "set.tar.gz", "train")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        MaskDataset(tmp_path / "nowhere", "train")


def test_an_image_that_breaks_later_is_named(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    dataset = MaskDataset(folder, "train")
    path = folder / "images" / "train1.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"images/train1.png: not an image that Pillow can read"):
        dataset[1]


def test_grey_and_deep_images(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    Image.new("L", (64, 64), 77).save(folder / "images" / "train0.png")
    deep = np.full((64, 64), 65535, np.uint16)
    deep[0, 0] = 32768
    Image.fromarray(deep).save(folder / "images" / "train1.png")
    dataset = MaskDataset(folder, "train")
    assert dataset.image(0).unique().tolist() == [77] and dataset.image(0).shape == (3, 64, 64)
    assert dataset.image(1)[:, 1, 1].tolist() == [255] * 3
    assert abs(int(dataset.image(1)[0, 0, 0]) - 127) <= 1


def coco(tmp_path, change=None, masks=True, count=3):
    content, pictures = coco_content(count, 0)
    if change:
        change(content)
    write_coco(tmp_path, content, pictures)
    return CocoDataset(tmp_path / "train", tmp_path / "annotations" / "instances_train.json", masks=masks)


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


def set_in(key, value, index=1):
    return lambda content: content["annotations"][index].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("category_id", 91), r"annotation 2 \(0.png\) has the category 91; the categories are 3, 7"),
        (set_in("image_id", 99), "annotation 2 belongs to the image 99, which is not in the list"),
        (set_in("id", 1), "annotation id 1 occurs twice"),
        (set_in("id", "one"), "annotation 1 of the list has no whole number as id"),
        (set_in("bbox", [1, 2, 3]), r"annotation 2 \(0.png\) has the box \[1, 2, 3\]"),
        (set_in("bbox", [1, 2, -3, 4]), "width, height >= 0"),
        (set_in("bbox", [1, 2, float("nan"), 4]), r"annotation 2 \(0.png\) has the box"),
        (set_in("segmentation", []), r"annotation 2 \(0.png\) has no segmentation, which a mask head needs"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotation 2 has no 'bbox'"),
        (lambda c: c["images"][1].pop("width"), "image 11 has no 'width'"),
        (
            lambda c: c["images"][1].update(file_name="gone.png"),
            r"train/gone.png does not exist.*1 of 3 images are missing",
        ),
        (lambda c: c["images"].append(dict(c["images"][0])), "image id 10 occurs twice"),
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
        (set_in("segmentation", [[1, 2, 3, 4]]), r"annotation 2 \(0.png\): a polygon needs 6 numbers"),
        (set_in("segmentation", [[1, 2, 3, 4, 5, "6"]]), r"annotation 2 \(0.png\): a polygon has values that are no"),
        (
            set_in("segmentation", {"size": [9, 9], "counts": [81]}),
            r"a mask of \[9, 9\] .height, width. in an image of",
        ),
        (set_in("segmentation", {"size": [64, 64], "counts": [5]}), "add up to 5 pixels, the image has 4096"),
        (set_in("segmentation", "all"), "segmentation is str, expected polygons or run lengths"),
    ],
)
def test_broken_coco_items(tmp_path, change, message):
    dataset = coco(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_boxes_alone_do_for_boxes(tmp_path):
    target = coco(tmp_path, set_in("segmentation", []), masks=False)[0][1]
    assert "masks" not in target and len(target["boxes"]) == 4


def test_crop_of_label_map_and_of_boxes_agree():
    """The same crop by both roads: boxes of the cropped label map lie within the cropped boxes, to the rounding."""
    picture, labels = next(discs(2, 3))
    boxes, masks = naive_instances(labels)
    image = tv_tensors.Image(torch.from_numpy(picture).permute(2, 0, 1))
    crop = RandomScaleCrop(64, 1.7, (0.8, 1.25))
    for seed in range(20):
        torch.manual_seed(seed)
        a = crop(image, {"label_map": tv_tensors.Mask(torch.from_numpy(labels.astype(np.int32))[None])})
        torch.manual_seed(seed)
        boxed = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(64, 64))
        b = crop(image, {"masks": tv_tensors.Mask(torch.from_numpy(masks).byte()), "boxes": boxed})
        assert torch.equal(a[0], b[0]) and a[0].shape == (3, 64, 64)
        cut, found = instances(a[1]["label_map"].as_subclass(torch.Tensor)[0])
        left = b[1]["masks"].as_subclass(torch.Tensor)
        there = left.flatten(1).any(1)
        assert torch.equal(cut, left[there])
        limits = b[1]["boxes"].as_subclass(torch.Tensor)[there]
        assert (found[:, :2] >= limits[:, :2] - 2.2).all() and (found[:, 2:] <= limits[:, 2:] + 2.2).all()


@pytest.mark.parametrize("size", [(20, 90), (90, 20), (64, 64), (5, 5)])
def test_crop_of_any_image(size):
    """Pixels of a crop at scale 1 are the image's, or black beyond it; a smaller image is all there."""
    image = tv_tensors.Image(torch.randint(1, 256, (3, *size), dtype=torch.uint8))
    for seed in range(10):
        torch.manual_seed(seed)
        crop = RandomScaleCrop(32)(image)
        assert crop.shape == (3, 32, 32)
        inside = (crop > 0).all(0)
        assert int(inside.sum()) == min(32, size[0]) * min(32, size[1])
        rows, columns = inside.any(1).nonzero().ravel(), inside.any(0).nonzero().ravel()
        part = crop[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        windows = image.unfold(1, part.shape[1], 1).unfold(2, part.shape[2], 1)
        assert (windows == part[:, None, None]).all(dim=-1).all(dim=-1).all(dim=0).any()


def test_training_transform_moves_boxes_with_the_pixels(tmp_path):
    """Flips and crops: under each mask lie the bright pixels of its disc."""
    cfg = TrainCfg(crop=64, jitter=(0.8, 1.25), flips="hv", color=0.2)
    dataset = MaskDataset(write_masks(tmp_path, train=3), "train", training_transform(cfg))
    for n in range(2):
        for seed in range(5):
            torch.manual_seed(seed)
            image, target = dataset[n]
            assert image.shape == (3, 64, 64)
            for mask, (x1, y1, x2, y2) in zip(target["masks"].bool(), target["boxes"].int().tolist(), strict=True):
                rows, columns = mask.nonzero().T
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
                outside = target["masks"].sum(0) == 0
                assert image[:, mask].mean() > image[:, outside].mean() + 0.1
    for wrong in ({"flips": "x"}, {"crop": 64, "jitter": (0.0, 1.0)}):
        with pytest.raises(ValueError, match=r"flips is 'x'|jitter"):
            training_transform(TrainCfg(**wrong))


def test_whole_images_keep_their_size(tmp_path):
    content, pictures = coco_content(2, 0)
    write_coco(tmp_path, content, pictures)
    dataset = open_dataset(tmp_path, "coco", "train", training_transform(TrainCfg(flips="none")))
    image, target = dataset[0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert type(target["boxes"]) is torch.Tensor and target["masks"].dtype == torch.uint8
    assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pictures["0.png"]))
    flipped = v2.functional.horizontal_flip(tv_tensors.Image(image))
    dataset.transform = training_transform(TrainCfg(flips="h"))
    seen = set()
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = dataset[0]
        seen.add(bool(torch.equal(image, flipped.as_subclass(torch.Tensor))))
    assert seen == {True, False}


def test_json_that_is_cut_off(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(coco_content(2, 0)[0])[:-20])
    with pytest.raises(ValueError, match=r"instances_train.json is no JSON: "):
        CocoDataset(tmp_path / "train", path)
    with pytest.raises(ValueError, match=r"nowhere.json cannot be read"):
        CocoDataset(tmp_path / "train", tmp_path / "nowhere.json")


def test_exif_orientation(tmp_path):
    """A photo that was turned by its EXIF data fits a label map of the turned size."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    (tmp_path / "images" / "a.jpg").write_bytes(buffer.getvalue())
    Image.new("L", (20, 40)).save(tmp_path / "labels" / "a.png")
    assert MaskDataset(tmp_path, "all").image(0).shape == (3, 40, 20)
    Image.new("L", (40, 20)).save(tmp_path / "labels" / "a.png")
    with pytest.raises(ValueError, match=r"a.png has 40 x 20 pixels .*a.jpg has 20 x 40"):
        MaskDataset(tmp_path, "all")

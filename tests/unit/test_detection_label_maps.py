"""Images with label maps: layouts, targets, what is refused."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import MaskDataset, rle
from timm_halonet.detection.transforms import evaluation_transform

from ..support.detection_samples import discs, naive_instances, write_masks


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
        (lambda f: (f / "split.json").write_text("{"), r"split.json is not JSON"),
        (lambda f: (f / "split.json").write_text('{"val": []}'), r"split.json has no split 'train'; it has val"),
        (lambda f: (f / "split.json").write_text('{"train": []}'), r"the split 'train' has no images"),
        (lambda f: (f / "split.json").write_text('{"train": ["train0", "train0"]}'), r"names 'train0' more than once"),
        (lambda f: (f / "split.json").unlink(), r"neither a split.json next to images/ nor a folder train/images/"),
        (lambda f: Image.new("L", (64, 64)).save(f / "images" / "train0.jpg"), r"have the same name"),
        (lambda f: (f / "images").rename(f / "pictures"), r"has no folder images/"),
    ],
)
def test_broken_mask_folders(tmp_path, spoil, message):
    folder = write_masks(tmp_path / "set", train=3)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        MaskDataset(folder, "train")


def test_an_image_that_breaks_later_is_named(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    dataset = MaskDataset(folder, "train")
    path = folder / "images" / "train1.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"images/train1.png: not an image that Pillow can read"):
        dataset[1]


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

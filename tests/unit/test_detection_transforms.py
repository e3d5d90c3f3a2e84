"""Crops, flips and what becomes of the objects."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from torchvision import tv_tensors
from torchvision.transforms import v2

from timm_halonet.detection import MaskDataset
from timm_halonet.detection.configs import TrainCfg
from timm_halonet.detection.data import open_dataset
from timm_halonet.detection.transforms import RandomScaleCrop, instances, training_transform

from ..support.detection_samples import coco_content, discs, naive_instances, write_coco, write_masks


def test_instances_of_a_crop_equal_the_cropped_whole():
    labels = next(discs(2, 5))[1].astype(np.int32)[10:50, 20:60]
    masks, boxes = instances(torch.from_numpy(labels))
    expected_boxes, expected_masks = naive_instances(labels)
    assert boxes.tolist() == expected_boxes.tolist()
    assert np.array_equal(masks.numpy(), expected_masks)
    assert instances(torch.zeros(4, 5, dtype=torch.int32))[0].shape == (0, 4, 5)


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


def test_transforms_draw_from_the_generator_of_the_process(tmp_path):
    """The same for the same seed; the training loop keeps the trace of it out, not the transform."""
    cfg = TrainCfg(crop=64, jitter=(0.8, 1.25), flips="hv", color=0.2)
    transform = training_transform(cfg)
    assert isinstance(transform, v2.Compose)
    dataset = MaskDataset(write_masks(tmp_path, train=2), "train", transform)
    images, states = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images.append(dataset[0][0])
        states.append(torch.random.get_rng_state())
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    torch.manual_seed(0)
    assert not torch.equal(states[0], torch.random.get_rng_state())

"""Where exporters put JSON and images, and how they write file names."""

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection.data import open_dataset

from .detection_samples import coco_content, write_coco


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

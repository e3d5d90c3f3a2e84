"""Files in folders and tars: links, pipes, gigantic and sparse members."""

import tarfile

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import MaskDataset

from .detection_samples import write_masks


def test_broken_tars(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname="set")
    with pytest.raises(ValueError, match=r"set.tar.gz is not an uncompressed tar .*; unpack it"):
        MaskDataset(tmp_path / "set.tar.gz", "train")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        MaskDataset(tmp_path / "nowhere", "train")

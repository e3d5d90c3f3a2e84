"""Files in folders and tars: links, pipes, gigantic and sparse members."""

import json
import os
import tarfile

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import MaskDataset
from timm_halonet.detection.files import open_files

from ..support.detection_samples import write_masks


def test_broken_tars(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname="set")
    with pytest.raises(ValueError, match=r"set.tar.gz is not an uncompressed tar .*; unpack it"):
        MaskDataset(tmp_path / "set.tar.gz", "train")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        MaskDataset(tmp_path / "nowhere", "train")


def add_member(file, name, data=b"", size=None):
    """A member of a tar that may claim another size than it has."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    file.write(info.tobuf() + data + b"\0" * (-len(data) % 512))


def test_a_tar_member_of_ten_gigabytes(tmp_path):
    folder = write_masks(tmp_path / "set", train=2)
    with open(tmp_path / "cut.tar", "wb") as file:
        add_member(file, "images/train0.png", b"short", size=10 * 2**30)
    with pytest.raises(ValueError, match=r"cut.tar is not an uncompressed tar \(unexpected end of data\)"):
        open_files(tmp_path / "cut.tar")
    with open(tmp_path / "long.tar", "wb") as file:  # as long as it says, but for holes
        add_member(file, "images/train0.png", size=10 * 2**30)
        file.seek(10 * 2**30, os.SEEK_CUR)
        for name in ("images/train1.png", "labels/train1.png", "labels/train0.png"):
            add_member(file, name, (folder / name).read_bytes())
        file.write(b"\0" * 1024)
    with pytest.raises(ValueError, match=r"long.tar:images/train0.png: 10737418240 bytes, more than the 1073741824"):
        MaskDataset(tmp_path / "long.tar", "all")


def test_sparse_tar_members_are_refused(tmp_path):
    """Their bytes in the tar are not the file's."""
    path = tmp_path / "gnu.tar"
    info = tarfile.TarInfo("images/a.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (2**20, 512)  # one piece, behind a hole
    header[483:495] = b"%011o\0" % (2**20 + 512)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + b"x" * 512 + b"\0" * 1024)
    files = open_files(path)
    assert files.names == ["images/a.png"]
    with pytest.raises(ValueError, match=r"gnu.tar:images/a.png: stored with holes \(sparse\); unpack the tar"):
        files.read("images/a.png")


def test_links_that_lead_back(tmp_path):
    """Each file has few names, however the folders are linked."""
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").touch()
        (tmp_path / name / "up").symlink_to("..")
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    (tmp_path / "self").symlink_to("self")
    names = open_files(tmp_path).names
    assert {f"{name}/photo.png" for name in "abcdefgh"} <= set(names)
    assert len(names) < 100


def test_two_links_to_one_folder_are_both_listed(tmp_path):
    folder = write_masks(tmp_path / "set", all=2)
    for split in ("train", "val"):
        (tmp_path / "splits" / split).mkdir(parents=True)
        for sub in ("images", "labels"):
            (tmp_path / "splits" / split / sub).symlink_to(folder / sub)
    (tmp_path / "splits" / "test").symlink_to("val")
    for split in ("train", "val", "test"):
        assert len(MaskDataset(tmp_path / "splits", split)) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["images/train0.png", "labels/train0.png", "split.json"])
def test_pipes_and_devices_in_place_of_files(tmp_path, name):
    for n, make in enumerate((os.mkfifo, lambda path: os.symlink("/dev/zero", path))):
        folder = write_masks(tmp_path / str(n), train=1)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ValueError, match=rf"{name}: not a regular file"):
            MaskDataset(folder, "train")
        make(tmp_path / f"{n}.tar")
        with pytest.raises(ValueError, match=rf"{n}.tar: not a regular file"):
            MaskDataset(tmp_path / f"{n}.tar", "train")


def test_split_files_with_values_of_a_wrong_type(tmp_path):
    folder = write_masks(tmp_path, train=1)
    for value, message in (
        (None, "the split 'train' is None, expected a list of names"),
        ("train0", "the split 'train' is 'train0', expected a list of names"),
        (["train0", None], "the split 'train': entry 1 is None, expected a name"),
        ([["train0"]], r"the split 'train': entry 0 is \['train0'\], expected a name"),
        ([1.5], "the split 'train': entry 0 is 1.5, expected a name"),
        ([7], "1 of 1 images of the split 'train' have no image, '7' the first"),
    ):
        (folder / "split.json").write_text(json.dumps({"train": value}))
        with pytest.raises(ValueError, match=message):
            MaskDataset(folder, "train")
    (folder / "split.json").write_text(json.dumps(["train0"]))
    with pytest.raises(ValueError, match=r"split.json has no split 'train'; it has none"):
        MaskDataset(folder, "train")
    (folder / "split.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"train": ["train0"]}).encode())
    assert len(MaskDataset(folder, "train")) == 1

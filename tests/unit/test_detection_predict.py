"""Pictures of what a detector finds: one bad photo does not end the others, whatever its name; no run reads its own."""

import json
import os

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")

from timm_halonet.detection import predicting
from timm_halonet.detection.data import open_dataset
from timm_halonet.detection.predicting import Predictor

from ..support.detection_samples import coco_content, write_coco

CATEGORIES = [{"id": 1, "name": "disc"}]


@pytest.fixture
def predictor(monkeypatch):
    """Finds one box in each photo; fails as torchvision does where resizing leaves no row."""

    def detect(model, images, amp=None):
        if min(images[0].shape[-2:]) < 2:
            raise RuntimeError("Input and output sizes should be greater than 0\nmore")
        return [
            {
                "boxes": torch.tensor([[2.0, 2.0, 9.0, 9.0]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.9]),
            }
        ]

    monkeypatch.setattr(predicting, "detect", detect)
    return lambda: Predictor(torch.nn.Identity(), CATEGORIES)


def photo(path, size=(40, 30)):
    Image.new("RGB", size, "red").save(path)
    return path


def test_bad_photos_do_not_end_the_others(predictor, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    photo(folder / "1.png")
    photo(folder / "2.png", (3000, 1))
    (folder / "3.png").write_bytes(b"no image")
    photo(folder / "4.png")
    p = predictor()
    assert p.draw_photos([folder], out) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "2.png" in err[0] and "greater than 0" in err[0] and "3.png" in err[1]
    found = json.loads((out / "predictions.json").read_text())
    assert [entry["file"] for entry in found] == [str(folder / "1.png"), str(folder / "4.png")]
    assert sorted(f.name for f in out.iterdir()) == ["0001_1.png", "0002_4.png", "predictions.json", "sheet.png"]


def test_bad_images_of_a_dataset_do_not_end_the_others(predictor, tmp_path, capsys):
    data, out = write_coco(tmp_path / "data", *coco_content(3, 0)), tmp_path / "out"
    out.mkdir()
    dataset = open_dataset(data, "coco", "train", None, False)
    (data / "train" / "1.png").write_bytes(b"no image")
    assert predictor().draw_dataset(dataset, 8, out) == 1
    assert "1.png: not an image" in capsys.readouterr().err
    assert [entry["file"] for entry in json.loads((out / "predictions.json").read_text())] == ["0.png", "2.png"]
    with pytest.raises(ValueError, match="--count is 0"):
        predictor().draw_dataset(dataset, 0, out)


def test_a_full_disk_does_end_it(predictor, tmp_path, monkeypatch):
    def full(picture, path):
        raise OSError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(predicting, "_write_png", full)
    with pytest.raises(OSError, match=r"0001_1.png: No space left"):
        predictor().draw_photos([photo(tmp_path / "1.png"), photo(tmp_path / "2.png")], tmp_path)


@pytest.mark.parametrize(
    "name", [b"a" * 249 + b".png", "é".encode() * 124 + b".png", b"caf\xe9.png", "細 😀.png".encode()]
)
def test_any_name_of_a_photo(predictor, tmp_path, name):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    try:
        os.rename(photo(tmp_path / "x.png"), os.fsencode(folder) + b"/" + name)
    except OSError as e:
        pytest.skip(f"this file system has no such names: {e}")
    assert predictor().draw_photos([folder], out) == 0
    [entry] = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert os.fsencode(entry["file"]) == os.fsencode(folder) + b"/" + name
    assert len(list(out.glob("0001_*.png"))) == 1


@pytest.mark.parametrize("out", [".", "pictures"])
def test_does_not_read_its_own_pictures(predictor, tmp_path, out):
    folder, out = tmp_path, tmp_path / out
    out.mkdir(exist_ok=True)
    photo(folder / "0001_cat.png")
    photo(folder / "b.png")
    photo(folder / "sheet.png")
    for _ in range(3):
        assert predictor().draw_photos([folder], out) == 0
        found = json.loads((out / "predictions.json").read_text())
        assert [os.path.basename(entry["file"]) for entry in found] == ["0001_cat.png", "b.png", "sheet.png"]
    with Image.open(folder / "sheet.png") as kept:  # the photo, which no picture may be written over
        assert kept.size == (40, 30)
    assert (out / ("sheet_.png" if out == folder else "sheet.png")).exists()
    # fewer photos than before: what the earlier runs drew of the others is still no photo
    os.unlink(folder / "b.png")
    for _ in range(2):
        assert predictor().draw_photos([folder], out) == 0
        found = json.loads((out / "predictions.json").read_text())
        assert [os.path.basename(entry["file"]) for entry in found] == ["0001_cat.png", "sheet.png"]
    # but one that is named is taken
    [drawn] = out.glob("0001_0001_cat.png")
    assert predicting.photos_in([drawn]) == [str(drawn)]


def test_paths_are_shown_as_they_were_given(predictor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "out").mkdir()
    photo(tmp_path / "photos" / "a.png")
    assert predictor().draw_photos(["./photos//a.png", "./photos/../photos"], tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in found] == ["./photos//a.png", "./photos/../photos/a.png"]
    for path in ("./nowhere//x.png", "../nowhere"):
        with pytest.raises(ValueError, match=rf"^{path} does not exist$"):
            predicting.photos_in([path])

"""What `detect train` takes from a file, and what it finds out by itself."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("torchvision")

from timm_halonet.cli import main
from timm_halonet.detection import train_command
from timm_halonet.detection.command import expand_config
from timm_halonet.detection.data import open_dataset
from timm_halonet.detection.guessing import guess_format, guess_split, has_masks

from ..support.detection_samples import coco_content, write_coco, write_masks


def test_config_file_stands_before_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "data: /data/cells\nminutes: 10\npretrained: true\nno-eval: false\ntrain_split: null\nlr: 2e-4\n"
        "mask_layers: [32, 32]\nset:\n  crop: 128\n  norm: batch\n"
    )
    words = expand_config(["detect", "train", "--minutes", "5", "--config", str(file), "--set", "lr=1e-3"])
    assert words == [
        *("detect", "train", "--data=/data/cells", "--minutes=10", "--pretrained"),
        *("--set", "lr=2e-4", "mask_layers=[32, 32]", "crop=128", "norm=batch"),
        *("--minutes", "5", "--config", str(file), "--set", "lr=1e-3"),
    ]
    file.write_text("set: [crop=128, norm=batch]")
    assert expand_config(["detect", "train", f"--config={file}"])[2:5] == ["--set", "crop=128", "norm=batch"]
    for other in (["detect", "eval", "--config", "x"], ["classify", "a.png"], ["detect", "train", "--data", "x"]):
        assert expand_config(other) == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("learning_rate: 3", "unknown option 'learning_rate'; there are .*minutes"),
        ("config: other.yaml", "unknown option 'config'"),
        ("- 3", "is not a mapping of options"),
        ("set: 3", "is not a mapping of options"),
        ("a: [", "is not YAML"),
        ("pretrained: 3", "pretrained is 3, expected true or false"),
    ],
)
def test_config_files_that_are_wrong(tmp_path, capsys, text, message):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=rf"^{file}.*{message}"):
        expand_config(["detect", "train", "--config", str(file)])
    assert main(["detect", "train", "--config", str(file)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_format_and_splits_are_found(tmp_path):
    masks = write_masks(tmp_path / "masks", train=2, val=1)
    assert guess_format(masks) == "masks" and guess_split(masks, "masks", "val") == "val"
    coco = tmp_path / "coco"
    for split in ("train", "valid"):
        write_coco(coco, *coco_content(2, 0), split)
    assert guess_format(coco) == "coco"
    assert (guess_split(coco, "coco", "train"), guess_split(coco, "coco", "val")) == ("train", "valid")
    roboflow = tmp_path / "roboflow"
    for split in ("train", "test"):
        (roboflow / split).mkdir(parents=True)
        (roboflow / split / "_annotations.coco.json").write_text("{}")
    assert guess_format(roboflow) == "coco" and guess_split(roboflow, "coco", "val") == "test"
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="has neither a JSON of annotations"):
        guess_format(tmp_path / "photos")


def test_detector_goes_by_the_masks(tmp_path):
    content, pictures = coco_content(2, 0)

    def open_():
        return open_dataset(write_coco(tmp_path, content, pictures), "coco", "train", None, False)

    assert has_masks(open_())
    content["annotations"][0]["segmentation"] = []
    assert not has_masks(open_())
    content["annotations"][0]["bbox"][2:] = [0, 0]  # an object without area needs none
    assert has_masks(open_())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    assert not has_masks(open_())
    assert has_masks(open_dataset(write_masks(tmp_path / "m", train=2), "masks", "train"))


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """Runs the command up to the training; gives its arguments, the detector's options and what was said."""

    def run(*words):
        seen = {}

        def stop(args, trainer, held_out):
            seen.update(args=args, trainer=trainer, held_out=held_out)

        monkeypatch.setattr(train_command, "_run", stop)
        assert main(["detect", "train", "--device", "cpu", "--workers", "0", "--model", "resnet10t", *words]) == 0
        return SimpleNamespace(**seen)

    return run


def test_nothing_named_but_data_and_minutes(tmp_path, settled, monkeypatch, capsys):
    """Boxes of 200 photos, ten minutes: the preset for little time, sides from the images, smaller if they must be."""
    for split in ("train", "valid"):
        content, pictures = coco_content(3, 0)
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
        write_coco(tmp_path / "data", content, pictures, split)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "_sizes", lambda dataset: [(480, 640)])
    paces = iter([6.0, 2.0, 1.2, 1.2])
    monkeypatch.setattr(train_command.Trainer, "time_steps", lambda self: next(paces))
    found = settled("--data", "data", "--minutes", "10")
    assert (found.args.format, found.args.detector, found.args.preset) == ("coco", "faster_rcnn", "quick")
    assert (found.args.split, found.args.epochs, found.args.out) == ("valid", None, "detector")
    options = found.trainer.model.recipe.options
    # 100 steps of 6 s at 480: half the side; then 300 of 2 s: a little smaller again
    assert (options.min_size, options.max_size) == (192, 319)
    assert found.trainer.cfg.lr == 5e-4 and len(found.held_out) == 3
    out = capsys.readouterr().out
    assert "preset quick, sides 192 / 319: 1.20 s a step, about 500 steps in the budget" in out
    assert "fewer than" not in out


def test_few_steps_are_said(tmp_path, settled, monkeypatch, capsys):
    write_coco(tmp_path / "data", *coco_content(3, 0), "train")
    monkeypatch.setattr(train_command.Trainer, "time_steps", lambda self: 37.0)
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    found = settled(*words, "--minutes", "6", "--preset", "standard", "--detector", "faster_rcnn")
    out = capsys.readouterr().out
    assert "the budget gives about 9 steps of 37.00 s" in out and "--preset quick" in out and "min_size=" in out
    assert found.held_out is None and "has no split for the evaluation" in out
    settled(*words, "--epochs", "4", "--detector", "faster_rcnn")  # two steps an epoch
    assert "the budget gives about 8 steps" in capsys.readouterr().out
    settled(*words, "--epochs", "400", "--detector", "faster_rcnn")
    assert "the budget gives" not in capsys.readouterr().out


def test_sides_that_are_named_stay(tmp_path, settled, monkeypatch):
    write_coco(tmp_path / "data", *coco_content(3, 0), "train")
    monkeypatch.setattr(train_command.Trainer, "time_steps", lambda self: 37.0)
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--minutes", "6"]
    found = settled(*words, "--set", "min_size=640")
    assert (found.args.preset, found.trainer.model.recipe.options.min_size) == ("quick", 640)


@pytest.mark.integration
def test_resumed_run_keeps_its_sides(tmp_path, settled, monkeypatch):
    write_coco(tmp_path / "data", *coco_content(3, 0), "train")
    monkeypatch.setattr(train_command.Trainer, "time_steps", lambda self: 10.0)
    monkeypatch.setattr(train_command, "_sizes", lambda dataset: [(480, 640)])
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--minutes", "6"]
    found = settled(*words)
    assert found.trainer.model.recipe.options.min_size == 160
    found.trainer.save()
    monkeypatch.setattr(train_command.Trainer, "time_steps", lambda self: 0.1)
    assert main(["detect", "train", *words]) == 1  # holds a run already
    again = settled(*words, "--resume")
    assert again.trainer.model.recipe.options == replace(found.trainer.model.recipe.options)
    # the file of the run is what counts, not what was measured now
    assert json.loads(json.dumps(again.trainer._identity())) == json.loads(json.dumps(found.trainer._identity()))

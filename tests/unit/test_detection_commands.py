"""train, eval and predict on data that is not as it should be, and on data that is named by file and folder."""

import json
import os
import shutil
import tarfile

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.cli import main
from timm_halonet.detection import CocoDataset, MaskDataset, evaluation, faster_rcnn, mask_rcnn, save_detector

from ..support.detection_samples import coco_content, write_coco, write_masks

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
SMALL = dict(min_size=64, max_size=64, fpn_channels=8, box_features=8, rpn_post_nms_top_n_test=10)
TRAIN = ["--model", "resnet10t", "--detector", "faster_rcnn", "--epochs", "1", "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Untrained ones, as training would have saved them."""
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    save_detector(folder / "boxes", faster_rcnn("resnet10t", 3, **SMALL), CATEGORIES)
    save_detector(folder / "masks", mask_rcnn("resnet10t", 3, **SMALL, mask_layers=(8,)), CATEGORIES)
    return folder


def write(folder, change=None, split="val"):
    content, pictures = coco_content(2, 0)
    if change:
        change(content)
    return write_coco(folder, content, pictures, split)


def run(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = main([str(a) for a in ("detect", *arguments)])
    return code, *capsys.readouterr()


def both(capsys, trained, data, tmp_path):
    """eval and predict on the same data."""
    yield run(capsys, "eval", trained, *data, "--device", "cpu", "--out", tmp_path / "scores.json")
    yield run(capsys, "predict", trained, *data, "--device", "cpu", "--out", tmp_path / "pictures")


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_images_of_another_size_than_the_json_says(detectors, tmp_path, capsys, kind):
    data = write(tmp_path / "data", lambda c: [entry.update(width=128, height=128) for entry in c["images"]])
    for code, _, err in both(capsys, detectors / kind, ["--data", data, "--format", "coco"], tmp_path):
        assert code == 1 and "val/0.png has 64 x 64 pixels (width, height), " in err and "says 128 x 128" in err


def test_broken_segmentations(detectors, tmp_path, capsys):
    data = write(tmp_path / "data", lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]))
    for code, _, err in both(capsys, detectors / "masks", ["--data", data, "--format", "coco"], tmp_path):
        assert code == 1 and "annotation 2 (0.png): 'segmentation': a polygon needs 6 numbers" in err
    code, _, _ = run(capsys, "eval", detectors / "boxes", "--data", data, "--format", "coco", "--out", tmp_path / "s")
    assert code == 0


def test_other_categories_are_refused_by_name(detectors, tmp_path, capsys):
    data = write(tmp_path / "data", lambda c: c["categories"][0].update(name="ring"))
    for code, _, err in both(capsys, detectors / "boxes", ["--data", data, "--format", "coco"], tmp_path):
        assert code == 1
        assert (
            "val.json has other categories than the detector: only it has 'ring'; only the detector has 'disc'" in err
        )


def truth_as_found(dataset, names, monkeypatch):
    """A detector that finds the truth, with labels in the order of these names."""
    truth = dataset.ground_truth()
    ids = {category["id"]: names.index(category["name"]) + 1 for category in truth["categories"]}
    images = iter(truth["images"])

    def detect(model, batch, **kwargs):
        image_id = next(images)["id"]
        own = [a for a in truth["annotations"] if a["image_id"] == image_id]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([ids[a["category_id"]] for a in own], dtype=torch.int64)
        return [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(own))}]

    monkeypatch.setattr(evaluation, "detect", detect)


@pytest.mark.parametrize("ids", [(3, 7), (7, 3), (0, 1), (40, 20)])
def test_categories_are_matched_by_name(tmp_path, monkeypatch, ids):
    """Whatever their ids and order: a detector that finds all of it scores 1."""

    def change(content):
        renumbered = dict(zip((3, 7), ids, strict=True))
        for category in content["categories"]:
            category["id"] = renumbered[category["id"]]
        for n, annotation in enumerate(content["annotations"]):
            annotation.update(id=n, category_id=renumbered[(3, 7)[n % 2]])

    data = write(tmp_path, change)
    dataset = CocoDataset(data / "val", data / "annotations" / "instances_val.json", masks=False)
    dataset.match_categories(CATEGORIES)
    assert [c["name"] for c in dataset.categories] == ["square", "disc"]
    assert [c["id"] for c in dataset.categories] == list(ids)
    assert any("matched by their names" in note for note in dataset.notes) == (ids[0] > ids[1])
    assert dataset[0][1]["labels"].tolist() == [1, 2, 1, 2]
    truth_as_found(dataset, ["square", "disc"], monkeypatch)
    model = faster_rcnn("resnet10t", 3, **SMALL)
    assert evaluation.evaluate(model, dataset)["box"]["AP"] == 1.0


def test_categories_of_one_name(tmp_path):
    def change(content):
        content["categories"] = [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}, {"id": 9, "name": "b"}]

    data = write(tmp_path, change)
    dataset = CocoDataset(data / "val", data / "annotations" / "instances_val.json")
    dataset.match_categories([{"id": n, "name": name} for n, name in enumerate("aab")])
    with pytest.raises(ValueError, match=r"'a' is the name of several categories, in another order than those of the"):
        dataset.match_categories([{"id": n, "name": name} for n, name in enumerate("aba")])
    with pytest.raises(ValueError, match=r"other categories than the detector: only it has 'a'; only the detector has"):
        dataset.match_categories([{"id": n, "name": name} for n, name in enumerate("abb")])


def test_label_maps_have_no_names(tmp_path):
    dataset = MaskDataset(write_masks(tmp_path, train=1), "train")
    dataset.match_categories([{"id": 5, "name": "nucleus"}])
    assert dataset.categories == [{"id": 1, "name": "nucleus"}]
    with pytest.raises(ValueError, match="has other categories than the detector: only the detector has 'disc'"):
        dataset.match_categories([{"id": 5, "name": "nucleus"}, {"id": 6, "name": "disc"}])


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_objects_without_area_and_segmentation(detectors, tmp_path, capsys, kind):
    """As coco-annotator exports them."""

    def change(content):
        for id_, segmentation in ((98, []), (99, [[]])):
            empty = dict(id=id_, image_id=10, category_id=7, segmentation=segmentation, area=0, bbox=[0, 0, 0, 0])
            content["annotations"].append({**empty, "iscrowd": 0})

    data = write(tmp_path / "data", change)
    for code, out, _ in both(capsys, detectors / kind, ["--data", data, "--format", "coco"], tmp_path):
        assert code == 0
        assert "2 boxes have no area inside their image and are left out of training" in out
        assert "annotation 98 (0.png), 99 (0.png)" in out
    dataset = CocoDataset(data / "val", data / "annotations" / "instances_val.json", masks=kind == "masks")
    assert len(dataset[0][1]["boxes"]) == 4


def test_data_named_by_file_and_folder(detectors, tmp_path, capsys):
    data = write(tmp_path / "data")
    named = ["--annotations", data / "annotations" / "instances_val.json", "--images", data / "val"]
    for code, _, err in both(capsys, detectors / "boxes", named, tmp_path):
        assert code == 0, err
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 2
    code, _, err = run(capsys, "eval", detectors / "boxes")
    assert code == 1 and "name the data: --data and --format, or --annotations" in err
    code, _, err = run(capsys, "predict", detectors / "boxes", "photo.jpg", *named)
    assert code == 1 and "name photos, or --data and --format, or --annotations: one of them" in err


def test_train_on_data_named_by_file_and_folder(tmp_path, capsys):
    for split in ("train", "val"):
        write(tmp_path, split=split)
    files = {split: tmp_path / "annotations" / f"instances_{split}.json" for split in ("train", "val")}
    options = [*TRAIN, "--set", *(f"{k}={v}" for k, v in SMALL.items()), "batch_size=2"]
    named = ["--annotations", files["train"], "--images", tmp_path / "train", "--val-annotations", files["val"]]
    code, out, err = run(capsys, "train", *named, "--out", tmp_path / "run", *options)  # one folder for both
    assert code == 0, err
    assert "2 images, 1 steps an epoch" in out
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 2
    (tmp_path / "val").rename(tmp_path / "held")
    (tmp_path / "train" / "1.png").unlink()
    code, _, err = run(capsys, "train", *named, "--val-images", tmp_path / "held", "--out", tmp_path / "b", *options)
    assert code == 1 and "image 11: 'file_name': " in err and "train/1.png does not exist; 1 of 2 images" in err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": lambda c: c.update(annotations=[])},
            "instances_train.json: the split 'train' has no objects to train",
        ),
        (
            {"train": lambda c: [a.update(iscrowd=1) for a in c["annotations"]]},
            "instances_train.json: the split 'train' has no objects to train on",
        ),
        (
            {"val": lambda c: c["categories"][1].update(name="ring")},
            "instances_val.json has other categories than the training set",
        ),
        ({"val": lambda c: c["categories"].append({"id": 9, "name": "ring"})}, "only it has 'ring'"),
        ({"val": lambda c: c["images"][0].update(width=9)}, "val/0.png has 64 x 64 pixels"),
        ({"val": lambda c: c["annotations"][0].update(iscrowd="no")}, "'iscrowd' is 'no', expected 0 or 1"),
    ],
)
def test_training_does_not_begin_on_sets_that_would_fail(tmp_path, capsys, change, message):
    for split in ("train", "val"):
        write(tmp_path / "data", change.get(split), split)
    data = ["--data", tmp_path / "data", "--format", "coco"]
    code, _, err = run(capsys, "train", *data, *TRAIN, "--out", tmp_path / "run")
    assert code == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_label_maps_without_objects(tmp_path, capsys):
    folder = write_masks(tmp_path / "data", train=1, val=1)  # the last image of each split holds nothing
    code, _, err = run(capsys, "train", "--data", folder, "--format", "masks", *TRAIN, "--out", tmp_path / "run")
    assert code == 1 and "data: the split 'train' has no objects to train on" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "a.json"], "name --val-annotations too, or --no-eval"),
        (["--data", "d", "--format", "coco", "--val-annotations", "a.json"], "--val-annotations needs --annotations"),
        (["--images", "d"], "the images d need a file of annotations too"),
        ([], "name the data: --data and --format, or --annotations"),
        (["--data", "d"], "d does not exist"),
    ],
)
def test_data_that_is_named_by_halves(tmp_path, capsys, arguments, message):
    code, _, err = run(capsys, "train", *arguments, *TRAIN, "--out", tmp_path / "run")
    assert code == 1 and message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log-steps", "0"], "log_steps=0"),
        (["--log-steps", "-1"], "log_steps=-1"),
        (["--workers", "-1"], "workers=-1"),
        (["--checkpoint-minutes", "nan"], "checkpoint_minutes=nan"),
        (["--checkpoint-minutes", "-1"], "checkpoint_minutes=-1.0"),
        (["--eval-epochs", "-1"], "need --eval-epochs >= 0"),
        (["--seed", str(2**70)], f"a --seed of 64 bits, got 0 and {2**70}"),
        (["--minutes", "nan"], "minutes=nan"),
        (["--set", "ema=2"], "0 <= ema < 1, the share that a step keeps of the moving average, got cfg.ema=2"),
        (["--set", "backbone_kwargs={'checkpoint_path': 'FILE'}"], "backbone_kwargs: resnet10t cannot be built"),
        (["--set", "backbone_kwargs={'no_such': 1}"], "backbone_kwargs: resnet10t cannot be built"),
    ],
)
def test_numbers_of_train_that_do_not_fit(tmp_path, capsys, options, message):
    data = write(tmp_path / "data", split="train")
    (tmp_path / "file").write_text("no weights")
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    code, _, err = run(capsys, "train", *TRAIN, "--no-eval", "--data", data, "--out", tmp_path / "out", *options)
    assert code == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "cannot make the folder {}: there is a file of that name"),
        ("file/sub", "cannot make the folder {}: Not a directory"),
    ],
)
def test_outputs_that_are_files(detectors, tmp_path, capsys, out, message):
    data = write(tmp_path / "data", split="train")
    (tmp_path / "file").write_text("kept")
    out = tmp_path / out
    code, _, err = run(capsys, "train", *TRAIN, "--no-eval", "--data", data, "--out", out)
    assert code == 1 and message.format(out) in err
    code, _, err = run(capsys, "predict", detectors / "boxes", data / "train", "--out", out)
    assert code == 1 and message.format(out) in err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("out", "message"), [("", "a folder"), ("no/scores.json", "no such folder"), ("scores.csv", "name the JSON")]
)
def test_where_scores_cannot_be_written(detectors, tmp_path, capsys, monkeypatch, out, message):
    """That is said before they are computed."""
    monkeypatch.setattr(evaluation, "evaluate", None)
    code, _, err = run(capsys, "eval", detectors / "boxes", "--data", tmp_path, "--out", tmp_path / out)
    assert code == 1 and message in err and "--out is" in err


@pytest.mark.parametrize("score", ["nan", "-1", "2"])
def test_scores_that_are_none(detectors, tmp_path, capsys, score):
    code, _, err = run(capsys, "predict", detectors / "boxes", tmp_path, "--score", score, "--out", tmp_path / "out")
    assert code == 1 and "--score is" in err


def test_data_that_is_a_file(detectors, tmp_path, capsys):
    data = write(tmp_path / "data")
    file = data / "annotations" / "instances_val.json"
    for options in (["--data", file], ["--data", file, "--format", "coco"]):
        code, _, err = run(capsys, "eval", detectors / "boxes", *options)
        assert code == 1 and f"{file} is a file, not a folder: --annotations names a JSON" in err
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(data / "val", "val")
    code, _, err = run(capsys, "eval", detectors / "boxes", "--data", tmp_path / "set.tar", "--format", "coco")
    assert code == 1 and "set.tar is a tar: unpack it for --format coco" in err
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run(capsys, "eval", detectors / "boxes", "--data", tmp_path / "pipe")
    assert code == 1 and "pipe: not a regular file" in err
    code, _, err = run(capsys, "eval", detectors / "boxes", "--data", "")
    assert code == 1 and "name the data: --data and --format" in err


def spoil(config, path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("options", "image_std", 2), "text", "image_std is (1.0, 1.0, 'text'), expected numbers up to 65536"),
        (("options", "image_std"), [0.5, 0, 0.5], "image_std is (0.5, 0, 0.5), expected 1 or 3 numbers above 0"),
        (("options", "image_mean"), [0.5, 0.5], "image_mean is (0.5, 0.5), expected 1 or 3 numbers"),
        (("options", "anchor_scales", 0), None, "anchor_scales is (None,), expected numbers up to 65536"),
        (("options", "max_size"), 10**5, "max_size is 100000, expected numbers up to 65536"),
        (("options", "box_features"), 10**400, "box_features is 1000"),
        (("options", "box_features"), 60_000, "model.safetensors does not fit"),  # 90 GB, were it built
        (("num_classes",), 10**6, "expected 999999 objects with id and name"),
        (("num_classes",), 2.5, "num_classes is 2.5, expected a whole number"),
        (("categories",), 3, "categories is 3, expected 2 objects with id and name"),
        (("categories", 0, "name"), None, "expected 2 objects with id and name"),
        (("backbone",), "hf-hub:a/b", "backbone is 'hf-hub:a/b', expected a name in timm"),
        (("options", "backbone_kwargs"), {"checkpoint_path": "/etc/passwd"}, "'checkpoint_path': not an argument"),
    ],
    ids=str,
)
def test_config_files_of_others(detectors, tmp_path, capsys, path, value, message):
    """One line with the file and the key, before anything is loaded, fetched or takes memory."""
    folder = shutil.copytree(detectors / "boxes", tmp_path / "boxes")
    config = json.loads((folder / "config.json").read_text())
    config["options"]["image_std"] = [1.0, 1.0, 1.0]
    spoil(config, path, value)
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "predict", folder, tmp_path, "--out", tmp_path / "out")
    assert code == 1 and f"{folder}/config.json" in err and message in err and err.count("\n") == 1


def test_images_that_would_become_too_large():
    model = faster_rcnn("resnet10t", 2, **{**SMALL, "min_size": 60_000, "max_size": 60_000}).eval()
    with pytest.raises(ValueError, match=r"64 x 64 pixels \(width, height\) would have 3600000000 at min_size=60000"):
        model([torch.zeros(3, 64, 64)])

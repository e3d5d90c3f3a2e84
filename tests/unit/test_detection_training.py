"""Training, evaluation and pictures, from the command: learns, stops and goes on, in two processes, whatever breaks."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from safetensors.torch import load_file
from torchvision.models.detection import maskrcnn_resnet50_fpn

from timm_halonet.cli import main
from timm_halonet.detection import MaskDataset, detect, load_detector, mask_rcnn, rle, save_detector
from timm_halonet.detection.configs import TrainCfg
from timm_halonet.detection.evaluation import evaluate
from timm_halonet.detection.training import Budget, Trainer
from timm_halonet.detection.transforms import training_transform
from timm_halonet.report.summary import read_run

from ..support.detection_samples import coco_content, write_coco, write_masks

# a small detector for small discs; what a user would write behind --set
SMALL = ["scale=1.0", "crop=64", "jitter=(1.0,1.0)", "color=0.0", "fpn_channels=32", "warmup_steps=5", "lr=2e-3"]
HEADS = ["box_features=64", "mask_layers=(32,)", "box_batch_size_per_image=32", "rpn_post_nms_top_n_train=100"]
QUIET = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_arguments(data, out, *more, format="masks", set=()):
    options = ["--set", *SMALL, *HEADS, *set]
    data = ["--data", str(data), "--format", format, "--preset", "small_objects", "--out", str(out)]
    return ["detect", "train", *data, *QUIET, *options, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 steps on eight images, evaluated on four others."""
    root = tmp_path_factory.mktemp("detect")
    data, out = write_masks(root / "data", train=8, val=4), root / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(train_arguments(data, out, "--epochs", "20", "--eval-epochs", "10", set=["ema=0.9"])) == 0
    torch.set_num_threads(threads)
    return data, out


def rows_of(out: Path):
    with open(out / "summary.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.integration
def test_learns(trained, capsys):
    _, out = trained
    result = json.loads((out / "evaluation.json").read_text())
    assert result["mask"]["AP50"] > 0.5 and result["box"]["AP50"] > 0.5
    assert (result["images"], result["max_dets"]) == (4, 500)
    rows = rows_of(out)
    assert [int(row["epoch"]) for row in rows] == list(range(20))
    assert [int(row["step"]) for row in rows] == list(range(2, 41, 2))
    assert float(rows[-1]["train_loss"]) < 0.4 * float(rows[0]["train_loss"])
    assert float(rows[-1]["lr"]) < 0.02 * max(float(row["lr"]) for row in rows)
    assert rows[8]["mask_AP50"] == "" and float(rows[19]["mask_AP50"]) == result["mask"]["AP50"]
    training = json.loads((out / "config.json").read_text())["training"]
    assert training["steps"] == 40 and training["seconds_per_step"] > 0 and training["peak_memory_mb"] > 100
    assert read_run(out).curves["train_loss"][0] == float(rows[0]["train_loss"])  # `timm-halonet plot` draws it
    capsys.readouterr()
    assert main(["detect", "compare", str(out)]) == 0
    assert f"| run | `halonet_h0` | random | 0 | 40 | {100 * result['mask']['AP']:.1f} |" in capsys.readouterr().out


def test_eval_repeats_what_training_found(trained, tmp_path, capsys):
    data, out = trained
    assert (
        main(["detect", "eval", str(out), "--data", str(data), "--format", "masks", "--out", f"{tmp_path}/e.json"]) == 0
    )
    again, before = (json.loads(p.read_text()) for p in (tmp_path / "e.json", out / "evaluation.json"))
    assert again["box"] == before["box"] and again["mask"] == before["mask"]
    with open(tmp_path / "e.csv", newline="") as f:
        [row] = csv.DictReader(f)
    assert float(row["mask_AP50"]) == before["mask"]["AP50"]
    assert f"{100 * before['mask']['AP50']:8.1f}" in capsys.readouterr().out


def test_predict_draws_and_writes(trained, tmp_path, capsys):
    data, out = trained
    photos = [str(data / "images" / f"val{n}.png") for n in range(2)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    code = main(["detect", "predict", str(out), *photos, str(tmp_path / "broken.png"), "--out", str(tmp_path / "p")])
    assert code == 1 and "broken.png: not an image" in capsys.readouterr().err
    found = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in found] == ["val0.png", "val1.png"]
    detection = found[0]["detections"][0]
    assert detection["category_id"] == 1 and detection["score"] >= 0.5
    mask = rle.decode(detection["segmentation"], 64, 64)
    rows, columns = np.nonzero(mask)
    x, y, w, h = detection["bbox"]
    assert x - 2 <= columns.min() and columns.max() <= x + w + 2 and y - 2 <= rows.min() and rows.max() <= y + h + 2
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["0001_val0.png", "0002_val1.png", "predictions.json", "sheet.png"]
    photo, drawn = Image.open(photos[0]).convert("RGB"), Image.open(tmp_path / "p" / "0001_val0.png")
    changed = np.any(np.array(photo) != np.array(drawn), axis=-1)
    assert changed[mask.astype(bool)].mean() > 0.9 and changed.mean() < 0.9
    data_arguments = ["--data", str(data), "--format", "masks", "--count", "3", "--out", str(tmp_path / "q")]
    assert main(["detect", "predict", str(out), *data_arguments]) == 0
    assert len(json.loads((tmp_path / "q" / "predictions.json").read_text())) == 3


def test_loaded_detector_equals_the_saved_one(trained, tmp_path):
    data, out = trained
    model, config = load_detector(out)
    assert not model.training and config["backbone"] == "halonet_h0" and config["detector"] == "mask_rcnn"
    assert config["categories"] == [{"id": 1, "name": "object"}]
    save_detector(tmp_path / "again", model, config["categories"])
    other, _ = load_detector(tmp_path / "again")
    image = MaskDataset(data, "val").image(0).float() / 255
    [a], [b] = detect(model, [image]), detect(other, [image])
    assert len(a["boxes"]) and torch.equal(a["boxes"], b["boxes"]) and a["rles"] == b["rles"]


def test_detect_equals_the_models_own_forward(trained):
    """Without the masks in the image's size, the same masks."""
    data, out = trained
    model, _ = load_detector(out)
    dataset = MaskDataset(data, "val")
    images = [dataset.image(n).float() / 255 for n in range(4)]
    images[1] = images[1][:, :50]
    with torch.inference_mode():
        expected = model(images)
    for entry, found, image in zip(expected, detect(model, images), images, strict=True):
        assert torch.equal(entry["boxes"], found["boxes"]) and torch.equal(entry["scores"], found["scores"])
        masks = [rle.decode(r, *image.shape[1:]) for r in found["rles"]]
        assert np.array_equal(np.array(masks).reshape(-1, *image.shape[1:]), (entry["masks"][:, 0] > 0.5).numpy())
    with pytest.raises(ValueError, match="training mode"):
        detect(model.train(), images)


def make_trainer(data, out, epochs=2, seed=3, model_seed=0, **kwargs):
    torch.manual_seed(model_seed)
    options = dict(scale=1.0, fpn_channels=32, box_features=64, mask_layers=(32,), box_batch_size_per_image=32)
    model = mask_rcnn("halonet_h0", 2, preset="small_objects", backbone_kwargs={"drop_path_rate": 0.1}, **options)
    cfg = TrainCfg(crop=64, jitter=(0.8, 1.2), flips="hv", color=0.2, batch_size=2, lr=1e-3, warmup_steps=2, ema=0.9)
    dataset = MaskDataset(data, "train", training_transform(cfg))
    out.mkdir(exist_ok=True)
    return Trainer(model, dataset, cfg, out, Budget(epochs=epochs), seed=seed, **{"log": lambda line: None, **kwargs})


@pytest.mark.integration
def test_stopped_and_resumed_run_takes_the_same_steps(tmp_path):
    """SIGTERM in the middle of an epoch, then another process' worth of state: weights equal to the bit."""
    data = write_masks(tmp_path / "data", train=6)
    straight = make_trainer(data, tmp_path / "straight")
    straight.run()
    part = make_trainer(data, tmp_path / "part", log=lambda line: signal.raise_signal(signal.SIGTERM), log_steps=2)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert (part.progress.step, part.progress.batch) == (1, 1)  # the first step is logged
    again = make_trainer(data, tmp_path / "part", model_seed=1)  # whatever it starts from
    assert again.resume()
    again.run()
    assert again.progress.step == straight.progress.step == 6
    for expected, found in ((straight.model, again.model), (straight.trained, again.trained)):
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
    losses = [[float(row["train_loss"]) for row in rows_of(tmp_path / run)] for run in ("straight", "part")]
    assert losses[0] == losses[1]
    other = make_trainer(data, tmp_path / "part", seed=4)
    with pytest.raises(ValueError, match=r"checkpoint.pt is of another run: seed is 3 there, 4 here"):
        other.resume()


def command(*arguments):
    return [sys.executable, "-W", "ignore", "-m", "timm_halonet.cli", *arguments]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


@pytest.mark.integration
def test_killed_run_resumes(tmp_path):
    data = write_masks(tmp_path / "data", train=4, val=2)
    arguments = train_arguments(data, tmp_path / "run", "--epochs", "3", "--no-eval")
    arguments += ["--log-steps", "1", "--checkpoint-minutes", "0"]
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1"):  # so a checkpoint of epoch 0 is there
            process.kill()
    process.wait()
    assert {path.name for path in (tmp_path / "run").glob("[!.]*")} == {"summary.csv", "checkpoint.pt"}
    with pytest.raises(SystemExit):
        main([*arguments, "--epochs", "none"])
    assert main(arguments) == 1  # without --resume nothing is overwritten
    assert main([*arguments, "--resume"]) == 0
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == [1, 2, 3]
    assert load_detector(tmp_path / "run")[1]["training"]["steps"] == 3


@pytest.mark.integration
def test_two_processes(tmp_path):
    """torchrun: each has half of the data; the scores are those of all images."""
    data = write_masks(tmp_path / "data", train=5, val=3)
    arguments = train_arguments(data, tmp_path / "run", "--epochs", "1", set=["batch_size=2"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", "timm_halonet.cli"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, *arguments], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("5 images, 2 steps an epoch") == 1  # ceil(ceil(5 / 2) / 2), said once
    model, config = load_detector(tmp_path / "run")
    assert (config["training"]["processes"], config["training"]["steps"]) == (2, 2)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    alone = evaluate(model, MaskDataset(data, "val"))
    assert result["images"] == 3 and result["detections"] == alone["detections"] > 0
    assert result["box"] == alone["box"]


@pytest.mark.integration
def test_minutes_are_kept(tmp_path):
    data = write_masks(tmp_path / "data", train=4)
    trainer = make_trainer(data, tmp_path / "run")
    trainer.budget = Budget(epochs=1000, minutes=0.05)
    trainer.run()
    assert 0 < trainer.progress.seconds <= 3.0 + 1.0  # a first step may take longer than is left
    assert 0 < trainer.progress.step < 2000
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-3


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_boxes_of_two_classes_from_coco(tmp_path, detector, capsys):
    for split, seed in (("train", 0), ("val", 1)):
        content, pictures = coco_content(4, seed)
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        content["annotations"][0]["bbox"][0] = -3
        write_coco(tmp_path / "data", content, pictures, split)
    heads = HEADS if detector == "faster_rcnn" else []
    heads = [option for option in heads if not option.startswith("mask")]
    data = ["--data", str(tmp_path / "data"), "--format", "coco", "--preset", "small_objects"]
    options = ["--amp", "bfloat16", "--epochs", "2", "--set", *SMALL, *heads]
    out = tmp_path / "run"
    assert main(["detect", "train", *data, *QUIET, "--detector", detector, "--out", str(out), *options]) == 0
    assert "1 boxes reach out of their image and were clipped to it: annotation 1 (0.png)" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert set(result) == {"box", "images", "detections", "max_dets", "seconds_per_image", "machine"}
    _, config = load_detector(out)
    assert [c["name"] for c in config["categories"]] == ["square", "disc"]
    assert (
        main(["detect", "predict", str(out), str(tmp_path / "data" / "val"), "--out", f"{tmp_path}/p", "--score", "0"])
        == 0
    )


@pytest.mark.integration
def test_broken_image_stops_with_its_name_and_keeps_the_run(tmp_path):
    data = write_masks(tmp_path / "data", train=4)
    trainer = make_trainer(data, tmp_path / "run")
    path = data / "images" / "train2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"^.*images/train2.png: not an image that Pillow can read"):
        trainer.run()
    done = trainer.progress.step
    path.write_bytes(whole)
    again = make_trainer(data, tmp_path / "run")
    assert again.resume() and again.progress.step == done
    again.run()
    assert again.progress.step == 4


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(write_masks(tmp_path / "data", train=2), tmp_path / "run")
    with torch.no_grad():
        trainer.model.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)
    with pytest.raises(
        RuntimeError,
        match=r"the loss or its gradient is not finite at step 0 \(images of ids [12], [12]\).*loss_classifier",
    ):
        trainer.run()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--set", "depth=9"], "expected NAME=VALUE, got 'depth=9'; the names are out_indices"),
        (["--set", "lr=fast"], "lr is 'fast', expected float"),
        (["--set", "norm='sync'"], "norm 'sync' needs GPUs"),
        (["--set", "batch_size=0"], "batch_size=0"),
        (["--model", "halonet_h99"], "unknown backbone 'halonet_h99'"),
        (["--minutes", "-1"], "minutes=-1.0"),
        (["--train-split", "test"], "has no split 'test'; it has train, val"),
        (["--format", "coco"], "has no split 'train' in COCO's format"),
        (["--device", "abacus"], "'abacus' cannot be used"),
    ],
)
def test_wrong_commands(tmp_path, capsys, more, message):
    data = write_masks(tmp_path / "data", train=2, val=1)
    assert main(train_arguments(data, tmp_path / "run", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_broken_runs_are_refused(trained, tmp_path, capsys):
    data, out = trained
    for name in ("config.json", "model.safetensors", "checkpoint.pt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    cases = [
        ("model.safetensors", lambda b: b[:-100], "cannot read the weights"),
        ("config.json", lambda b: b.replace(b'"fpn_channels": 32', b'"fpn_channels": 16'), "does not fit"),
        ("config.json", lambda b: b.replace(b"mask_rcnn", b"mask_cnn"), "unknown detector 'mask_cnn'"),
        ("config.json", lambda b: b[:50], "cannot be read"),
    ]
    for name, spoil, message in cases:
        whole = (out / name).read_bytes()
        (tmp_path / name).write_bytes(spoil(whole))
        with pytest.raises(ValueError, match=message):
            load_detector(tmp_path)
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(ValueError, match="does not exist; a trained detector is a folder"):
        load_detector(tmp_path / "nowhere")
    (tmp_path / "checkpoint.pt").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"checkpoint.pt is not a readable checkpoint"):
        make_trainer(data, tmp_path).resume()
    assert main(["detect", "predict", str(out)]) == 1
    assert "name photos, or --data and --format" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"not made by timm_halonet\.detection"):
        save_detector(tmp_path, maskrcnn_resnet50_fpn(weights=None, weights_backbone=None), [])


def test_data_of_other_classes_is_refused(trained, tmp_path):
    content, pictures = coco_content(2, 0)
    write_coco(tmp_path, content, pictures, "val")
    arguments = ["--data", str(tmp_path), "--format", "coco", "--out", str(tmp_path / "e.json")]
    assert main(["detect", "eval", str(trained[1]), *arguments]) == 1


def test_saved_weights_are_the_averaged_ones(trained):
    """model.safetensors holds the moving average, the checkpoint both."""
    _, out = trained
    saved = load_file(out / "model.safetensors")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(saved[name], state["ema"][name]) and not torch.equal(saved[name], state["model"][name])

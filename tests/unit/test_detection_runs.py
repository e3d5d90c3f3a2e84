"""Runs that end early and go on: checkpoints that are broken, signals, images that cannot be trained on."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchvision")

from timm_halonet.detection import checkpoint as checkpoints
from timm_halonet.detection import signals
from timm_halonet.detection.checkpoint import load_checkpoint, save_checkpoint
from timm_halonet.detection.configs import TrainCfg
from timm_halonet.detection.shared import counter
from timm_halonet.detection.training import NotFiniteError
from timm_halonet.files import _open_locked

from ..support.detection_samples import coco_content, write_coco
from ..support.detection_tiny import tiny_trainer

STATE = {
    "identity": {"seed": 0},
    "model": {"w": torch.arange(5000.0)},
    "ema": None,
    "optimizer": {"state": {}},
    "progress": {"step": 3},
}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    return path


def test_checkpoint_comes_back(checkpoint):
    for state in (load_checkpoint(checkpoint), torch.load(checkpoint, weights_only=True)):
        assert state.keys() == STATE.keys() and state["progress"] == {"step": 3} and state["ema"] is None
        assert torch.equal(state["model"]["w"], STATE["model"]["w"])


def test_every_flipped_byte_is_found(checkpoint):
    whole = checkpoint.read_bytes()
    places = [0, 5, 40, *range(100, len(whole), 997), *range(len(whole) - 110, len(whole), 7), len(whole) - 1]
    for place in places:
        for bits in (0x01, 0x80):
            spoilt = bytearray(whole)
            spoilt[place] ^= bits
            checkpoint.write_bytes(spoilt)
            with pytest.raises(ValueError, match=r"^[^\n]*checkpoint.pt [^\n]+$"):
                load_checkpoint(checkpoint)
    checkpoint.write_bytes(whole)
    load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty .0 bytes."),
        (b"x" * 1000, "is not a readable checkpoint: its 1000 bytes"),
        (b"<!doctype html><html>404</html>", "is not a readable checkpoint: its 31 bytes"),
        (lambda whole: whole[:-1], "checkpoint.pt "),
        (lambda whole: whole[: len(whole) // 2], "is not a readable checkpoint"),
        (lambda whole: whole + b"\0", "checkpoint.pt "),
    ],
)
def test_files_that_are_no_checkpoint(checkpoint, content, message):
    checkpoint.write_bytes(content(checkpoint.read_bytes()) if callable(content) else content)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(checkpoint)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "holds a list, not the state of a run"),
        ({"w": torch.zeros(2)}, "has no 'identity', 'model', 'ema', 'optimizer', 'progress' and unknown 'w'"),
        ({k: v for k, v in STATE.items() if k != "ema"}, "has no 'ema':"),
        ({**STATE, "more": 1}, "has unknown 'more':"),
        ({**STATE, "progress": [3]}, "progress is a list"),
        ({**STATE, "model": None}, "model is a NoneType"),
        (STATE, "has no hash at its end"),
    ],
)
def test_states_of_other_programs(tmp_path, state, message):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"^{path}.* ?{message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["progress"].pop("epoch"), "progress has no 'epoch'"),
        (lambda s: s["progress"].update(pace=3), "progress has unknown 'pace'"),
        (lambda s: s["identity"].pop("lr"), "identity has no 'lr'"),
        (lambda s: s["identity"].update(lr=7.0), "of another run: lr is 7.0 there, 0.1 here"),
        (lambda s: s["model"].pop("layer.bias"), "does not fit this run: .*layer.bias"),
        (lambda s: s["model"].update({"layer.bias": torch.zeros(4)}), "does not fit this run: .*layer.bias"),
        (lambda s: s["optimizer"].pop("param_groups"), "does not fit this run"),
        (lambda s: s["optimizer"]["param_groups"].pop(), "does not fit this run"),
    ],
)
def test_states_that_do_not_fit_the_run(tmp_path, spoil, message):
    tiny_trainer(tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(path)
    spoil(state)
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        tiny_trainer(tmp_path).resume()


def test_killed_between_writing_and_sealing(tmp_path, checkpoint, monkeypatch):
    """There is one file: the old one, with its hash, until the new one has its own."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_hash", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint, {**STATE, "progress": {"step": 4}})
    monkeypatch.undo()
    assert load_checkpoint(checkpoint)["progress"] == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_next_start_removes_what_a_killed_run_was_writing(tmp_path):
    for name in ("checkpoint.pt", "summary.csv"):
        handle, _ = _open_locked(tmp_path / name)
        os.close(handle)
    assert len(list(tmp_path.iterdir())) == 2
    tiny_trainer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resume_of_a_finished_run_keeps_what_was_measured(tmp_path):
    first = tiny_trainer(tmp_path)
    first.run()
    assert len(first.progress.step_seconds) == 4 and first.progress.peak_memory_mb > 10
    again = tiny_trainer(tmp_path)
    assert again.resume()
    again.run()
    assert asdict(again.progress) == asdict(first.progress)


ERRORS = [
    ValueError("images/2.png: not an image that Pillow can read"),
    ValueError("no letters"),
    NotImplementedError("Unknown pixel format"),
    struct.error("unpack requires 4 bytes"),
    RuntimeError("Failed to decode\nframe 0"),
    MemoryError(),
    KeyError("segmentation"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_photo_that_cannot_be_read_ends_the_run_with_its_name_and_a_checkpoint(tmp_path, error):
    trainer = tiny_trainer(tmp_path, broken={2: error}, cfg=TrainCfg(lr=0.1, batch_size=1))
    with pytest.raises(ValueError, match=r"^[^\n]*2\.png[^\n]*$"):
        trainer.run()
    done = load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"]
    again = tiny_trainer(tmp_path, cfg=TrainCfg(lr=0.1, batch_size=1))  # it was mended
    assert again.resume() and again.progress.step == done < 4
    again.run()
    straight = tiny_trainer(tmp_path, cfg=TrainCfg(lr=0.1, batch_size=1))
    straight.run()
    assert torch.equal(again.model.layer.weight, straight.model.layer.weight)


@pytest.mark.integration
def test_photo_that_a_worker_cannot_read(tmp_path):
    trainer = tiny_trainer(tmp_path, broken={2: NotImplementedError("Unknown pixel format")}, workers=1)
    with pytest.raises(ValueError, match=r"^2.png: NotImplementedError: Unknown pixel format$"):
        trainer.run()
    assert (tmp_path / "checkpoint.pt").exists()


def test_image_that_the_model_refuses(tmp_path):
    trainer = tiny_trainer(tmp_path, cfg=TrainCfg(lr=0.1, batch_size=1))

    def refuse(module, inputs):
        if inputs[1][0]["image_id"] == 3:
            raise AssertionError("All bounding boxes should have positive height and width.\nMore")

    trainer.model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match=r"^step [0-3] failed, images 2\.png: All bounding boxes [^\n]*width\.$"):
        trainer.run()
    assert (tmp_path / "checkpoint.pt").exists()


def test_full_disk_at_the_checkpoint_after_an_error(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, broken={0: ValueError("0.png: broken")})

    def full(*_):
        raise OSError("cannot write checkpoint.pt: No space left on device")

    monkeypatch.setattr("timm_halonet.detection.training.save_checkpoint", full)
    with pytest.raises(OSError, match=r"^cannot write checkpoint.pt: No space left on device; after: 0.png: broken$"):
        trainer.run()


def elsewhere(trainer, out):
    """As if the model were on a device that computes on its own; its losses are read when they are needed."""
    trainer.device = SimpleNamespace(type="xla")
    reads = []
    read = trainer._read_losses

    def counted():
        reads.append(len(trainer._pending))
        read()

    trainer._read_losses = counted
    trainer._forward = lambda model, batch: model.train()(batch.images, batch.targets)
    return reads


def test_losses_are_read_when_they_are_logged(tmp_path):
    (tmp_path / "a").mkdir()
    here, there = tiny_trainer(tmp_path, images=24, log_steps=5), tiny_trainer(tmp_path / "a", images=24, log_steps=5)
    reads = elsewhere(there, tmp_path / "a")
    here.run()
    there.run()
    # steps 1, 5, 10, the epoch's end at 12, 15, 20, the end at 24; and where nothing is left
    assert [n for n in reads if n] == [1, 4, 5, 2, 3, 5, 4]
    for a, b in zip(here.progress.rows, there.progress.rows, strict=True):
        assert (a["train_loss"], a["loss_a"]) == (b["train_loss"], b["loss_a"])


def test_loss_that_is_not_finite_is_found_late_but_never_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, images=24, log_steps=10, checkpoint_minutes=0, epochs=1)
    elsewhere(trainer, tmp_path)

    def spoil(optimizer, *_):
        if trainer.progress.step == 3:
            with torch.no_grad():
                trainer.model.layer.bias.fill_(math.nan)

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(NotFiniteError, match=r"not finite at step 4 \(images of ids \d+, \d+\): {'loss_a': nan"):
        trainer.run()
    # a checkpoint after every step: the last is of the step before
    assert load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] == 4


def test_signal_once_twice_and_its_echo(monkeypatch):
    class AtOnce(Exception):
        pass

    def at_once(*_):
        raise AtOnce

    before = signal.signal(signal.SIGTERM, at_once)
    try:
        stop = signals.StopRequest()
        with stop.watch():
            stop.check()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # `timeout` sends it to its child twice
            assert stop.requested
            with pytest.raises(signals.Stopped):
                stop.check()
            monkeypatch.setattr(signals, "ECHO_SECONDS", -1.0)
            with pytest.raises(AtOnce):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is at_once
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stopped_in_an_evaluation(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=3)

    def evaluate(epochs_done):
        signal.raise_signal(signal.SIGTERM)
        counter(0, trainer.stop.check)(1, 10)
        raise AssertionError("was not stopped")

    with pytest.raises(KeyboardInterrupt):
        trainer.run(evaluate)
    progress = load_checkpoint(tmp_path / "checkpoint.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)


def test_timing_leaves_no_trace(tmp_path):
    trainer = tiny_trainer(tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    random = torch.get_rng_state()
    assert 0 < trainer.time_steps() < 60
    assert torch.equal(torch.get_rng_state(), random) and trainer.progress.step == 0
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert math.isnan(tiny_trainer(tmp_path, broken={0: ValueError("0.png")}).time_steps())
    trainer.model.layer = torch.nn.Linear(4, 3)  # does not fit
    assert math.isnan(trainer.time_steps())


def test_progress_of_an_evaluation_in_a_log(capsys, monkeypatch):
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    show = counter(0)
    for done in range(1, 8):
        show(done, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"evaluated {n} of 7 images, {12 * n} s" for n in (3, 6, 7)]
    show = counter(1)
    show(7, 7)
    assert capsys.readouterr().err == ""


SMALL = ["min_size=64", "max_size=96", "rpn_post_nms_top_n_train=20", "box_features=16", "fpn_channels=16"]


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_group(tmp_path, processes):
    """As `timeout`, SLURM and `docker stop` send it: to the data workers and torchrun's agent too."""
    content, pictures = coco_content(6, 0)
    write_coco(tmp_path / "data", content, pictures, "train")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, "-W", "ignore", *launch, "-m", "timm_halonet.cli", "detect", "train", "--no-eval"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--model", "resnet10t"]
    command += ["--detector", "faster_rcnn", "--epochs", "500", "--workers", "2", "--log-steps", "1", "--set", *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    for line in process.stdout:
        if "step 5 " in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130 or processes > 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["progress"]["step"] >= 5
    assert not list((tmp_path / "run").glob(".*"))


def test_last_epoch_is_evaluated_once(tmp_path, monkeypatch):
    from timm_halonet.cli import main
    from timm_halonet.detection import train_command

    for split in ("train", "valid"):
        content, pictures = coco_content(2, 0)
        write_coco(tmp_path / "data", content, pictures, split)
    calls = []
    evaluate = train_command.evaluate

    def counted(*args, **kwargs):
        calls.append(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train_command, "evaluate", counted)
    arguments = ["detect", "train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--workers", "0"]
    arguments += ["--detector", "faster_rcnn", "--model", "resnet10t", "--device", "cpu", "--eval-epochs", "1"]
    assert main([*arguments, "--epochs", "2", "--set", *SMALL]) == 0
    assert len(calls) == 2
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["images"] == 2
    assert main([*arguments, "--epochs", "2", "--set", *SMALL, "--resume"]) == 0
    assert len(calls) == 3
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["box"] == scores["box"]


def test_resume_with_another_data_set(tmp_path):
    """As many images, other names."""
    trainer = tiny_trainer(tmp_path, epochs=1)
    trainer.run()
    other = tiny_trainer(tmp_path, epochs=2)
    other.dataset.names[0] = "other.png"
    with pytest.raises(ValueError, match="is of a run on another data set"):
        other.resume()
    moved = tiny_trainer(tmp_path, epochs=2)
    moved.dataset.names = [f"elsewhere/{name}" for name in moved.dataset.names]
    assert moved.resume()

"""docs/examples/compare_families.py: its plan, its clock, its table. Its train.py here is a stand-in."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import yaml

from timm_halonet.report.plots import draw_runs

from ..unit.test_recipes import unaccepted

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "compare_families.py"

TRAIN = """
import csv, json, os, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output"]) / options["--experiment"]
folder.mkdir()
(folder / "argv").write_text("\\n".join(sys.argv[1:]))
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
(folder / "cores").write_text(json.dumps([cores, os.environ["OMP_NUM_THREADS"]]))
if options["--model"] == "resnet26t":
    sys.exit("no memory left")
timing = "timing" in options["--experiment"]
for kind in ("Train: 0", "Test:", "Test (EMA):"):
    time.sleep(0.3 * (timing or kind == "Train: 0"))  # what each start takes
    for step in range(3 * timing):
        print(f"{kind} [   {step}/3 ( 33%)]  Time: 1.0", flush=True)
        time.sleep(0.05)
with (folder / "summary.csv").open("w") as f:
    f.write("epoch,train_loss,eval_top1\\n")
    for epoch in range(int(options["--epochs"])):
        time.sleep(0 if timing else SLEEP)
        f.write(f"{epoch},1.0,{50 + epoch}\\n")
        f.flush()
"""


@pytest.fixture
def compare():
    spec = importlib.util.spec_from_file_location("compare_families", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(compare, tmp_path):
    """The command, with a train.py whose epochs take so many seconds."""

    def run(*models, sleep=0.0, minutes=4 / 60, more=()):
        (tmp_path / "train.py").write_text(TRAIN.replace("SLEEP", str(sleep)))
        for split, label, count in (("train", "a", 9), ("train", "b", 2), ("val", "a", 4), ("val", "b", 1)):
            (tmp_path / "data" / split / label).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                (tmp_path / "data" / split / label / f"{n}.png").write_bytes(b"")
        arguments = ["--train", tmp_path / "train.py", "--data-dir", tmp_path / "data", "--out", tmp_path / "out"]
        arguments += ["--minutes", minutes, *more, "--models", *models]
        return compare.main([str(argument) for argument in arguments])

    return run


def state(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())["models"]


def test_recipe_has_options_of_train_py(compare):
    recipe = yaml.safe_load(compare.RECIPE.read_text())
    assert unaccepted(recipe) == []
    assert compare.recipe_size(compare.RECIPE) == recipe["img_size"]
    assert not {"model", "epochs", "device", "output", "experiment"} & set(recipe)  # what the script says


def test_baselines_have_the_recipe_of_the_weights(compare):
    ours = yaml.safe_load(compare.RECIPE.with_name("baselines.yaml").read_text())
    folder = SCRIPT.parent.parent.parent / "hub_configs" / "halonet_h3.imagenette_r128"
    theirs = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert unaccepted(ours) == []
    same = {key for key in ours if ours[key] == theirs.get(key)}
    assert set(theirs) - same == {"model", "epochs", "amp", "amp_dtype", "img_size", "mixup_off_epoch"}
    assert set(ours) - same == {"img_size", "model_ema_warmup", "workers", "log_interval", "checkpoint_hist"}


def test_epochs_fill_the_time(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- accuracy -->\n<!-- /accuracy -->\nafter\n")
    more = ["--markdown", page, "--plot", tmp_path / "a.png", "--img-size", 64]
    assert run("eamlp_7", "swin_tiny_patch4_window7_224", more=more) == 0
    results = state(tmp_path)
    for result in results.values():
        assert result["start_seconds"] >= 0.3 and result["planned_epoch_seconds"] > 0
        left = 0.95 * 4 - result["start_seconds"]
        assert result["epochs"] == int(left / result["planned_epoch_seconds"]) == result["epochs_done"] >= 1
        assert f"| {(result['seconds'] - result['start_seconds']) / result['epochs']:.0f} |" in page.read_text()
        assert result["finished"] and result["top1"] == 50 + result["epochs"] - 1
    text = page.read_text()
    assert "Measured on: " in text and f"| eamlp_7 | {6_096_206 - 990 * 257:,} |" in text
    assert text.endswith("<!-- /accuracy -->\nafter\n")
    assert (tmp_path / "a.png").stat().st_size > 1000
    argv = (tmp_path / "out" / "swin_tiny_patch4_window7_224" / "argv").read_text().split()
    assert argv[argv.index("--model-kwargs") + 1] == "img_size=64"  # as it is built for one size
    assert "--model-kwargs" not in (tmp_path / "out" / "eamlp_7" / "argv").read_text()
    assert argv[argv.index("--data-dir") + 1] == str(tmp_path / "data")
    part = tmp_path / "out" / "part"
    assert sorted(str(f.relative_to(part)) for f in part.glob("*/*/*")) == [
        *(f"train/a/{n}.png" for n in (0, 4, 8)),
        *("train/b/0.png", "val/a/0.png", "val/b/0.png"),
    ]
    assert all(f.resolve() == tmp_path / "data" / f.relative_to(part) for f in part.glob("*/*/*"))
    timed = (tmp_path / "out" / "eamlp_7.timing" / "argv").read_text().split()
    assert timed[timed.index("--data-dir") + 1] == str(part)
    # what is done is not done again
    capsys.readouterr()
    assert run("eamlp_7", more=["--img-size", 64]) == 0
    assert "timing" not in capsys.readouterr().out
    assert state(tmp_path) == results


def test_an_epoch_is_timed_by_its_steps(compare, tmp_path, monkeypatch):
    """Not by what happens before the first step that is reported: the start, and that of each validation."""
    clock = [100.0]

    class Process:
        returncode = 0
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        @property
        def stdout(self):
            lines = [(0, "Training with a single process"), (9, "Train: 0 [   0/37 (  3%)]  Loss: 2"), (36, "INFO")]
            lines += [
                (0, "Train: 0 [  36/37 (100%)]  Loss: 2"),
                (7, "Test: [   0/15]  Time"),
                (3, "Test: [  15/15]  T"),
            ]
            lines += [(8, "Test (EMA): [   0/15]  Time"), (6, "Test (EMA): [  15/15]  Time"), (5, "*** Best metric")]
            for seconds, line in lines:
                clock[0] += seconds
                yield f"{line}\n"

    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(compare, "start", lambda *args, **kwargs: Process())
    before, epoch = compare.time_epoch([], tmp_path / "log", [0])
    assert before == 9 and epoch == pytest.approx(36 / 36 * 37 + 3 / 15 * 16 + 6 / 15 * 16)
    assert (tmp_path / "log").read_text().endswith("*** Best metric\n")
    Process.stdout = ()
    with pytest.raises(RuntimeError, match="no line of a training step"):
        compare.time_epoch([], tmp_path / "log", [0])


def test_epochs_are_planned_from_a_part_of_the_photos(compare, run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "time_epoch", lambda *_: (0.5, 0.6))  # seconds of the start, and with 6 of 16 photos
    assert run("eamlp_7") == 0
    result = state(tmp_path)["eamlp_7"]
    assert result["planned_epoch_seconds"] == pytest.approx(0.6 * 16 / 6) and result["epochs"] == 2  # 3.3 s for 1.6 s


def test_the_clock_stops_a_run_that_takes_longer_than_planned(run, tmp_path, capsys):
    assert run("eamlp_7", sleep=2.2) == 0
    result = state(tmp_path)["eamlp_7"]
    assert not result["finished"] and 1 <= result["epochs_done"] < result["epochs"]
    assert f"| {result['epochs_done']} of {result['epochs']}, stopped |" in capsys.readouterr().out


def test_what_goes_wrong_is_in_the_table_and_the_others_go_on(run, tmp_path, capsys):
    assert run("resnet26t", "halonet_h99", "eamlp_7") == 1
    captured = capsys.readouterr()
    assert "no memory left" in captured.err  # the end of its log
    assert "| halonet_h99 | | | | timm knows no model of this name |" in captured.out
    assert "returned 1" in state(tmp_path)["resnet26t"]["error"] and "top1" in state(tmp_path)["eamlp_7"]
    with pytest.raises(SystemExit, match="another comparison"):
        run("eamlp_7", minutes=1)


def test_curves_go_over_wall_clock_time(compare, run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "draw_runs", lambda runs: drawn.extend(runs) or draw_runs(runs))
    assert run("eamlp_7", "resnet26t", "eamlp_14", more=["--curves", tmp_path / "c.png"]) == 1
    results = state(tmp_path)
    assert [r.name for r in drawn] == ["eamlp_7", "eamlp_14"]  # resnet26t failed
    for curve in drawn:
        row = results[curve.name]
        assert curve.xs[-1] == pytest.approx((row["seconds"] - row["start_seconds"]) / 60)
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize("option", ["--plot", "--curves"])
def test_another_kind_of_picture_is_refused_before_anything_is_trained(run, tmp_path, option):
    with pytest.raises(ValueError, match=r"c\.gif: the suffix is '\.gif', pictures are \.png"):
        run("eamlp_7", more=[option, tmp_path / "c.gif"])
    assert not (tmp_path / "out").exists()


def test_jobs_share_the_cores(compare, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.os, "sched_getaffinity", lambda _: {3, 4, 5, 6, 7}, raising=False)
    assert compare.shares(2) == [[3, 4], [5, 6]] and compare.shares(1) == [[3, 4, 5, 6, 7]]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"--jobs (is )?{wrong}"):
            compare.shares(wrong)
    monkeypatch.undo()
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()) < 2:
        pytest.skip("one core")
    assert run("eamlp_7", "eamlp_14", more=["--jobs", 2]) == 0
    places = [json.loads((tmp_path / "out" / m / "cores").read_text()) for m in ("eamlp_7", "eamlp_14")]
    assert not set(places[0][0]) & set(places[1][0])
    assert all(threads == str(len(cores)) for cores, threads in places)
    assert "2 models at a time" in capsys.readouterr().out


def test_another_recipe(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: resnet26t\nopt: lamb\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml has no img_size"):
        run("eamlp_7", more=["--recipe", recipe])
    recipe.write_text("model: resnet26t\nimg_size: 96\n")
    assert run("eamlp_7", more=["--recipe", recipe]) == 0
    argv = (tmp_path / "out" / "eamlp_7" / "argv").read_text().split()
    assert argv[argv.index("--config") + 1] == str(recipe) and argv[argv.index("--model") + 1] == "eamlp_7"


def test_arguments_of_one_model(run, tmp_path, capsys):
    for wrong in (["eamlp_7", "heads"], ["eamlp_7"], ["resnet26t", "a=1"]):
        with pytest.raises(ValueError, match=f"--model-kwargs {' '.join(wrong)}: expected one of eamlp_7, lesa"):
            run("eamlp_7", "lesa_resnet50", more=["--model-kwargs", *wrong])
    more = ["--img-size", 64, "--model-kwargs", "lesa_resnet50", "rel_pos=height_width", "drop_path_rate=0.1"]
    assert run("eamlp_7", "lesa_resnet50", more=[*more, "--model-kwargs", "eamlp_7", "depth=2"]) == 0
    wanted = {"eamlp_7": ["depth=2"], "lesa_resnet50": ["img_size=64", "rel_pos=height_width", "drop_path_rate=0.1"]}
    for model, kwargs in wanted.items():
        argv = (tmp_path / "out" / model / "argv").read_text().splitlines()
        assert argv[argv.index("--model-kwargs") + 1 :] == kwargs
    printed = capsys.readouterr().out
    assert "| lesa_resnet50 rel_pos=height_width drop_path_rate=0.1 |" in printed
    few = sum(p.numel() for p in timm.create_model("eamlp_7", depth=2, num_classes=10).parameters())
    assert f"| eamlp_7 depth=2 | {few:,} |" in printed  # of the model that was trained


def test_arguments_that_the_model_does_not_have(run, capsys):
    assert run("eamlp_7", more=["--model-kwargs", "eamlp_7", "hight=3"]) == 1
    assert "EAMLP has no argument 'hight'" in capsys.readouterr().err


def test_a_budget_below_one_epoch(run, tmp_path):
    assert run("eamlp_7", minutes=0.1 / 60) == 1
    assert "one epoch takes" in state(tmp_path)["eamlp_7"]["error"]


def test_no_photos(compare, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="train: expected a folder for each class, with photos in it"):
        compare.link_part(tmp_path, tmp_path / "part")

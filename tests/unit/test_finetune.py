"""docs/examples/finetune.py: which runs it makes, and its table. Its train.py here is a stand-in."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from .test_recipes import unaccepted

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "finetune.py"

TRAIN = """
import pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output"]) / options["--experiment"]
if options["--seed"] == "9":
    sys.exit("no disk left")
folder.mkdir()
(folder / "options.txt").write_text(" ".join(sys.argv[1:]))
top1 = int(options["--seed"]) + (80 if "--pretrained" in sys.argv else 60)
(folder / "summary.csv").write_text(f"epoch,train_loss,eval_top1\\n4,1.0,99\\n9,1.0,{top1}\\n")
"""


@pytest.fixture
def run(tmp_path):
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "train.py").write_text(TRAIN)

    def run(*more):
        arguments = ["--train", tmp_path / "train.py", "--data-dir", "data", "--out", tmp_path / "out", *more]
        return module.main([str(argument) for argument in arguments])

    return run


@pytest.mark.parametrize("name", ["finetune_clothing.yaml", "finetune_imagenette.yaml"])
def test_recipe_has_options_of_train_py(name):
    recipe = yaml.safe_load(SCRIPT.with_name(name).read_text())
    assert unaccepted(recipe) == []
    assert recipe["epochs"] % recipe["val_interval"] == 0  # so that the last epoch is measured
    assert not {"model", "seed", "pretrained", "device", "output", "experiment"} & set(recipe)  # what the script says


def test_mean_and_spread_of_the_last_epochs(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- finetune -->\n<!-- /finetune -->\nafter\n")
    assert run("--seeds", 0, 1, 5, "--markdown", page) == 0
    text = page.read_text()
    assert "| halonet_h0 | pretrained | 80.0, 81.0, 85.0 | 82.0 | 2.6 |" in text
    assert "| halonet_h0 | scratch | 60.0, 61.0, 65.0 | 62.0 | 2.6 |" in text
    assert text.endswith("<!-- /finetune -->\nafter\n")
    (tmp_path / "train.py").write_text("raise SystemExit('not again')")  # what is done is not done again
    assert run("--seeds", 0, 1, 5) == 0


def test_a_tag_as_start_is_the_model_of_that_tag(run, tmp_path):
    assert run("--starts", "imagenette_r128", "--seeds", 0) == 0
    options = (tmp_path / "out" / "halonet_h0.imagenette_r128.0" / "options.txt").read_text()
    assert "--model halonet_h0.imagenette_r128 " in options and options.endswith(" --pretrained")


def test_a_share_of_the_photos_by_seed(run, tmp_path):
    for split, count in (("train", 20), ("val", 4)):
        for label in ("cat", "dog"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "photos" / split / label / f"{i}.jpg").write_text(f"{label} {i}")
    run("--data-dir", tmp_path / "photos", "--train-share", 0.2, "--seeds", 0, 1, "--starts", "scratch")
    drawn = []
    for seed in (0, 1):
        options = (tmp_path / "out" / f"halonet_h0.scratch.{seed}" / "options.txt").read_text().split()
        folder = Path(options[options.index("--data-dir") + 1])
        assert sorted(p.read_text() for p in folder.glob("val/*/*.jpg")) == sorted(
            f"{label} {i}" for label in ("cat", "dog") for i in range(4)
        )
        photos = sorted(folder.glob("train/*/*.jpg"))
        assert [p.parent.name for p in photos] == ["cat"] * 4 + ["dog"] * 4
        assert all(p.read_text() == f"{p.parent.name} {p.stem}" for p in photos)
        drawn.append([p.name for p in photos])
    assert drawn[0] != drawn[1]
    with pytest.raises(SystemExit):
        run("--train-share", 0)
    with pytest.raises(ValueError, match="holds no folders of classes"):
        run("--train-share", 0.2, "--seeds", 7)


def test_a_failed_run_says_why(run):
    with pytest.raises(RuntimeError, match=r"(?s)returned 1.*no disk left"):
        run("--seeds", 9)

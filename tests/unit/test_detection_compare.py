"""timm-halonet detect compare: its table, and folders that do not fit."""

import json

import pytest

from timm_halonet.cli import main

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
TRAINING = dict(pretrained=True, seed=3, steps=40, parameters=8_123_456, minutes=1.5, seconds_per_step=0.25)


@pytest.fixture
def run(tmp_path):
    """Writes a run's two files; returns its folder."""

    def write(name, backbone="halonet_h0", masks=True, config=(), training=(), **scores):
        folder = tmp_path / name
        folder.mkdir()
        training = {**TRAINING, "peak_memory_mb": 1200, **dict(training)}
        (folder / "config.json").write_text(json.dumps({"backbone": backbone, "training": training, **dict(config)}))
        box = {metric: n / 100 for n, metric in enumerate(METRICS, 31)}
        mask = {metric: n / 100 for n, metric in enumerate(METRICS, 51)}
        scores = {"box": box, **({"mask": mask} if masks else {}), "images": 133, "max_dets": 500, **scores}
        scores = {"seconds_per_image": 0.9, "machine": "some CPU; 2026-01-01", **scores}
        (folder / "evaluation.json").write_text(json.dumps(scores))
        return str(folder)

    return write


def test_a_row_a_run(run, tmp_path, capsys):
    random = run("b", "seresnet50", training=dict(pretrained=False, seed=0))
    boxes = run("c", masks=False, box={**dict.fromkeys(METRICS, 0.5), "APl": None})  # no large objects
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- detect -->\nold\n<!-- /detect -->\nafter\n")
    assert main(["detect", "compare", run("a"), random, boxes, "--markdown", str(page)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "Measured on: some CPU; 2026-01-01."
    scores = "51.0 | 52.0 | 53.0 | 54.0 | 55.0 | 56.0 | 57.0"
    assert f"| a | `halonet_h0` | pretrained | 3 | 40 | {scores} |" in lines
    assert f"| b | `seresnet50` | random | 0 | 40 | {scores} |" in lines
    assert "| a | 31.0 | 32.0 | 33.0 | 34.0 | 35.0 | 36.0 | 37.0 | 8.1 | 1.5 | 0.25 | 1200 | 0.9 |" in lines
    assert "| c | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | - | 50.0 | 8.1 | 1.5 | 0.25 | 1200 | 0.9 |" in lines
    assert [line.split(" | ")[0] for line in lines if line.startswith("| c")] == ["| c"]  # no row of masks
    text = page.read_text()
    assert text == f"before\n<!-- detect -->\n{printed}<!-- /detect -->\nafter\n"


def test_runs_of_one_name_in_two_folders(run, tmp_path, capsys):
    for parent, steps, limit in (("x", 40, 500), ("y", 50, 100)):
        (tmp_path / parent).mkdir()
        run(f"{parent}/h0", training=dict(steps=steps), max_dets=limit)
    folders = [str(tmp_path / parent / "h0") for parent in "xy"]
    assert main(["detect", "compare", *folders]) == 1
    assert "these have h0 133 and 500, h0 133 and 100" in capsys.readouterr().err
    evaluation = tmp_path / "y" / "h0" / "evaluation.json"
    evaluation.write_text(evaluation.read_text().replace('"max_dets": 100', '"max_dets": 500'))
    assert main(["detect", "compare", *folders]) == 0
    masks = capsys.readouterr().out.split("Boxes")[0].splitlines()
    assert [line.split(" | ")[4] for line in masks if line.startswith("| h0")] == ["40", "50"]


def test_what_does_not_compare(run, tmp_path, capsys):
    good, few = run("good"), run("few", max_dets=100)
    folder = tmp_path / "empty"
    folder.mkdir()
    broken, no_detector = run("broken"), run("other", config={"training": None})
    (tmp_path / "broken" / "evaluation.json").write_text("{")
    (tmp_path / "other" / "config.json").write_text('{"backbone": "halonet_h0"}')
    wanted = {
        few: "these have good 133 and 500, few 133 and 100",
        str(folder): "config.json does not exist; `timm-halonet detect train` writes it",
        broken: "evaluation.json cannot be read",
        no_detector: "config.json has no 'training'",
    }
    for wrong, message in wanted.items():
        assert main(["detect", "compare", good, wrong]) == 1
        assert message in capsys.readouterr().err

"""The synthetic tasks: their data say what they claim, and runs are kept, gone on from and reported."""

import csv
from collections import deque

import numpy as np
import organs
import paths
import pytest
import runs
import torch
from PIL import Image


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- organs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96])
def test_every_image_has_all_organs_apart_from_each_other(size):
    images, classes = organs.make_images(64, size, seeded())
    assert images.shape == (64, 1, size, size) and classes.shape == (64, size, size)
    for image in classes:
        assert image.unique().tolist() == list(range(7))
        assert image[0].max() == image[-1].max() == image[:, 0].max() == image[:, -1].max() == 0  # none cut off
        for y, x in image.nonzero().tolist():
            around = image[y - 1 : y + 2, x - 1 : x + 2]
            assert set(around.unique().tolist()) <= {0, int(image[y, x])}


def test_organs_look_alike_and_their_layout_moves():
    images, classes = organs.make_images(512, 64, seeded())
    means = torch.stack([images[:, 0][classes == n].mean() for n in range(1, 7)])
    spreads = torch.stack([images[:, 0][classes == n].std() for n in range(1, 7)])
    sizes = torch.stack([(classes == n).sum() / len(classes) for n in range(1, 7)])
    assert (means - 1).abs().max() < 0.02 and (spreads - 0.5).abs().max() < 0.02
    assert (sizes / sizes.mean() - 1).abs().max() < 0.05
    centres = torch.stack([(classes == 1).float().mean(d).argmax(1) for d in (1, 2)]).float()
    assert centres.std(1).min() > 5


def test_dice():
    classes = torch.zeros(2, 4, 4, dtype=torch.int64)
    classes[:, 0] = torch.tensor([1, 2, 3, 4])
    classes[:, 1, :2] = torch.tensor([5, 6])
    assert organs.dice(classes, classes).tolist() == [1] * 6
    guess = classes.clone()
    guess[0, 0, 0] = 2  # in one of two images: none of organ 1, one pixel too many of organ 2
    expected = torch.tensor([0.5, (2 / 3 + 1) / 2, 1, 1, 1, 1])
    torch.testing.assert_close(organs.dice(guess, classes), expected)


# ---- paths -------------------------------------------------------------------------------------------------------


def bfs(free, start):
    """Steps from `start` by a queue; a dictionary of the cells that are reached."""
    found, queue = {start: 0}, deque([start])
    while queue:
        y, x = queue.popleft()
        for cell in ((y + dy, x + dx) for dy, dx in paths.STEPS):
            if cell in free and cell not in found:
                found[cell] = found[y, x] + 1
                queue.append(cell)
    return found


def test_best_steps_begin_shortest_paths():
    maps, best, lengths = paths.make_maps(200, 9, seeded())
    assert len(maps) == len(best) == len(lengths) == 200
    assert maps.unique().tolist() == [0, 1, 2, 3] and lengths.min() == 2 and lengths.max() > 10
    for map_, steps, length in zip(maps.tolist(), best.tolist(), lengths.tolist(), strict=True):
        kinds = {(y, x): kind for y, row in enumerate(map_) for x, kind in enumerate(row)}
        (goal,) = [cell for cell, kind in kinds.items() if kind == paths.GOAL]
        found = bfs({cell for cell, kind in kinds.items() if kind in (paths.FREE, paths.GOAL)}, goal)
        assert found[4, 4] == length
        expected = [found.get((4 + dy, 4 + dx), 99) == length - 1 for dy, dx in paths.STEPS]
        assert steps == expected and any(steps)


def test_straight_steps_and_detours():
    rows = ["..#G?", ".....", ".....", ".....", "....."], ["..#..", "G##..", ".#...", ".....", "....."]
    kinds = {"?": 0, ".": 1, "#": 2, "G": 3}
    maps = torch.tensor([[[kinds[c] for c in row] for row in map_] for map_ in rows])
    steps, far = paths.straight(maps)
    assert steps.tolist() == [[True, False, False, True], [False, False, False, False]]
    assert far.tolist() == [3, 3]
    best = torch.tensor([[True, False, False, True], [False, True, False, False]])
    assert paths.Paths().detours(maps, best).tolist() == [False, True]


def test_pooled_baseline_has_as_many_parameters():
    args = runs.parse(paths.Paths(), [])
    sizes = {v: sum(p.numel() for p in paths.Paths().model(v, args).parameters()) for v in paths.Paths.variants}
    assert len({sizes[v] for v in ("row", "axial", "halo", "global")}) == 1
    assert sizes["pooled"] == sizes["max_pooled"] and abs(sizes["pooled"] / sizes["row"] - 1) < 0.001


def test_pooled_baseline_sees_the_goal_but_no_cell_sees_another():
    torch.manual_seed(0)
    model = paths.Paths().model("pooled", runs.parse(paths.Paths(), []))[0].eval()
    maps = paths.make_maps(1, 11, seeded())[0]
    other = maps.clone()
    other[0, 0, 0] = paths.WALL - (maps[0, 0, 0] == paths.WALL).long()
    changed = (model.forward_features(maps) != model.forward_features(other)).any(-1)[0]
    assert changed.sum() == 1 and changed[0, 0]


# ---- runs --------------------------------------------------------------------------------------------------------

SMALL = {
    organs.Organs: ["--size", "32", "--width", "2", "--batch-size", "2", "--test-size", "4"],
    paths.Paths: ["--view", "7", "--dim", "8", "--batch-size", "4", "--test-size", "64"],
}


@pytest.mark.parametrize("kind", [organs.Organs, paths.Paths])
def test_every_variant_learns_and_repeats(kind):
    task = kind()
    args = runs.parse(task, ["--steps", "3", *SMALL[kind]])
    x, y = task.data(4, args, seeded())
    for variant in task.variants:
        torch.manual_seed(0)
        model = task.model(variant, args)
        task.loss(model(x), y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    rows = [runs.train(task, next(iter(task.variants)), 1, args, torch.device("cpu")) for _ in "ab"]
    for row in rows:
        assert float(row.pop("seconds")) >= 0
        assert all(0 <= float(row[score]) <= 100 for score in task.scores)
    assert rows[0] == rows[1]


def test_training_beats_chance_on_paths():
    task = paths.Paths()
    args = runs.parse(task, ["--steps", "60", "--view", "5", "--dim", "16", "--test-size", "500", "--lr", "0.01"])
    trained = runs.train(task, "global", 0, args, torch.device("cpu"))
    _, best = task.data(500, args, seeded(runs.TEST_SEED))
    blind = best.float().mean().item()
    assert float(trained["accuracy"]) > 100 * blind + 15


def _command(tmp_path, *more):
    files = ["--csv", tmp_path / "r.csv", "--png", tmp_path / "r.png", "--markdown", tmp_path / "docs.md"]
    return [str(x) for x in (*SMALL[paths.Paths], "--variants", "row", "pooled", *files, *more)]


def test_finished_runs_are_kept_and_reported(tmp_path, capsys, monkeypatch):
    (tmp_path / "docs.md").write_text("# Tasks\n\n<!-- paths -->\nold\n<!-- /paths -->\n\nend\n")
    trained = []
    train = runs.train

    def counted(task, variant, seed, args, device):
        trained.append((variant, seed))
        return train(task, variant, seed, args, device)

    monkeypatch.setattr(runs, "train", counted)
    assert runs.main(paths.Paths(), _command(tmp_path, "--steps", "2", "--seeds", "0")) == 0
    assert runs.main(paths.Paths(), _command(tmp_path, "--steps", "2", "--seeds", "0", "1")) == 0
    assert trained == [("row", 0), ("pooled", 0), ("row", 1), ("pooled", 1)]
    with open(tmp_path / "r.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["variant"], int(row["seed"])) for row in rows] == trained
    text = (tmp_path / "docs.md").read_text()
    assert text.startswith("# Tasks\n\n<!-- paths -->\nMeasured on") and text.endswith("\n<!-- /paths -->\n\nend\n")
    mean = sum(float(row["accuracy"]) for row in rows if row["variant"] == "row") / 2
    assert f"| row attention | {int(rows[0]['parameters']):,} | {mean:.1f} ±" in text
    assert "old" not in text and "![paths, every run](r.png)" in text and "crow" in text
    assert Image.open(tmp_path / "r.png").width > 500

    # --minutes with runs in the CSV takes their number of steps
    assert runs.main(paths.Paths(), _command(tmp_path, "--minutes", "1")) == 0
    assert trained[4:] == [("row", 2), ("pooled", 2)]
    capsys.readouterr()
    for changed in (["--steps", "3"], ["--steps", "2", "--lr", "1"]):
        assert runs.main(paths.Paths(), _command(tmp_path, *changed)) == 1
        assert "runs with other settings, steps=2 batch_size=4 lr=0.002" in capsys.readouterr().err
    assert len(trained) == 6


def test_spread_of_runs():
    assert runs.mean_and_spread([70.0, 72.0, 71.0]) == "71.0 ± 1.0"
    assert runs.mean_and_spread([70.0]) == "70.0"
    assert runs.mean_and_spread([70.0, float("nan")]) == "-"


def test_minutes_give_all_variants_the_same_steps(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(clock)))
    took = {2: 1.0, 10: 5.0}  # seconds: half a second a step

    def train(task, variant, seed, args, device):
        for _ in range(int(took[args.steps]) - 1):
            next(clock)
        return {}

    monkeypatch.setattr(runs, "train", train)
    args = runs.parse(paths.Paths(), ["--minutes", "10", "--variants", "row", "pooled", "--seeds", "0", "1"])
    # 600 s less 2 variants x 3 x 1 s to start, over 2 seeds x 2 variants x half a second
    assert runs._steps_within(paths.Paths(), args, torch.device("cpu")) == (600 - 6) / 2


def test_wrong_input_is_refused_before_any_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    (tmp_path / "docs.md").write_text("no marks")
    assert runs.main(paths.Paths(), _command(tmp_path, "--steps", "2")) == 1
    assert "has no lines <!-- paths --> and, after it, <!-- /paths -->" in capsys.readouterr().err
    (tmp_path / "docs.md").unlink()
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    assert runs.main(paths.Paths(), _command(tmp_path, "--steps", "2")) == 1
    assert "has the columns ['a', 'b'], expected ['variant'" in capsys.readouterr().err
    assert runs.main(paths.Paths(), ["--csv", str(tmp_path / "none" / "r.csv")]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    monkeypatch.undo()
    for wrong in (["--steps", "0"], ["--variants", "colour"], ["--steps", "2", "--quick"], ["--lr", "-1"]):
        with pytest.raises(SystemExit):
            runs.main(paths.Paths(), wrong)
    capsys.readouterr()
    assert runs.main(paths.Paths(), ["--view", "8", "--steps", "1", "--csv", str(tmp_path / "v.csv")]) == 1
    assert "--view must be odd and >= 5" in capsys.readouterr().err
    assert runs.main(paths.Paths(), ["--png", str(tmp_path / "a.gif")]) == 1
    assert "the suffix is '.gif'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [organs.Organs, paths.Paths])
def test_picture(kind):
    """The example above; below it a circle a run and a line at the mean, a row a variant."""
    task = kind()
    args = runs.parse(task, SMALL[kind])
    score, words = next(iter(task.scores.items()))
    rows = [{"variant": v, score: f"{50 + n}"} for v in args.variants for n in (0, 3)]
    top, bottom = runs.draw(task, args, rows).axes
    np.testing.assert_array_equal(top.images[0].get_array(), np.array(task.example(args)))
    shown = [(line.get_marker(), line.get_xydata().tolist()) for line in bottom.lines]
    assert shown == [
        pair for n in range(len(args.variants)) for pair in (("o", [[50, n], [53, n]]), ("|", [[51.5, n]]))
    ]
    assert [text.get_text() for text in bottom.get_yticklabels()] == list(task.variants.values())
    assert bottom.get_xlabel().startswith(f"{words}, %, on held-out samples")
    low, high = bottom.get_ylim()
    assert low > high  # the first above

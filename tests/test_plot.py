"""timm-halonet plot: what train.py writes to summary.csv, as curves."""

import math
from dataclasses import replace

import pytest
from PIL import Image

from timm_halonet.cli import main
from timm_halonet.hub import hub_configs_dir
from timm_halonet.plotting import COLORS, best, draw, pale, read_run

HEADER = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\r\n" for line in lines), newline="")  # the csv module ends lines like this
    return path


def falling(n, top=80.0, loss=1.0):
    return [f"{e},{loss + 2 / (e + 1)},{loss + 3 / (e + 1)},{top - 50 / (e + 1)},95,0.1" for e in range(n)]


def colors(image, panel=None):
    """The exact colours of the picture, or of the inside of its left (0) or right (1) panel."""
    half = image.width // 2
    part = image if panel is None else image.crop((panel * half + 72, 40, panel * half + half - 20, 338))
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in part.getcolors(1 << 24)}


def test_command(tmp_path, capsys):
    write(tmp_path / "a" / "summary.csv", HEADER, *falling(20))
    file = write(tmp_path / "b" / "other.csv", HEADER, *falling(30, top=90, loss=3))
    out = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "a"), str(file), "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG" and image.size == (1220, 440)
        assert capsys.readouterr().out == f"{out}: 1220 x 440 pixels\n"
        image = image.convert("RGB")
    curves = {COLORS[0], COLORS[1]}
    assert curves | {pale(color) for color in curves} <= colors(image, 0)
    assert curves <= colors(image, 1)
    assert not set(COLORS[2:6]) & colors(image)


def test_embedded_summaries():
    files = sorted(hub_configs_dir().glob("*/summary.csv"))
    assert files
    for file in files:
        assert COLORS[0] in colors(draw([read_run(file)]), 1)


def test_where_a_curve_goes(tmp_path):
    """Left to right over epochs, and up for larger values: accuracy from 20 to 80 %, ticks at the ends."""
    run = read_run(write(tmp_path / "r" / "summary.csv", "epoch,eval_top1", "0,20", "10,80"))
    image = draw([run])
    left, top = image.width // 2 + 70, 40
    for x, y, there in ((130, 225, True), (390, 75, True), (130, 75, False), (390, 225, False)):
        pixel = "#{:02x}{:02x}{:02x}".format(*image.getpixel((left + x, top + y)))
        assert (pixel == COLORS[0]) == there, (x, y, pixel)


def test_curves_over_wall_clock_time(tmp_path):
    """The accuracy of an epoch stands where the epoch ends."""
    run = read_run(write(tmp_path / "r" / "summary.csv", "epoch,eval_top1", "0,20", "10,80"))
    timed = replace(run, minutes=1.0)
    assert run.xs == [0, 10] and timed.xs == [1, 11]
    image = draw([timed])
    left, top = image.width // 2 + 70, 40
    # an axis from 0 to 12: at 3 minutes a fifth of the way from 20 to 80 %
    for x, y, there in ((130, 240, True), (130, 225, False)):
        pixel = "#{:02x}{:02x}{:02x}".format(*image.getpixel((left + x, top + y)))
        assert (pixel == COLORS[0]) == there, (x, y, pixel)
    with pytest.raises(ValueError, match="one axis for all: minutes an epoch are not known of r"):
        draw([timed, run])


def test_a_resumed_run(tmp_path):
    """Killed in epoch 4 and resumed from the checkpoint of epoch 1; the header is there twice."""
    lines = [HEADER, "0,3,3,10,50,1", "1,2,2,20,50,1", "2,9,9,90,50,1", "3,9,9,95,50,1"]
    lines += [HEADER, "2,1.5,1.5,30,50,1"]
    run = read_run(write(tmp_path / "summary.csv", *lines))
    assert run.epochs == [0, 1, 2]
    assert run.curves == {"train_loss": [3, 2, 1.5], "eval_loss": [3, 2, 1.5], "eval_top1": [10, 20, 30]}
    assert best(run) == (2, 30)
    # resumed with other columns: train.py writes what it has
    run = read_run(write(tmp_path / "summary.csv", *lines, "epoch,train_loss,lr", "3,1,1"))
    assert run.curves["train_loss"] == [3, 2, 1.5, 1] and math.isnan(run.curves["eval_top1"][3])


def test_missing_columns(tmp_path):
    run = read_run(write(tmp_path / "run" / "summary.csv", "epoch,train_loss,lr", "0,2,0.1", "1,1,0.1"))
    assert (run.name, list(run.curves), best(run)) == ("run", ["train_loss"], None)
    image = draw([run])
    assert pale(COLORS[0]) in colors(image, 0) and COLORS[0] not in colors(image, 0) | colors(image, 1)


def test_nan_is_a_gap(tmp_path):
    rows = ["0,nan,1,20,95,1", "1,inf,1,nan,95,1", "2,,1,80,95,1"]
    run = read_run(write(tmp_path / "summary.csv", HEADER, *rows))
    assert all(math.isnan(y) for y in run.curves["train_loss"])
    assert best(run) == (2, 80)
    image = draw([run])
    assert pale(COLORS[0]) not in colors(image, 0)
    assert COLORS[0] in colors(image, 0)  # a constant, which has no range
    # two points at the ends, and no line between them
    half = image.width // 2
    assert COLORS[0] in colors(image, 1)
    assert COLORS[0] not in colors(image.crop((half + 100, 40, image.width - 50, 335)))
    nothing = draw([read_run(write(tmp_path / "summary.csv", HEADER, "0,nan,nan,nan,nan,1"))])
    assert COLORS[0] not in colors(nothing, 0) | colors(nothing, 1)


def test_one_epoch_is_a_point(tmp_path):
    image = draw([read_run(write(tmp_path / "summary.csv", HEADER, "7,2,2.5,30,60,1"))])
    assert COLORS[0] in colors(image, 0) and COLORS[0] in colors(image, 1)


def test_many_runs(tmp_path):
    run = read_run(write(tmp_path / "summary.csv", HEADER, *falling(5)))
    assert draw([run] * 8).size == (1220, 560)
    assert set(COLORS) <= colors(draw([run] * 8))  # in the legend
    for runs in ([], [run] * 9):
        with pytest.raises(ValueError, match=f"1 to 8 runs fit one picture, got {len(runs)}"):
            draw(runs)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no epoch yet"),
        ([HEADER], "has no epoch yet"),
        (["0,1,2,3,4,5"], "line 1: expected a header that starts with epoch, got '0,1,2,3,4,5'"),
        (["epoch,lr", "0,1"], "line 1: the header epoch,lr has none of train_loss, eval_loss, eval_top1"),
        ([HEADER, *falling(2), "2,1.0,0."], "line 4: 3 values for 6 columns"),
        ([HEADER, *falling(2), "2,1.0,oops,3,4,5"], "line 4: eval_loss is 'oops', expected a number"),
        ([HEADER, *falling(1), HEADER, "1.5,1,1,1,1,1"], "line 4: epoch is '1.5', expected a whole number"),
        ([HEADER, "nan,1,1,1,1,1"], "line 2: epoch is 'nan', expected a whole number"),
        ([HEADER, "-1,1,1,1,1,1"], "line 2: epoch is '-1', expected a whole number"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, capsys, lines, message):
    file = write(tmp_path / "run" / "summary.csv", *lines)
    out = tmp_path / "curves.png"
    assert main(["plot", str(file.parent), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"timm-halonet: error: {file}") and message in error
    assert not out.exists()


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'summary.csv'} does not exist; a run is a folder"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no_such does not exist"):
        read_run(tmp_path / "no_such")
    (tmp_path / "summary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"summary\.csv is no CSV: "):
        read_run(tmp_path)

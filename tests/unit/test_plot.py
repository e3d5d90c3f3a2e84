"""timm-halonet plot: what train.py and `detect train` write to summary.csv, as curves."""

import itertools
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from timm_halonet.cli import main
from timm_halonet.hub import hub_configs_dir
from timm_halonet.report.plots import COLORS, blend, draw_runs, look, readable, save, scatter
from timm_halonet.report.summary import Run, best, read_run

HEADER = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
# how files of each kind begin
BEGINS = {".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".JPEG": b"\xff\xd8", ".svg": b"<?xml", ".pdf": b"%PDF"}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\r\n" for line in lines), newline="")  # the csv module ends lines like this
    return path


def falling(n, top=80.0, loss=1.0):
    return [f"{e},{loss + 2 / (e + 1)},{loss + 3 / (e + 1)},{top - 50 / (e + 1)},95,0.1" for e in range(n)]


def lines(ax):
    """Colour, points and marked points of each curve of a panel."""
    return [
        (line.get_color(), [tuple(map(float, p)) for p in line.get_xydata()], line.get_markevery()) for line in ax.lines
    ]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def overlaps(boxes):
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def texts_of(figure):
    """All the texts of a picture that show, in their places."""
    figure.draw_without_rendering()
    found = list(figure.legends[0].get_texts())
    for ax in figure.axes:
        found += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text()]


def test_command(tmp_path, capsys):
    write(tmp_path / "a" / "summary.csv", HEADER, *falling(20))
    file = write(tmp_path / "b" / "other.csv", HEADER, *falling(30, top=90, loss=3))
    for name in ("a.png", "a.svg"):
        out = tmp_path / name
        assert main(["plot", str(tmp_path / "a"), str(file), "--out", str(out)]) == 0
        size = ": {1} x {0} pixels".format(*matplotlib.image.imread(out).shape) if name == "a.png" else ""
        assert capsys.readouterr().out == f"{out}{size}\n"
        assert out.read_bytes().startswith(BEGINS[out.suffix])
    files = len(list(tmp_path.iterdir()))
    for wrong in ("c.gif", "c", "c.png.txt", "png"):
        assert main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / wrong)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"timm-halonet: error: cannot write {tmp_path / wrong}: the suffix is ")
        assert error.endswith("pictures are .png, .jpg, .jpeg, .svg, .pdf\n")
    assert main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "none" / "c.png")]) == 1
    assert f"cannot write {tmp_path / 'none' / 'c.png'}: No such file" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == files


@pytest.mark.parametrize("suffix", BEGINS)
def test_files_of_every_kind_are_the_same_each_time(tmp_path, suffix):
    outs = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for out in outs:
        figure = Figure(figsize=(2, 1))
        figure.subplots().set_title("a")
        save(figure, out)
    first, second = (out.read_bytes() for out in outs)
    assert first.startswith(BEGINS[suffix]) and first == second
    assert b"<dc:date>" not in first and b"CreationDate" not in first and b"Software" not in first


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    class Full:
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(OSError, match=r"^cannot write .*x.png: No space left on device$"):
        save(Full(), tmp_path / "x.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"old")]


@pytest.mark.parametrize("argv", [["plot", "RUN"], ["attend", "no.jpg", "--at", "1,1"]])
def test_without_matplotlib_one_line_names_the_extra(argv, tmp_path, capsys, monkeypatch):
    write(tmp_path / "summary.csv", HEADER, *falling(2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    argv = [str(tmp_path) if a == "RUN" else a for a in argv]
    assert main([*argv, "--out", str(tmp_path / "c.png")]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("timm-halonet: error: pictures need matplotlib")
    assert error.endswith("pip install 'timm_halonet[plot]'")


@pytest.mark.integration
def test_drawing_leaves_no_trace_in_matplotlib(tmp_path):
    """No pyplot, which would choose a window system; settings as they were; settings of the user change nothing."""
    code = """if True:
        import sys
        import matplotlib
        from timm_halonet.report.plots import draw_runs, save
        from timm_halonet.report.summary import Run
        run = Run("a_b", [0, 1], {"train_loss": [2.0, 1.0]})
        for name, size in (("a.svg", 9), ("b.svg", 30)):
            matplotlib.rcParams.update({"font.size": size, "text.usetex": size > 9, "axes.grid": False})
            before = {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # reading it chooses it
            save(draw_runs([run]), name)
            assert {k: matplotlib.rcParams[k] for k in before} == before
        assert "matplotlib.pyplot" not in sys.modules
        assert open("a.svg").read() == open("b.svg").read()
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_embedded_summaries():
    files = sorted(hub_configs_dir().glob("*/summary.csv"))
    assert files
    figure = draw_runs([read_run(file) for file in files])
    assert len(lines(figure.axes[1])) == len(files)
    assert legend(figure)[0] == "halonet_h0.imagenette_r128: best top-1 90.17 % at epoch 56, last epoch 56"


def test_what_a_picture_shows(tmp_path):
    a = read_run(write(tmp_path / "a" / "summary.csv", "epoch,train_loss,eval_loss,eval_top1", "0,3,2,20", "10,2,1,80"))
    b = read_run(write(tmp_path / "b" / "summary.csv", "epoch,train_loss,eval_loss,eval_top1", "0,4,5,30", "5,3,4,40"))
    figure = draw_runs([a, b])
    loss, top1 = figure.axes
    assert [ax.get_title() for ax in figure.axes] == [
        "loss: validation (pale: training)",
        "top-1 accuracy, validation, %",
    ]
    assert [ax.get_xlabel() for ax in figure.axes] == ["epoch", "epoch"]
    assert lines(top1) == [(COLORS[0], [(0, 20), (10, 80)], []), (COLORS[1], [(0, 30), (5, 40)], [])]
    assert lines(loss) == [
        (blend(COLORS[0]), [(0, 3), (10, 2)], []),
        (COLORS[0], [(0, 2), (10, 1)], []),
        (blend(COLORS[1]), [(0, 4), (5, 3)], []),
        (COLORS[1], [(0, 5), (5, 4)], []),
    ]
    assert legend(figure) == [
        "a: best top-1 80.00 % at epoch 10, last epoch 10",
        "b: best top-1 40.00 % at epoch 5, last epoch 5",
    ]
    handles = figure.legends[0].legend_handles
    assert [handle.get_color() for handle in handles[:2]] == list(COLORS[:2])


def test_texts_and_curves_reach_the_file(tmp_path):
    """As pixels: the curve's colours in the panels, dark letters where titles, ticks and legend are."""
    figure = draw_runs([read_run(write(tmp_path / "r" / "summary.csv", HEADER, *falling(9)))])
    texts = texts_of(figure)
    save(figure, tmp_path / "a.png")
    pixels = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int)
    for color in (COLORS[0], blend(COLORS[0])):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(-1).sum() > 100
    assert {"loss: validation (pale: training)", "epoch", "r: best top-1 74.44 % at epoch 8, last epoch 8"} <= {
        text.get_text() for text in texts
    }
    for text in texts:
        left, bottom, right, top = text.get_window_extent().extents.astype(int)
        assert min(left, bottom) >= 0 and right <= pixels.shape[1] and top <= pixels.shape[0]
        assert pixels[pixels.shape[0] - top : pixels.shape[0] - bottom, left:right].min() < 100, text


def test_curves_over_wall_clock_time(tmp_path):
    """The accuracy of an epoch stands where the epoch ends."""
    run = read_run(write(tmp_path / "r" / "summary.csv", "epoch,eval_top1", "0,20", "10,80"))
    timed = replace(run, minutes=1.0)
    assert run.xs == [0, 10] and timed.xs == [1, 11]
    ax = draw_runs([timed]).axes[1]
    assert (ax.get_xlabel(), ax.get_xlim()[0]) == ("minutes", 0)
    assert lines(ax) == [(COLORS[0], [(1, 20), (11, 80)], [])]
    with pytest.raises(ValueError, match="one axis for all: minutes an epoch are not known of r"):
        draw_runs([timed, run])
    with pytest.raises(ValueError, match="no runs to draw"):
        draw_runs([])


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
    figure = draw_runs([run])
    assert [ax.get_title() for ax in figure.axes] == ["loss: training", "top-1 accuracy, validation, %"]
    assert lines(figure.axes[0]) == [(COLORS[0], [(0, 2), (1, 1)], [])] and not lines(figure.axes[1])
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [[], ["no values"]]
    assert legend(figure) == ["run: no top-1 or AP in its summary.csv, last epoch 1"]
    # next to a run that has others
    other = read_run(write(tmp_path / "other" / "summary.csv", "epoch,eval_top1", "3,70"))
    figure = draw_runs([run, other])
    assert lines(figure.axes[1]) == [(look(1)["color"], [(3, 70)], [0])]


def test_detectors(tmp_path):
    """What `detect train --eval-epochs 2` writes: AP from 0 to 1 every second epoch, nothing where there is none."""
    header = "epoch,train_loss,lr,box_AP,box_AP50,mask_AP,mask_AP50"
    rows = ["0,3,1,,,,", "1,2,1,0.25,0.5,0.125,0.4", "2,2,1,,,,", "3,1,1,0.5,0.75,0.375,0.5"]
    run = read_run(write(tmp_path / "masks" / "summary.csv", header, *rows))
    assert run.curves["box_AP"][1::2] == [25, 50] and best(run, "mask_AP") == (3, 37.5)
    boxes = read_run(write(tmp_path / "boxes" / "summary.csv", "epoch,train_loss,box_AP", "0,3,0.5"))
    figure = draw_runs([run, boxes])
    assert [ax.get_title() for ax in figure.axes] == ["loss: training", "AP, validation, %: masks (pale: boxes)"]
    assert lines(figure.axes[1]) == [
        (blend(look(0)["color"]), [(1, 25), (3, 50)], [0, 1]),
        (look(0)["color"], [(1, 12.5), (3, 37.5)], [0, 1]),
        (blend(look(1)["color"]), [(0, 50)], [0]),
    ]
    assert legend(figure) == [
        "masks: best mask AP 37.50 % at epoch 3, last epoch 3",
        "boxes: best box AP 50.00 % at epoch 0, last epoch 0",
    ]
    [box] = lines(draw_runs([boxes]).axes[1])
    assert box == (look(0)["color"], [(0, 50)], [0])  # alone, boxes are not pale
    # next to a classifier: a panel each
    classifier = read_run(write(tmp_path / "c" / "summary.csv", HEADER, *falling(3)))
    figure = draw_runs([run, classifier])
    assert not overlaps([text.get_window_extent() for text in texts_of(figure)])
    assert [ax.get_title() for ax in figure.axes] == [
        "loss: validation (pale: training)",
        "top-1 accuracy, validation, %",
        "AP, validation, %: masks (pale: boxes)",
    ]


def test_nan_is_a_gap(tmp_path):
    rows = ["0,nan,1,20,95,1", "1,inf,1,nan,95,1", "2,,1,80,95,1"]
    run = read_run(write(tmp_path / "summary.csv", HEADER, *rows))
    assert all(math.isnan(y) for y in run.curves["train_loss"])
    assert best(run) == (2, 80)
    loss, top1 = draw_runs([run]).axes
    assert lines(loss) == [(COLORS[0], [(0, 1), (1, 1), (2, 1)], [])]  # of the validation
    # two points that show, and no line between them
    assert np.isnan(top1.lines[0].get_ydata()).tolist() == [False, True, False]
    assert top1.lines[0].get_markevery() == [0, 2] and top1.lines[0].get_marker() == "o"
    nothing = draw_runs([read_run(write(tmp_path / "summary.csv", HEADER, "0,nan,nan,nan,nan,1"))])
    assert [[text.get_text() for text in ax.texts] for ax in nothing.axes] == [["no values"], ["no values"]]


def test_one_epoch_is_a_point(tmp_path):
    figure = draw_runs([read_run(write(tmp_path / "summary.csv", HEADER, "7,2,2.5,30,60,1"))])
    assert [line[1:] for ax in figure.axes for line in lines(ax)] == [
        ([(7, 2)], [0]),
        ([(7, 2.5)], [0]),
        ([(7, 30)], [0]),
    ]


def test_many_runs_are_told_apart(tmp_path):
    run = read_run(write(tmp_path / "r" / "summary.csv", HEADER, *falling(5)))
    figure = draw_runs([run] * 20)
    handles = figure.legends[0].legend_handles[:20]
    assert len({handle.get_color() for handle in handles}) == 20
    assert len({line.get_color() for line in figure.axes[1].lines}) == 20
    assert [text.partition(":")[0] for text in legend(figure)[:20]] == [f"r ({n})" for n in range(1, 21)]
    assert len({tuple(look(n).values()) for n in range(96)}) == 96
    texts = texts_of(figure)
    assert not overlaps([text.get_window_extent() for text in texts])
    panels = [ax.get_window_extent() for ax in figure.axes]
    assert all(abs(box.height / figure.dpi - 3) < 0.3 for box in panels)  # the legend takes nothing from them


NAMES = [
    "\u4e2d\u6587 $x_1$ a_b",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 \U0001f916",
    "W" * 200,
    "_hidden",
    "a\nb\t",
    "bad\udcff",
    "$",
    "a b " * 50,
]


def test_any_name(tmp_path):
    runs = [Run(name, [0, 1], {"eval_top1": [10.0, 20.0 + n]}) for n, name in enumerate(NAMES)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning a letter that the font lacks, otherwise
        figure = draw_runs(runs)
        save(figure, tmp_path / "a.png")
        texts = texts_of(figure)
    found = legend(figure)
    assert len(found) == len(NAMES)
    assert "$x_1$ a_b: best top-1 20.00 %" in found[0] and found[4].startswith("_hidden: ")
    assert found[5].startswith("a\\nb\\t: ") and found[6].startswith("bad\\udcff: ") and found[7].startswith("$: ")
    assert found[3].replace("\n", "").startswith("W" * 200 + ": best") and found[3].count("\n") >= 2
    assert not overlaps([text.get_window_extent() for text in texts])
    width, height = figure.canvas.get_width_height()
    for text in figure.legends[0].get_texts():
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height
        assert not text.get_parse_math()  # $x_1$ is a name


def test_letters_without_a_font_are_written_as_numbers():
    private = chr(0x10FF00)  # no font has it
    assert readable([f"a{private}b", "\u0416\u00e9"]) == ([r"a\U0010ff00b", "\u0416\u00e9"], ["DejaVu Sans"])
    # what the first font lacks comes from another one: STIXGeneral, which matplotlib brings, has this
    texts, fonts = readable(["\u2316"])
    assert texts == ["\u2316"] and fonts[0] == "DejaVu Sans" and len(fonts) == 2


def test_points_and_their_numbers():
    """Twelve models and more, some in one place: a colour each, a number each, nothing over a number."""
    points = {f"model_{n}": (1.0 + n % 4, 70.0 + n // 4) for n in range(16)} | {"x": (1.0, 70.0), "y": (1.01, 70.0)}
    rates = {name: (x, 1000 / x) for name, (x, _) in points.items() if name != "x"}
    figure = scatter([("top-1, %", "parameters, millions", points), ("images/s", "parameters, millions", rates)])
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["top-1, %", "images/s"]
    assert left.get_xlabel() == "parameters, millions"
    assert [tuple(line.get_xydata()[0]) for line in left.lines] == list(points.values())
    assert len({line.get_color() for line in left.lines}) == 18
    assert [text.get_text() for text in left.texts] == [str(n) for n in range(1, 19)]
    assert [text.get_text() for text in right.texts] == [str(n) for n in range(1, 19) if n != 17]
    # the same colour in both panels and in the legend
    colors = {text.get_text(): text.get_color() for text in left.texts}
    assert {text.get_text(): text.get_color() for text in right.texts}.items() <= colors.items()
    assert [handle.get_color() for handle in figure.legends[0].legend_handles] == list(colors.values())
    assert legend(figure)[:2] == ["1  model_0: (1, 70), (1, 1e+03)", "2  model_1: (2, 70), (2, 500)"]
    assert legend(figure)[16] == "17  x: (1, 70), -"
    assert not overlaps([text.get_window_extent() for text in texts_of(figure)])
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        for box, line in itertools.product(boxes, ax.lines):
            assert not box.contains(*ax.transData.transform(line.get_xydata()[0]))
    # from zero where the values spread, so that distances show ratios; close values fill the panel
    assert left.get_ylim()[0] > 60 and right.get_ylim()[0] == 0 and left.get_xlim()[0] == 0


EXCEL = "epoch;train_loss;eval_top1\r\n0;2,5;10\r\n1;1,25;20,5\r\n;;\r\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (EXCEL.replace(",", ".").replace(";", ","), "utf-8-sig"),
        (EXCEL, "utf-8-sig"),
        (EXCEL, "utf-8"),
        (EXCEL.replace(";", "\t"), "utf-16"),  # "Unicode text"
        (EXCEL.replace(";", "\t"), "utf-16-be"),
        ("\n" + EXCEL.replace("\r", ""), "utf-8-sig"),
    ],
)
def test_what_excel_saves_again(tmp_path, text, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "summary.csv").write_bytes(mark + text.encode(encoding))
    run = read_run(tmp_path)
    assert (run.epochs, run.curves) == ([0, 1], {"train_loss": [2.5, 1.25], "eval_top1": [10, 20.5]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no epoch yet"),
        ([HEADER], "has no epoch yet"),
        (["0,1,2,3,4,5"], "line 1: expected a header that starts with epoch, got '0,1,2,3,4,5'"),
        (
            ["epoch,lr", "0,1"],
            "line 1: the header epoch,lr has none of the columns train_loss, eval_loss, eval_top1, mask_AP, box_AP",
        ),
        ([HEADER, *falling(2), "2,1.0,0."], "line 4: 3 values for 6 columns"),
        ([HEADER, *falling(2), "2,1.0,oops,3,4,5"], "line 4: eval_loss is 'oops', expected a number"),
        ([HEADER, *falling(1), HEADER, "1.5,1,1,1,1,1"], "line 4: epoch is '1.5', expected a whole number"),
        ([HEADER, "nan,1,1,1,1,1"], "line 2: epoch is 'nan', expected a whole number"),
        ([HEADER, "-1,1,1,1,1,1"], "line 2: epoch is '-1', expected a whole number"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, capsys, rows, message):
    file = write(tmp_path / "run" / "summary.csv", *rows)
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
    with pytest.raises(ValueError, match=r"summary\.csv is not a CSV file: "):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"/dev/null is not a file that can be read to its end"):
        read_run("/dev/null")


def test_values_that_no_axis_holds_are_gaps(tmp_path, capsys):
    (tmp_path / "summary.csv").write_text("epoch,train_loss\n0,1e308\n1,-1e308\n2,1.5\n")
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    losses = read_run(tmp_path).curves["train_loss"]
    assert math.isnan(losses[0]) and math.isnan(losses[1]) and losses[2] == 1.5

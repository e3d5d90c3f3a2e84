"""The benchmark over image sizes: what it measures in its processes, what it makes of figures. Never a speed."""

import csv
import dataclasses

import pytest
import resolution
from PIL import Image
from resolution import Measurement, exponent, main, parser, read_csv, table, write_csv
from resolution_plot import draw

from timm_halonet.report.plots import COLORS, GREY


def quadratic(model="global", error_at=None):
    """Figures of a model whose memory grows with pixels and whose time with pixels squared."""
    found = []
    for size in (256, 512, 1024):
        ok = error_at is None or size < error_at
        numbers = (100 * size**2, 1e-9 * size**4) if ok else (None, None)
        error = "" if ok else "out of memory" if size == error_at else "not tried"
        found.append(Measurement(model, size, "forward", *numbers, error, "a machine"))
    return found


@pytest.mark.integration
def test_a_sweep(tmp_path, capsys):
    files = {name: tmp_path / f"figures.{name}" for name in ("csv", "md", "png")}
    outputs = ["--csv", files["csv"], "--markdown", files["md"], "--plot", files["png"]]
    sweep = ["--models", "halonet_h0", "--sizes", "64", "32", "--device", "cpu", "--threads", "1"]
    assert main([*sweep, *map(str, outputs)]) == 0
    out, err = capsys.readouterr()
    assert "[1/2] halonet_h0 at 32 px" in err and "[2/2] halonet_h0 at 64 px" in err
    found = read_csv(str(files["csv"]))
    assert [(m.model, m.size, m.mode, m.error) for m in found] == [("halonet_h0", s, "forward", "") for s in (32, 64)]
    assert all(m.seconds > 0 and "torch" in m.machine for m in found)
    # a forward step at 64 px holds at least the stem's map, 64 channels of 32 x 32 float32
    assert found[1].bytes is None or found[1].bytes >= 64 * 32 * 32 * 4
    assert out.strip() == table(found)
    assert files["md"].read_text().startswith("<!-- resolution:forward -->\nMeasured on: ")
    assert table(found) in files["md"].read_text()
    with Image.open(files["png"]) as image:
        assert image.format == "PNG" and image.width == 1500


@pytest.mark.integration
def test_out_of_memory():
    args = parser().parse_args(["--limit", "0.01", "--threads", "1"])
    # the logits of 1024 x 1024 tokens and 3 heads alone take 12 MiB
    one = resolution.measure("vit_tiny_patch16_224/unfused", 512, args, "cpu")
    assert (one.error, one.bytes, one.seconds) == ("out of memory", None, None)


def test_what_ends_a_models_sizes(monkeypatch, tmp_path, capsys):
    def measure(model, size, args, device):
        if model == "slow" and size == 64:
            raise KeyboardInterrupt
        error = {"large": "out of memory", "picky": "AssertionError"}.get(model, "") if size == 32 else ""
        return Measurement(model, size, "forward", *((None, None) if error else (size, size)), error)

    monkeypatch.setattr(resolution, "measure", measure)
    file = str(tmp_path / "figures.csv")
    sweep = ["--sizes", "32", "64", "--device", "cpu", "--csv", file, "--models"]
    assert main([*sweep, "large", "picky"]) == 0
    errors = {(m.model, m.size): m.error for m in read_csv(file)}
    assert errors == {
        ("large", 32): "out of memory",
        ("large", 64): "not tried",
        ("picky", 32): "AssertionError",
        ("picky", 64): "",
    }
    capsys.readouterr()
    assert main([*sweep, "slow", "picky"]) == 130  # Ctrl-C: what there is comes out
    assert [(m.model, m.size) for m in read_csv(file)] == [("slow", 32)]
    assert "| 32 px | 0 MiB, 32 s |" in capsys.readouterr().out


@pytest.mark.integration
def test_a_training_step(tmp_path):
    file = str(tmp_path / "figures.csv")
    assert main(["--models", "halonet_h0", "--sizes", "64", "--device", "cpu", "--train", "--csv", file]) == 0
    (one,) = read_csv(file)
    assert (one.mode, one.error) == ("training", "")
    # gradients of all parameters but the classifier's and the 1x1 convolution's behind the stages
    assert one.bytes is None or one.bytes > 4 * 5_000_000


def test_exponents():
    found = quadratic()
    assert exponent(found, "global", "bytes") == pytest.approx(1)
    assert exponent(found, "global", "seconds") == pytest.approx(2)
    assert exponent(found[:1], "global", "bytes") is None
    assert exponent(found, "another", "bytes") is None
    assert exponent(quadratic(error_at=1024), "global", "seconds") == pytest.approx(2)


def test_table_and_reports(tmp_path, capsys):
    found = [*quadratic("a"), *quadratic("b", error_at=512)]
    lines = table(found).splitlines()
    assert lines[0] == "| image | `a` | `b` |"
    assert lines[3] == "| 512 px | 25 MiB, 68.7 s | out of memory |"
    assert lines[4].endswith("| not tried |")
    assert lines[5:] == [
        "| memory grows with | pixels^1.00 | - |",
        "| time grows with | pixels^2.00 | - |",
    ]
    # runs of parts are joined, into a page that has the marks
    for name in "ab":
        write_csv(str(tmp_path / name), [m for m in found if m.model == name])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- resolution:forward -->\nold\n<!-- /resolution -->\nafter\n")
    both = [str(tmp_path / name) for name in "ab"]
    assert main(["--report", *both, "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /resolution -->\nafter\n") and "old" not in text
    assert table(found) in text and "Measured on: a machine." in text

    def refused(*args):
        capsys.readouterr()
        assert main(list(args)) == 1
        return capsys.readouterr().err

    page.write_text("no marks")
    assert "<!-- resolution:forward -->" in refused("--report", *both, "--markdown", str(page))
    assert page.read_text() == "no marks"
    write_csv(both[1], [dataclasses.replace(m, mode="training") for m in found])
    assert "forward and training" in refused("--report", *both)
    with open(both[1], "a", newline="") as f:
        csv.writer(f).writerow(["a", "large", "forward"])
    assert f"{both[1]}, line 8" in refused("--report", both[1])
    assert "there is no folder" in refused("--plot", str(tmp_path / "none" / "x.png"))
    assert "x.gif: the suffix is '.gif', pictures are .png" in refused("--plot", "x.gif")


def test_plot():
    found = [*quadratic("a"), *quadratic("b", error_at=512), *quadratic("c_$1$", error_at=512)]
    figure = draw(found)
    memory, time = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["memory of a forward step, MiB", "time of a forward step, s"]
    assert [(ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) for ax in figure.axes] == [
        ("log", "log", "image, pixels a side")
    ] * 2
    grey, a, b, c, *crosses = memory.lines
    assert a.get_xydata().tolist() == [[size, 100 * size**2 / 2**20] for size in (256, 512, 1024)]
    assert time.lines[1].get_xydata().tolist() == [[size, 1e-9 * size**4] for size in (256, 512, 1024)]
    assert [line.get_color() for line in (a, b, c)] == list(COLORS[:3])
    assert b.get_xydata().tolist() == [[256, 6.25]] and b.get_marker() == "o"
    # in proportion to pixels, through the first model's last value
    assert grey.get_xydata().tolist() == a.get_xydata().tolist() and grey.get_color() == GREY
    # one below the other
    assert [line.get_xdata().tolist() for line in crosses] == [[512], [512]]
    assert crosses[0].get_ydata()[0] > crosses[1].get_ydata()[0] + 0.04
    assert [(line.get_marker(), line.get_color()) for line in crosses] == [("x", color) for color in COLORS[1:3]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: memory with pixels^1.00, time with pixels^2.00",
        "b: one size",
        "c_$1$: one size",
        "in proportion to pixels",
        "out of memory at this size",
    ]
    figure.draw_without_rendering()
    assert [text.get_text() for text in memory.get_xticklabels()] == ["256", "512", "1024"]
    low, high = memory.get_ylim()
    ticks = [t.label1.get_text() for t in memory.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    assert ticks == ["5", "10", "20", "50", "100", "200"]
    # twelve models and more; values of one kind only
    many = draw([dataclasses.replace(m, model=str(i), bytes=None) for i in range(12) for m in found[:3]])
    assert len({line.get_color() for line in many.axes[1].lines[1:]}) == 12 and not many.axes[0].lines
    assert many.axes[0].texts[0].get_text() == "no values"
    with pytest.raises(ValueError, match="no figures to draw in 1 measurements"):
        draw([Measurement("a", 256, "forward", None, None, "out of memory")])

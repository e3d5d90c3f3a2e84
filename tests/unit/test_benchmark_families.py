"""timm-halonet bench --families: what it counts, measures and writes. Never a speed."""

import json
from dataclasses import replace

import pytest
import timm
from PIL import Image

from timm_halonet.benchmark import families, report
from timm_halonet.benchmark.case import Config, Skip
from timm_halonet.cli import main

BUILD_CASES = families.build_cases


def figures(median, **kwargs):
    return dict(median=median, q1=median, q3=median, samples=1, difference=None, **kwargs)


def a_result():
    """Of two models, one of them skipped, with figures that divide well."""
    machine = dict(device="cpu", name="a machine", threads=2, versions={"torch": "2"}, date="today", load=0.1)
    values = {
        "parameters": ("parameters", 5_502_248),
        "multiply-adds": ("multiply-adds", 1.5e9),
        "float32/inference": ("time", 0.2),
        "float32/training": ("time", 0.5),
        "memory": ("memory", 3 << 20),
    }
    cases = [
        dict(
            name=f"families/{name}",
            batch=4,
            quantity=quantity,
            baseline="small",
            subjects={"small": figures(value), "none": {"skipped": "no such thing"}},
        )
        for name, (quantity, value) in values.items()
    ]
    names = [case["name"] for case in cases]
    return dict(machine=machine, options={"img_size": 64}, selected=names, interrupted=False, cases=cases)


def test_the_models_exist():
    assert [name for name in families.MODELS if not timm.is_model(name)] == []
    with pytest.raises(Skip, match="no model of this name"):
        families.create("halonet_h99", 224)


def test_models_of_a_fixed_size_are_built_for_another():
    model = families.create("swin_tiny_patch4_window7_224", 64)
    assert model.patch_embed.img_size == (64, 64)
    assert families.create("eamlp_7", 64).num_classes == 1000


def test_counts():
    config = Config(families=("eamlp_7", "halonet_h99"), size=224)
    parameters, macs = (families.count(case, config)["subjects"] for case in BUILD_CASES(config)[:2])
    assert parameters["eamlp_7"]["median"] == 6_096_206
    assert macs["eamlp_7"]["median"] == pytest.approx(1.465e9, rel=1e-3)
    assert "no model of this name" in parameters["halonet_h99"]["skipped"]


def test_cases():
    cases = BUILD_CASES(Config(families=("a", "b"), batch=3))
    assert [case.name for case in cases] == [
        "families/parameters",
        "families/multiply-adds",
        "families/float32/inference",
        "families/float32/training",
        "families/bfloat16/inference",
        "families/bfloat16/training",
        "families/memory",
    ]
    assert {(case.batch, tuple(s.name for s in case.subjects)) for case in cases} == {(3, ("a", "b"))}


@pytest.mark.integration
def test_command(tmp_path, capsys, monkeypatch):
    """All of it on two tiny cases: one model runs, the other does not exist."""
    monkeypatch.setattr(families, "build_cases", lambda c: [replace(case, seconds=0.0) for case in BUILD_CASES(c)])
    (tmp_path / "page.md").write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n")
    arguments = ["--img-size", "64", "--batch-size", "2", "--dtype", "float32", "--quick", "--device", "cpu"]
    files = [
        f"--{kind}={tmp_path / name}" for kind, name in dict(json="a.json", markdown="page.md", plot="a.png").items()
    ]
    assert main(["bench", "--families", "eamlp_7", "halonet_h99", *arguments, *files]) == 0
    captured = capsys.readouterr()
    assert "families/memory" in captured.err and captured.out.isascii()
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["options"]["img_size"] == 64
    cases = {case["name"]: case for case in result["cases"]}
    for name in ("families/float32/inference", "families/float32/training"):
        subject = cases[name]["subjects"]["eamlp_7"]
        assert cases[name]["batch"] == 2 and subject["samples"] >= 2
        assert 0 < subject["q1"] <= subject["median"] <= subject["q3"]
        assert "no model of this name" in cases[name]["subjects"]["halonet_h99"]["skipped"]
    memory = cases["families/memory"]["subjects"]["eamlp_7"]
    # at least the gradients of 6.1 million parameters; where a system does not tell, it is skipped
    assert "skipped" in memory or 4 * 6_096_206 < memory["median"] < 1 << 30
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("<!-- /bench -->\nafter\n") and "old" not in page
    assert "| eamlp_7 | 6,096,206 |" in page
    assert "Skipped. halonet_h99: timm knows no model of this name." in page
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width == 1500
    # and the same from the file, without measuring
    assert main(["bench", f"--report={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'b.md'}"]) == 0
    assert (tmp_path / "b.md").read_text().splitlines() == page.splitlines()[1:-1]


def test_table():
    result = a_result()
    header, *rows = report.families_table(result)
    rates = ["float32/inference, images/s", "float32/training, images/s"]
    assert header == ["model", "parameters", "multiply-adds, G", *rates, "memory of a training step"]
    assert rows == [["small", "5,502,248", "1.50", "20", "8", "3 MiB"], ["none", *5 * ["skipped"]]]
    result["cases"][2]["subjects"]["small"].update(q1=0.19, q3=0.21, samples=5)
    assert report.families_table(result)[1][3] == "20 ± 5 %"
    text = report.text(result)
    assert "Batch 4, images of 64 x 64 pixels" in text
    assert "families/parameters: batch" not in text  # no table of its own for each case
    assert "skipped: none (5 cases): no such thing" in text
    # beside the cases of the other benchmark
    result["cases"].append(dict(name="layer/a", batch=8, quantity="time", baseline="x", subjects={"x": figures(1.0)}))
    assert "| small | 5,502,248 |" in report.markdown(result) and "| a | 1000 ms |" in report.markdown(result)
    result["cases"] = result["cases"][-1:]
    assert report.families_table(result) == []
    assert "Batch" not in report.text(result)


def test_picture():
    figure = families.draw(a_result())
    assert [ax.get_title() for ax in figure.axes] == [
        "inference, images/s (float32)",
        "training, images/s (float32)",
    ]
    assert [ax.get_xlabel() for ax in figure.axes] == ["parameters, millions"] * 2
    # batches of 4 in 0.2 and 0.5 s; what was skipped is not there
    points = [[line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes]
    assert points == [[[[5.502248, 20]]], [[[5.502248, 8]]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1  small: (5.5, 20), (5.5, 8)"]
    result = a_result()
    result["cases"] = [case for case in result["cases"] if case["quantity"] != "time"]
    with pytest.raises(ValueError, match="times of inference"):
        families.draw(result)


def test_memory_worker_measures_one_model(capsys):
    arguments = ["--families", "eamlp_7", "--img-size", "32", "--batch-size", "2", "--dtype", "float32"]
    code = main(["bench", *arguments, "--device", "cpu", "--memory-worker", "families/memory", "eamlp_7"])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0 and ("skipped" in answer or answer["bytes"] > 4 * 6_096_206)


@pytest.mark.parametrize("option", [["--batch-size", "4"], ["--plot", "a.png"]])
def test_options_of_families_only(option, capsys, monkeypatch):
    monkeypatch.setattr(families, "build_cases", lambda config: pytest.fail("measured"))
    assert main(["bench", "--device", "cpu", *option]) == 1
    assert "belong to --families" in capsys.readouterr().err


def test_a_picture_of_another_kind_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("timm_halonet.benchmark.run.measure_all", lambda *_: pytest.fail("measured"))
    assert main(["bench", "--families", "eamlp_7", "--device", "cpu", "--plot", "a.gif"]) == 1
    assert "cannot write a.gif: the suffix is '.gif', pictures are .png" in capsys.readouterr().err

"""`timm-halonet bench --deploy`: exported models next to a baseline in each engine; nothing is lost."""

import argparse
import dataclasses
import json
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

import pytest
import torch

from timm_halonet.benchmark import deploy, engines, report
from timm_halonet.benchmark import exports as exports_module
from timm_halonet.benchmark.case import Config, Failed, Skip
from timm_halonet.benchmark.run import add_arguments
from timm_halonet.cli import main

GOALS = Path(__file__).parents[2] / "docs" / "examples" / "goals.json"


def test_a_dry_run_measures_exports(tmp_path, capsys):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    file, page = tmp_path / "a.json", tmp_path / "page.md"
    page.write_text("before\n<!-- bench:deploy -->\n<!-- /bench -->\nafter\n")
    only = ["latency/eager", "*ONNX Runtime, dynamic*"]
    options = ["--dry-run", "--only", *only, "--json", str(file), "--markdown", str(page)]
    assert main(["bench", "--deploy", *options]) == 0
    result = json.loads(file.read_text())
    assert report.failures(result) == [] and result["left_out"] == {}
    assert "onnxruntime" in result["machine"]["versions"]
    cases = {case["name"]: case for case in result["cases"]}
    assert list(cases) == result["selected"]
    figures = {name: {k: v["median"] for k, v in case["subjects"].items()} for name, case in cases.items()}
    assert all(set(x) == {"resnet26t", "halonet_h0"} for x in figures.values())
    dynamic = "ONNX Runtime, dynamic size, batch 1"
    assert all(0 <= x < 1e-5 for x in figures[f"difference/{dynamic}"].values())
    sizes = figures[f"file/{dynamic}"]
    assert 4e6 < sizes["halonet_h0"] < sizes["resnet26t"]  # bytes
    assert all(
        x > 0
        for name in ("latency/eager, batch 1", f"latency/{dynamic}", f"export/{dynamic}")
        for x in figures[name].values()
    )
    # as much as the weights, at least
    assert all(size > figures[f"file/{dynamic}"][name] / 2 for name, size in figures[f"peak/{dynamic}"].items())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and f"| {dynamic} | " in text
    assert f"{next(iter(cases))}: resnet26t " in capsys.readouterr().err


@pytest.fixture
def exports(tmp_path):
    return deploy.Exports(tmp_path, 64, None, 1, True)


ONNX = next(x for x in engines.ENGINES if x.name == "ONNX Runtime, fixed size")


def test_an_export_that_fails_is_not_tried_again(exports):
    calls = []

    def make():
        calls.append(1)
        raise RuntimeError("no such model")

    for _ in range(2):
        with pytest.raises(Failed, match="cannot be exported: RuntimeError: no such model"):
            exports.file(ONNX, "a", make, 1)
    assert len(calls) == 1


def test_an_export_that_ended_its_process_is_not_tried_again_in_this_run(exports):
    class Gone(BaseException):
        pass

    def make():
        raise Gone

    with pytest.raises(Gone):
        exports.file(ONNX, "a", make, 1)
    with pytest.raises(Failed, match="did not come to an end in an earlier try"):
        exports.file(ONNX, "a", make, 1)
    assert not exports.has(ONNX, "a", 1)  # a new run asks this first
    with pytest.raises(Gone):
        exports.file(ONNX, "a", make, 1)


FAST = engines.Engine("fast", None, lambda model, images, file, opset: file.write_text("a file"), ".txt")


@pytest.fixture
def made():
    return []


@pytest.fixture
def make(made):
    def function():
        made.append(1)
        return torch.nn.Identity()

    return function


def test_a_kept_export_is_used_again(tmp_path, make, made):
    file, seconds = deploy.Exports(tmp_path, 64, None, 1, True).file(FAST, "a", make, 1)
    again = deploy.Exports(tmp_path, 64, None, 1, True)
    assert again.has(FAST, "a", 1) and again.file(FAST, "a", make, 1) == (file, seconds)
    assert len(made) == 1
    note = json.loads(file.with_suffix(".json").read_text())
    assert (
        note["versions"]["torch"] == metadata.version("torch")
        and note["clock"] == "wall clock"
        and note["model"] == "a"
    )


@pytest.mark.parametrize(
    "change",
    ["model", "batch", "size", "opset", "threads", "engine", "version", "source", "processor", "the file is gone"],
)
def test_an_export_of_something_else_is_not_used(tmp_path, make, made, change, monkeypatch):
    file, _ = deploy.Exports(tmp_path, 64, None, 1, True).file(FAST, "a", make, 1)
    if change == "version":
        monkeypatch.setattr(exports_module, "_version", lambda name: "0.0.1")
    elif change == "source":
        monkeypatch.setattr(exports_module, "source_digest", lambda: "another")
    elif change == "processor":
        monkeypatch.setattr(exports_module, "cpu_name", lambda: "another")
    elif change == "the file is gone":
        file.unlink()
    options = {"size": 64, "opset": None, "threads": 1} | (
        {change: 2} if change in ("size", "opset", "threads") else {}
    )
    other = deploy.Exports(tmp_path, **options, tiny=True)
    engine = dataclasses.replace(FAST, name="other") if change == "engine" else FAST
    wanted = engine, "b" if change == "model" else "a", 2 if change == "batch" else 1
    assert not other.has(*wanted)
    other.file(wanted[0], wanted[1], make, wanted[2])
    assert len(made) == 2 and other.has(*wanted)


def test_an_export_for_all_sizes_serves_all_batches(tmp_path, make, made):
    exports = deploy.Exports(tmp_path, 64, None, 1, True)
    engine = dataclasses.replace(FAST, dynamic=True)
    assert exports.file(engine, "a", make, 1) == exports.file(engine, "a", make, 8) and len(made) == 1


def test_exporting_first_and_measuring_later(tmp_path, capsys):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    only = ["--deploy", "--dry-run", "--files", str(tmp_path / "files"), "--threads", "1", "--models", "resnet26t"]
    case = "ONNX Runtime, dynamic size, batch 1"
    assert main(["bench", *only, "--export-only", "--only", case, "--json", str(tmp_path / "a.json")]) == 0
    assert "0 of 1 exports are in" in capsys.readouterr().err
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["selected"] == [f"export/{case}", f"file/{case}"]
    seconds = result["cases"][0]["subjects"]["resnet26t"]["median"]
    arguments = ["--only", f"export/{case}", f"difference/{case}", "--json", str(tmp_path / "b.json")]
    assert main(["bench", *only, *arguments]) == 0
    assert "1 of 1 exports are in" in capsys.readouterr().err
    cases = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert cases[0]["subjects"]["resnet26t"]["median"] == seconds and len(cases) == 2
    assert main(["bench", "--report", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert f"difference/{case}" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [None, "1.9.0", "1.21.3"])
def test_an_engine_that_is_missing_or_too_old_is_one_line(monkeypatch, capsys, installed):
    def version(name):
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(engines.metadata, "version", version)
    reason = engines.missing(ONNX)
    assert "onnxruntime 1.22 or newer" in reason and "timm_halonet[deploy]" in reason and "\n" not in reason
    assert ("not installed" in reason) == (installed is None) and (installed is None or installed in reason)
    only = ["--only", "latency/ONNX Runtime, fixed", "export/ONNX Runtime, fixed"]
    assert main(["bench", "--deploy", "--dry-run", *only]) == 0
    streams = capsys.readouterr()
    assert streams.err.count(f"ONNX Runtime, fixed size: not measured: {reason}") == 1
    assert f"not measured: ONNX Runtime, fixed size: {reason}" in streams.out


@pytest.mark.parametrize("version", ["1.22.0", "1.100.1", "2.0", "1.22.0.dev3+cpu"])
def test_an_engine_that_is_new_enough_is_not_missing(monkeypatch, version):
    monkeypatch.setattr(engines.metadata, "version", lambda name: version)
    assert engines.missing(ONNX) is None


@pytest.mark.parametrize("named", [(), ("resnet26t", "halonet_h0")])
def test_the_process_that_measures_has_the_same_plan(tmp_path, named):
    exports = deploy.Exports(tmp_path, 96, 20, 2, True)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(deploy._command(exports, (1, 4), named)[3:])
    assert (args.deploy, args.files, args.img_size, args.opset, args.threads) == (True, str(tmp_path), 96, 20, 2)
    assert (tuple(args.models or ()), tuple(args.batch_size), args.dry_run) == (named, (1, 4), True)


def test_a_difference_that_is_too_large_fails(exports, monkeypatch):
    make = deploy.TINY_MODELS["halonet_h0"]
    monkeypatch.setattr(
        exports, "loaded", lambda *_: lambda: (exports.model(make)(exports.images(1)) + 0.1,), raising=True
    )
    with pytest.raises(Failed, match="differs from eager by"):
        deploy._difference(exports, ONNX, "halonet_h0", make, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "17"], "--opset 17 is too old: PyTorch's exporter needs 18 or newer"),
        (["--models", "resnet26t", "no_such"], "--models no_such: timm knows no such model"),
        (["--device", "cuda"], "--deploy measures engines on the CPU"),
        (["--families"], "--families does not go with --deploy"),
        (["--only", "TensorRT"], "--only TensorRT: no such case"),
        (["--export-only"], "--export-only needs --files FOLDER"),
        (["--export-only", "--files", "x", "--only", "latency"], "--only latency: no such case"),
    ],
)
def test_wrong_options(options, message, capsys):
    assert main(["bench", "--deploy", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--opset", "18"], ["--files", "x"], ["--export-only"], ["--models", "resnet26t"]])
def test_options_of_deploy_alone(option, capsys):
    assert main(["bench", *option]) == 1
    assert f"{option[0]} belongs to --deploy" in capsys.readouterr().err


def test_every_goal_names_cases_and_subjects_that_exist(tmp_path):
    cases = deploy.build_cases(Config("cpu"), deploy.Exports(tmp_path, 256, None, 2, False), (1, 8))
    goals = [goal for goal in report.load_goals(GOALS) if goal.what.startswith("deploy:")]
    assert len(goals) > 10
    for goal in goals:
        matching = [case for case in cases if fnmatchcase(case.name, goal.cases)]
        assert len(matching) == 1, goal
        assert {goal.numerator, goal.denominator} <= {subject.name for subject in matching[0].subjects}, goal


def test_models_are_compared_with_and_without_torch_compile(tmp_path):
    cases = {case.name: case for case in deploy.compile_cases(Config("cpu"), 256, 8)}
    assert set(cases) == {
        f"compile/{mode}, {dtype}, batch 8" for mode in ("inference", "training") for dtype in ("float32", "bfloat16")
    }
    for case in cases.values():
        compiled = {subject.name for subject in case.subjects if subject.compiled}
        assert compiled == {f"{name} compiled" for name in deploy.COMPILED}
    tiny = deploy.compile_cases(Config("cpu", tiny=True), 64, 1)[-1]  # without torch.compile
    logits = {subject.name: subject.build(1)()[0] for subject in tiny.subjects}
    assert torch.equal(logits["halonet_h0"], logits["halonet_h0 compiled"]) and len(logits) == 4


def test_the_plan_has_every_engine_and_quantity(tmp_path):
    exports = deploy.Exports(tmp_path, 256, None, 2, False)
    cases = deploy.build_cases(Config("cpu"), exports, (1, 8))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for engine in engines.ENGINES:
        for batch in (1, 8):
            assert f"latency/{engine.name}, batch {batch}" in names
            assert (f"peak/{engine.name}, batch {batch}" in names) == (engine.name != "torch.compile")
    assert "export/ONNX Runtime, dynamic size, batch 8" not in names  # one file for all
    assert {case.baseline for case in cases} == {"resnet26t"}


def test_an_opset_that_onnx_runtime_does_not_know_names_its_version(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 1000)], ir_version=8)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Skip, match=f"onnxruntime {runtime.__version__} is too old for this opset"):
        engines._load_onnx(tmp_path / "a.onnx", 1)

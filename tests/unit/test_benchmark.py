"""The benchmark: what it computes from figures, what it runs, and that its peers compute the same. Never a speed."""

import json
import math
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from timm_halonet.benchmark import cases as benchmark_cases
from timm_halonet.benchmark import deploy, measuring, report, timing
from timm_halonet.benchmark import memory as benchmark_memory
from timm_halonet.benchmark import run as benchmark
from timm_halonet.benchmark.case import Case, Config, Skip, Subject
from timm_halonet.benchmark.cases import build_cases
from timm_halonet.benchmark.peers import PeerOp, TimmOp, blocks, flex_attend, from_blocks, sdpa_attend
from timm_halonet.benchmark.roofline import PEAKS, backward_work, bound, bounds, map_work
from timm_halonet.cli import main
from timm_halonet.ops import halo_attention

CPU = Config(dtypes=(torch.float32,))


def a_result(device="cpu", **medians):
    """A result with one case for each name=medians of subjects."""
    machine = dict(device=device, name="a machine", threads=2, versions={"torch": "2"}, date="today", load=0.1)
    cases = []
    for name, subjects in medians.items():
        figures = {s: m if isinstance(m, dict) else report.summary([m]) for s, m in subjects.items()}
        cases.append(dict(name=name, batch=8, quantity="time", baseline=next(iter(subjects)), subjects=figures))
    return dict(machine=machine, options={}, selected=list(medians), interrupted=False, cases=cases)


GOALS = Path(__file__).parents[2] / "docs" / "examples" / "goals.json"


def goals_file(folder, *goals):
    file = folder / "goals.json"
    file.write_text(json.dumps([asdict(goal) for goal in goals]))
    return str(file)


def target(must=2.0, aim=4.0, best="high", cases="layer/*"):
    return report.Target("cpu", "ours", cases, "timm", "ours", must, aim, best)


# ---- from figures to verdicts ------------------------------------------------------------------------------------


def test_geometric_mean_and_quartiles():
    assert report.geometric_mean([2, 8]) == pytest.approx(4)
    assert report.geometric_mean([7]) == pytest.approx(7)
    assert report.summary([5, 1, 2, 3, 4]) == dict(median=3, q1=2, q3=4, samples=5)
    assert report.summary([6]) == dict(median=6, q1=6, q3=6, samples=1)


@pytest.mark.parametrize(
    "measured, must, aim, best, state",
    [
        (1.9, 2, 4, "high", "missed"),
        (2.0, 2, 4, "high", "met"),
        (4.0, 2, 4, "high", "aim"),
        (1.6, 1.5, None, "low", "missed"),
        (1.4, 1.5, None, "low", "met"),
        (0.9, None, 1, "high", "below"),
        (1.1, None, 1, "high", "aim"),
    ],
)
def test_state_of_a_goal(measured, must, aim, best, state):
    result = a_result(**{"layer/a": {"timm": measured, "ours": 1.0}})
    (row,) = report.verdicts(result, [target(must, aim, best)])
    assert row["state"] == state
    assert bool(report.missed([row])) == (state == "missed")


def test_a_goal_is_the_mean_over_its_cases_and_needs_them_all():
    result = a_result(**{"layer/a": {"timm": 1.0, "ours": 1.0}, "layer/b": {"timm": 9.0, "ours": 1.0}})
    (row,) = report.verdicts(result, [target()])
    assert (row["measured"], row["cases"], row["state"]) == (pytest.approx(3), 2, "met")
    # a subject that was skipped is no goal met, and neither is a case that an interrupt left out
    result["cases"][0]["subjects"]["ours"] = {"skipped": "cannot"}
    (row,) = report.verdicts(result, [target()])
    assert (row["measured"], row["state"]) == (None, "missed")
    assert "no figure, must be >= 2x" in report.missed([row])[0]
    del result["cases"][0]
    assert report.verdicts(result, [target()])[0]["state"] == "missed"
    # but a goal whose cases were not asked for is not judged, nor one of another device
    assert report.verdicts(result, [target(cases="model/*")]) == []
    assert report.verdicts(a_result("cuda", **{"layer/a": {"timm": 9.0, "ours": 1.0}}), [target()]) == []


def test_every_goal_names_cases_and_subjects_that_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "cuda"):
        cases = build_cases(Config(device, compile=device == "cuda"))
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        for goal in report.load_goals(GOALS):
            if goal.device != device or goal.what.startswith(("minutes:", "deploy:")):  # other tests have those
                continue
            matching = [case for case in cases if fnmatchcase(case.name, goal.cases)]
            assert matching, goal
            for case in matching:
                assert {goal.numerator, goal.denominator} <= {s.name for s in case.subjects} | {"roofline"}, goal
        for case in cases:
            assert case.baseline in {s.name for s in case.subjects}
            assert case.subjects[0].name == case.baseline  # it must be there when the others are compared with it


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The command's cases replaced by one that is over at once."""

    def subject(name, value, same=True):
        return Subject(name, lambda batch: lambda: (torch.full((batch,), value),), same)

    def broken(batch):
        raise RuntimeError("no such thing\nand a second line")

    subjects = (subject("timm", 1.0), subject("ours", 1.0), subject("wrong", 1.5), Subject("broken", broken))
    case = Case("layer/tiny", (*subjects, subject("other", 2.0, same=False)), "timm", 0.01, tolerance=0.1)
    monkeypatch.setattr(benchmark_cases, "build_cases", lambda config: [case])
    return case


def test_text_json_and_markdown_have_everything(tiny, tmp_path, capsys, monkeypatch):
    goals = goals_file(tmp_path, target(must=1e-6, aim=None))
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    assert main(["bench", "--quick", "--device", "cpu", "--check", goals, *files]) == 0
    captured = capsys.readouterr()
    assert "layer/tiny" in captured.err  # progress
    assert "every goal that must be met is met" in captured.out
    assert captured.out.isascii()
    assert "skipped: broken (layer/tiny): RuntimeError: no such thing\n" in captured.out
    result = json.loads((tmp_path / "a.json").read_text())
    assert {"device", "name", "cpu", "threads", "versions", "backends", "date", "load"} <= set(result["machine"])
    assert {"torch", "timm", "timm_halonet", "python"} <= set(result["machine"]["versions"])
    (case,) = result["cases"]
    assert (case["name"], case["batch"], case["quantity"], case["baseline"]) == ("layer/tiny", 8, "time", "timm")
    subjects = case["subjects"]
    for name in ("timm", "ours", "other"):
        assert 0 < subjects[name]["q1"] <= subjects[name]["median"] <= subjects[name]["q3"]
        assert subjects[name]["samples"] >= 2
    assert subjects["ours"]["difference"] == 0
    assert "differs from timm by 5.0e-01" in subjects["wrong"]["skipped"]
    assert subjects["broken"]["skipped"] == "RuntimeError: no such thing"
    assert result["goals"][0]["state"] == "met"
    table = (tmp_path / "a.md").read_text()
    assert "| case | timm | ours | other |" in table  # who was skipped everywhere is in a note instead
    assert "broken: RuntimeError: no such thing." in table
    # the report of what was measured is the same, without measuring
    monkeypatch.setattr(benchmark_cases, "build_cases", None)
    assert (
        main(["bench", "--report", str(tmp_path / "a.json"), "--check", goals, "--markdown", str(tmp_path / "b.md")])
        == 0
    )
    assert captured.out == capsys.readouterr().out
    assert (tmp_path / "b.md").read_text() == table


@pytest.mark.parametrize("option, clock", [([], "wall clock"), (["--cpu-time"], "processor time")])
def test_the_clock_is_in_the_result(tiny, tmp_path, option, clock):
    file = tmp_path / "a.json"
    assert main(["bench", "--quick", "--device", "cpu", "--json", str(file), *option]) == 0
    assert json.loads(file.read_text())["options"]["clock"] == clock


def test_check_fails_and_names_what_is_missed(tiny, capsys, tmp_path):
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    capsys.readouterr()
    goals = goals_file(tmp_path, target(must=1e6, aim=None))
    assert main(["bench", "--quick", "--device", "cpu", "--check", goals]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("missed: ours: ") and last.endswith("x, must be >= 1e+06x")
    # no goal for what was measured is no success either
    assert main(["bench", "--quick", "--device", "cpu", "--check", goals_file(tmp_path)]) == 1
    (tmp_path / "wrong.json").write_text('[{"what": "no such field"}]')
    capsys.readouterr()
    assert main(["bench", "--check", str(tmp_path / "wrong.json")]) == 1
    assert "wrong.json is not a list of goals in JSON" in capsys.readouterr().err


def test_interrupted_run_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    calls = []

    def step():
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return (torch.zeros(1),)

    steps = (Subject("timm", lambda batch: step), Subject("ours", lambda batch: step))
    never = (Subject("timm", lambda batch: pytest.fail("begun after the interrupt")),)
    cases = [Case("a/first", steps, "timm", 100), Case("a/second", never, "timm", 100)]
    monkeypatch.setattr(benchmark_cases, "build_cases", lambda config: cases)
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 0)
    file = tmp_path / "a.json"
    assert main(["bench", "--device", "cpu", "--json", str(file)]) == 130
    result = json.loads(file.read_text())
    assert result["interrupted"]
    assert [case["name"] for case in result["cases"]] == ["a/first"]
    assert result["cases"][0]["subjects"]["timm"]["samples"] > 5
    assert "Interrupted; the results above" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nothing"], "--only nothing: no such case; there are layer/tiny"),
        (["--json", "/no/folder/a.json"], "there is no folder /no/folder"),
        (["--report", "tests/test_benchmark.py"], "not a JSON file of timm-halonet bench"),
        (["--report", "/no/file.json"], "/no/file.json"),
        (["--device", "cuda"], "finds no CUDA GPU here"),
        (["--families", "--batch-size", "1", "8"], "--families takes one --batch-size, got 1 8"),
        (["--cpu-time", "--dry-run"], "--cpu-time does not go with --minutes or --dry-run"),
    ],
)
def test_wrong_arguments(tiny, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "tests/test_benchmark.py" in arguments:
        arguments = ["--report", __file__]
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--threads", "0"], ["--dtype", "int8"], ["--device", "tpu"], ["--minutes", "0"], ["--minutes", "nan"]],
)
def test_arguments_that_argparse_refuses(arguments):
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2


def test_list_and_only(capsys):
    assert main(["bench", "--list", "--device", "cpu", "--only", "small/4x4*", "memory/layer"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["memory/layer", "small/4x4/forward", "small/4x4/training"]


# ---- Markdown and joining ----------------------------------------------------------------------------------------


def test_markdown_replaces_its_region_and_nothing_else(tmp_path):
    file = tmp_path / "page.md"
    text = "before\n<!-- bench:cuda -->\nG\n<!-- /bench -->\nmiddle\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n"
    file.write_text(text)
    result = a_result(**{"layer/a": {"timm": 3.0, "ours": 1.0}})
    for _ in range(2):  # and again over its own output
        report.update_markdown(file, result)
        new = file.read_text()
        assert new.startswith(text[: text.index("old")])
        assert new.endswith("<!-- /bench -->\nafter\n")
        assert "old" not in new
        assert "| a | 3000 ms | 3.00x, 1000 ms |" in new
    file.write_text("no marks")
    with pytest.raises(ValueError, match="bench:cpu"):
        report.update_markdown(file, result)
    assert file.read_text() == "no marks"


def test_runs_of_parts_join():
    first = a_result(**{"layer/a": {"timm": 3.0}, "layer/b": {"timm": 1.0}})
    second = a_result(**{"layer/b": {"timm": 2.0}, "model/c": {"timm": 5.0}})
    whole = report.join([first, second])
    assert {c["name"]: c["subjects"]["timm"]["median"] for c in whole["cases"]} == {
        "layer/a": 3.0, "layer/b": 2.0, "model/c": 5.0,
    }  # fmt: skip
    assert whole["selected"] == ["layer/a", "layer/b", "model/c"]
    second["machine"]["threads"] = 4
    with pytest.raises(ValueError, match="threads is 2 in one and 4 in another"):
        report.join([first, second])


def test_joined_runs_name_what_no_run_measured():
    first, second = (a_result(**{name: {"timm": 2.0, "ours": 1.0}}) for name in ("layer/a", "layer/b"))
    first |= dict(selected=["layer/a", "layer/b", "layer/c"], left_out={"layer/b": "no time", "layer/c": "no time"})
    second |= dict(left_out={"an engine": "not installed"})
    joined = report.join([first, second])
    assert joined["left_out"] == {"layer/c": "no time", "an engine": "not installed"}
    assert first["left_out"] == {"layer/b": "no time", "layer/c": "no time"}


@pytest.mark.parametrize("name, values", [("clock", ("wall clock", "processor time")), ("img_size", (256, 64))])
def test_runs_with_other_options_do_not_join(name, values):
    first, second = (a_result(**{"layer/a": {"timm": 2.0}}) | {"options": {name: value}} for value in values)
    with pytest.raises(ValueError, match=f"{name} is {values[0]} in one and {values[1]} in another"):
        report.join([first, second])
    second["options"] = {}  # of a run that it says nothing about
    assert report.join([first, second])["options"] == {name: values[0]}


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_interleaving_takes_turns():
    order, samples = [], {"a": [], "b": [], "c": []}
    timers = {name: lambda name=name: order.append(name) or 1.0 for name in samples}
    timing.interleave(timers, 0.0, 3, samples)
    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    clock = iter(range(100))  # a second passes each time one looks
    timing.interleave({"a": lambda: 1.0}, 5.0, 1, samples := {"a": []}, now=lambda: next(clock))
    assert 3 <= len(samples["a"]) <= 6


def test_cpu_seconds_is_that_of_one_call():
    import time

    assert 0.01 <= timing.cpu_seconds(lambda: time.sleep(0.01), 3) < 0.03


def test_time_limit():
    import time

    with (
        pytest.raises(TimeoutError, match=r"compiling did not finish in 0.05 s"),
        timing.time_limit(0.05, "compiling"),
    ):
        time.sleep(5)
    with timing.time_limit(5, "this"):
        pass


def test_difference():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    assert timing.difference([a, b], [a, b]) == 0
    assert timing.difference([b, a], [b, b]) == 0.5
    assert math.isinf(timing.difference([a / 0 * 0], [a]))


def test_memory_growth_is_seen():
    size = 50 << 20
    try:
        grown = benchmark_memory.peak_growth(lambda: torch.ones(size // 4).sum())
    except Skip as e:
        pytest.skip(str(e))
    assert 0.9 * size < grown < 1.5 * size
    assert benchmark_memory.peak_growth(lambda: None) < 10 << 20  # though the peak before was higher


@pytest.mark.integration
def test_memory_worker_in_a_fresh_process():
    """The op of 16x16 needs little; the layer's own worker is the same code on a larger case."""
    case = next(case for case in build_cases(CPU) if case.name == "memory/layer")
    case = Case(case.name, tuple(s for s in case.subjects if s.name == "default"), "default", 1, quantity="memory")
    part, interrupted = benchmark_memory.measure_memory(case, CPU, 1)
    figures = part["subjects"]["default"]
    if "skipped" in figures:
        pytest.skip(figures["skipped"])
    # at least output, queries, keys, values and input gradient: 8 * 64 * 64 pixels of 64 channels in float32 each
    one = 8 * 64 * 64 * 64 * 4
    assert not interrupted
    assert 4 * one < figures["median"] < 40 * one


# ---- peers and subjects ------------------------------------------------------------------------------------------


@torch.no_grad()  # FlexAttention knows no backward on the CPU
@pytest.mark.parametrize("attend", [sdpa_attend, flex_attend])
def test_peers_compute_halo_attention(attend):
    sizes = dict(block_size=4, halo_size=2)
    op = PeerOp(attend, 2, 8, 3, 8, **sizes).double()
    q, k, v = op.q, *op.kv.chunk(2, dim=-1)
    tables = op.height_rel, op.width_rel
    wanted = halo_attention(q, k, v, *tables, mask_border=False, backend="reference", **sizes)
    torch.testing.assert_close(attend(q, k, v, *tables, **sizes), wanted)
    assert not torch.allclose(attend(q, k, v, tables[1], tables[0], **sizes), wanted)


def test_timms_op_computes_halo_attention():
    sizes = dict(block_size=4, halo_size=2)
    attend = lambda *tensors: halo_attention(*tensors, mask_border=False, backend="reference", **sizes)  # noqa: E731
    op = PeerOp(attend, 2, 8, 3, 8, **sizes)
    torch.testing.assert_close(TimmOp(op, **sizes)(), op())


def test_blocks_and_back():
    x = torch.randn(2, 8, 12, 3, 5)
    y = blocks(x, 4)
    assert torch.equal(y[1, 2, 3], x[0, 0, 4 + 3, 2])  # second block, third head, fourth query of the first row
    assert torch.equal(from_blocks(y, 4, 8, 12), x)


@pytest.mark.parametrize("training", [False, True])
def test_subjects_of_a_layer_agree(training):
    subjects = benchmark_cases.layer_subjects(CPU, 16, 32, 2, torch.float32, training)
    wanted = None
    for subject in subjects:
        try:
            tensors = subject.build(1)()
        except Skip as e:
            assert subject.name == "native" or "cpu" in str(e).lower()  # no compiler, or a backend for GPUs
            continue
        if wanted is None:
            assert subject.name == "timm eager"
            wanted = tensors
            assert len(wanted) == (4 if training else 1)  # output; gradients of the input and of two tables
        assert timing.difference(tensors, wanted) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_subjects_of_an_op_agree(training):
    subjects = benchmark_cases.op_subjects(CPU, 16, 16, 2, torch.float32, training)
    steps = {s.name: s.build(1) for s in subjects if s.name in ("timm eager", "default", "gather + sdpa")}
    wanted = steps.pop("timm eager")()
    for step in steps.values():
        assert timing.difference(step(), wanted) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_model_step(training):
    make = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 1000))  # noqa: E731
    step = benchmark_cases.model_step(make, CPU, torch.float32, training, 4, False, 2)
    (first,), (second,) = step(), step()
    assert first.shape == (2, 1000)
    assert torch.equal(first, second) != training  # training moves the weights


@pytest.mark.parametrize("limit", [None, 1e-9])
def test_roofline_is_in_the_result_or_said_to_be_unknown(limit):
    subject = Subject("timm eager", lambda batch: lambda: (torch.zeros(1),))
    case = Case("op/16x16/bfloat16/forward", (subject,), "timm eager", 0, bound=limit)
    part, _ = benchmark.measure(case, CPU, 1, timing.cpu_seconds)
    roofline = part["subjects"]["roofline"]
    assert roofline["median"] == limit if limit else "NVIDIA H200" in roofline["skipped"]


# ---- roofline ----------------------------------------------------------------------------------------------------


def test_work_of_a_map():
    """The figures of b 8, h 3, d 16 in 16 bits, worked out by hand."""
    sizes = dict(batch=1, heads=1, dim=16, block_size=8, halo_size=3)
    work = map_work(height=8, width=8, mask_border=False, **sizes)  # one block: 64 keys in the image, 196 with the ring
    assert work.product_flops == 2 * 2 * 64 * 64 * 16
    assert work.relative_flops == 86_016  # 2 tables of 21 rows
    assert work.exponentials == 64 * 196 == 12_544
    assert work.bytes == 8_192
    assert map_work(height=8, width=8, **sizes).exponentials == 64 * 64
    # 20 rows: blocks of 8, 8 and 4 queries see 11, 14 and 7 keys; 24: three blocks see 11, 14 and 11
    assert map_work(height=20, width=8, **sizes).exponentials == (8 * 11 + 8 * 14 + 4 * 7) * 64
    assert map_work(height=24, width=8, **sizes).product_flops == 4 * 8 * (11 + 14 + 11) * 64 * 16
    assert map_work(height=24, width=24, **sizes | dict(batch=3, heads=5)).exponentials == 15 * (8 * 36) ** 2
    assert backward_work(work).product_flops == 2.5 * work.product_flops


def test_bound():
    shape = dict(batch=8, height=64, width=64, heads=4, dim=16, block_size=8, halo_size=3)
    forward = bound("NVIDIA H200", training=False, **shape)
    peaks = PEAKS["NVIDIA H200"]
    # exponentials bind: six blocks see 14 keys, the two at the borders 11
    assert forward == pytest.approx(8 * 4 * (8 * (6 * 14 + 2 * 11)) ** 2 / peaks.exponentials)
    assert bound("NVIDIA H200", training=False, mask_border=False, **shape) == pytest.approx(
        8 * 4 * (8 * 8 * 14) ** 2 / peaks.exponentials
    )
    assert bound("NVIDIA H200", training=True, **shape) == pytest.approx(sum(bounds("NVIDIA H200", **shape)))
    assert bound("some other GPU", training=False, **shape) is None


@pytest.mark.parametrize("name", deploy.MODELS)
def test_models_to_deploy_can_be_made(name):
    with torch.device("meta"):
        model = deploy.MODELS[name]()
    assert model.num_classes == 1000

"""`timm-halonet bench --minutes`: nothing is lost, whatever happens to a case; the checks of the kernels can fail."""

import json
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from timm_halonet.benchmark import checks, measuring, minutes, report, supervise, timing, worker
from timm_halonet.benchmark.case import Case, Config, Failed, Subject
from timm_halonet.benchmark.supervise import Supervisor
from timm_halonet.cli import main
from timm_halonet.ops import BACKENDS, triton

GOALS = Path(__file__).parents[2] / "docs" / "examples" / "goals.json"

# a process that measures nothing; what a subject's name says happens to it
WORKER = """
import json, os, sys, time
def tell(**event):
    print(json.dumps(event), flush=True)
tell(ready=True)
cases = json.loads(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    names = [x for x in cases[request["case"]] if x not in request["without"]]
    found = {}
    for name in names:
        tell(begin=name, limit=0.2)
        if name == "crashes":
            print("some lines, then: CUDA error", file=sys.stderr)
            os._exit(139)
        if name == "hangs":
            time.sleep(60)
        if name == "poisons":
            tell(skipped=name, reason="an illegal memory access")
            os._exit(3)
        found[name] = {"median": 1.0, "q1": 1.0, "q3": 1.0, "samples": 3, "difference": None}
    tell(begin="", limit=0.2)
    if "crashes later" in names:
        os._exit(1)
    if "fails while timed" in names:
        tell(skipped="fails while timed", reason="while it was timed: out of memory")
        os._exit(3)
    tell(entry={"subjects": found})
"""


def _supervised(tmp_path, cases, monkeypatch, minutes=1.0, grace=0.5):
    monkeypatch.setattr(supervise, "GRACE", grace)
    monkeypatch.setattr(supervise, "LATE", 0.1)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    plan = [Case(name, tuple(Subject(x, None) for x in names), names[0], 0, setup=0.1) for name, names in cases.items()]
    result = dict(machine=dict(device="cuda"), options={}, selected=list(cases), interrupted=False, cases=[])
    file = tmp_path / "a.json"
    Supervisor(plan, minutes, [sys.executable, str(script), json.dumps(cases)], result, str(file)).run()
    assert json.loads(file.read_text()) == result
    return result


def test_a_crash_or_a_hang_costs_one_subject(tmp_path, monkeypatch, capsys):
    cases = {
        "a": ["ours", "crashes", "theirs"],
        "b": ["hangs", "ours"],
        "c": ["ours", "poisons", "theirs"],
        "d": ["crashes later", "ours"],
        "e": ["ours", "fails while timed"],
        "f": ["ours", "theirs"],
    }
    result = _supervised(tmp_path, cases, monkeypatch)
    assert [case["name"] for case in result["cases"]] == list(cases)
    assert result["left_out"] == {} and not result["interrupted"]
    for case in result["cases"]:
        assert set(case["subjects"]) == set(cases[case["name"]])
    found = {case["name"]: case["subjects"] for case in result["cases"]}
    skipped = {(n, s): f["skipped"] for n, x in found.items() for s, f in x.items() if "skipped" in f}
    assert skipped == {
        ("a", "crashes"): "its process ended with 139: some lines, then: CUDA error",
        ("b", "hangs"): "did not come to an end, and its process was ended",
        ("c", "poisons"): "an illegal memory access",
        ("d", "crashes later"): "its process ended with 1: it wrote no message",
        ("d", "ours"): "its process ended with 1: it wrote no message",
        ("e", "fails while timed"): "while it was timed: out of memory",
    }
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(cases) and all(f" s] {name}: " in line for name, line in zip(cases, lines, strict=True))
    assert "ours 1000 ms; crashes: FAILED: its process ended with 139" in lines[0]
    assert len(report.failures(result)) == 6
    assert report.failures(result, "errors") == []


@pytest.mark.parametrize("quantity", ["time", "file"])
def test_a_process_in_which_a_subject_was_stopped_ends(quantity, monkeypatch):
    # a compiler that is stopped half-way fails for the next model, or crashes
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def slow(batch):
        time.sleep(5)

    monkeypatch.setattr(worker.os, "_exit", end)
    monkeypatch.setattr(worker, "SAVED", 0.0)
    case, told = Case("a", (Subject("slow", slow, compiled=True),), "slow", 0, quantity=quantity), []
    watch = worker._Told(case, 100, 0.05, told.append, "cpu")
    with pytest.raises(Ended, match="3"):
        if quantity == "time":
            measuring.measure(case, Config("cpu"), 0.05, timing.cpu_seconds, watch)
        else:
            worker._one_by_one(case, Config("cpu"), watch)
    assert told[-1]["skipped"] == "slow" and "did not finish in 0.05 s" in told[-1]["reason"]


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    cases = {"x/a": ["ours"], "x/b": ["ours", "hangs"], "x/c": ["ours"]}
    result = _supervised(tmp_path, cases, monkeypatch, minutes=0.05, grace=60)
    assert [case["name"] for case in result["cases"]] == ["x/a", "x/b"]
    for figures in result["cases"][1]["subjects"].values():
        assert figures["skipped"] == "the time was over while hangs was set up"
    assert list(result["left_out"]) == ["x/c"]
    result["machine"] |= dict(name="a GPU", versions={}, date="today", load=None)
    assert "not measured: x/c: takes about 0 s, and 0 s were left" in report.text(result)
    assert "Not measured, since the time did not suffice: x/c." in report.markdown(result)


def test_every_goal_of_the_plan_names_cases_and_subjects_that_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = minutes.build_cases(Config("cuda"))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        steps = case.name.startswith("step-")
        assert case.baseline in ({"by the clock"} if steps else {"roofline", case.subjects[0].name})
    goals = [goal for goal in report.load_goals(GOALS) if goal.what.startswith("minutes:")]
    assert len(goals) == 17
    for goal in report.load_goals(GOALS):
        matching = [case for case in cases if goal.device == "cuda" and fnmatchcase(case.name, goal.cases)]
        assert bool(matching) == (goal in goals), goal
        for case in matching:
            assert {goal.numerator, goal.denominator} <= {s.name for s in case.subjects} | {"roofline"}, goal


def test_the_plan_begins_with_the_kernels_and_ends_with_what_is_compiled():
    cases = minutes.build_cases(Config("cuda"))
    names = [case.name for case in cases]
    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    assert kinds[:3] == ["kernels", "op-128", "op-8"]
    assert {kind.startswith("compiled") for kind in kinds[kinds.index("models-8") + 1 :]} == {True}
    eager = [case for case in cases if not case.name.startswith("compiled")]
    assert sum(map(supervise.cost, eager)) < 480  # of the 540 that nine minutes have


@pytest.mark.parametrize("name", ["triton", "wrong", "nan", "other bits"])
def test_a_check_of_the_kernels_can_fail(name, monkeypatch):
    reference, calls = BACKENDS["reference"][0], []

    def attend(q, k, v, rel_height, rel_width, options):
        calls.append(1)
        out = reference(q, k, v, rel_height, rel_width, options)
        if name == "other bits":
            return out * (1 + 1e-7 * len(calls))
        return out * {"triton": 1, "wrong": 1.01, "nan": float("nan")}[name]

    monkeypatch.setitem(BACKENDS, "triton", (attend, lambda q: None))
    shape = checks.Shape((5, 6), 1, 4, 8, 4, 1, dtype=torch.float32)
    if name == "triton":
        assert checks.worst_error(shape, 1, "cpu") <= 0.5
        return
    with pytest.raises(Failed, match="equal bits" if name == "other bits" else "output: the error is .* allowed"):
        checks.worst_error(shape, 1, "cpu")


def test_kernels_are_listed_with_what_they_take():
    x = torch.randn(64, 64)
    found = checks.kernel_seconds(lambda: (torch.mm(x, x).relu(),), "cpu")
    assert {"aten::mm", "aten::relu"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True) and min(found.values()) > 0


def test_a_step_is_asked_for_before_it_ends(monkeypatch):
    """On a GPU a step returns when its kernels are asked for, and ends with them."""
    now, calls = [0.0], []

    def step():
        calls.append(1)
        now[0] += 1.0
        return ()

    def synchronize():
        now[0] += 2.0

    monkeypatch.setattr(checks.time, "perf_counter", lambda: now[0])
    assert checks.step_seconds(step, "cpu") == {"by the clock": 1.0, "until asked for": 1.0}
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert checks.step_seconds(step, "cuda") == {"by the clock": 3.0, "until asked for": 1.0}
    assert len(calls) == 2 * (1 + checks.PROFILED)


def test_a_timer_that_fails_is_called_once():
    samples = {"a": [], "b": []}
    timing.interleave({"a": lambda: 1.0, "b": lambda: None}, 0.0, 3, samples)
    assert samples == {"a": [1.0] * 3, "b": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "9", "--device", "cpu"], "--minutes is for a GPU; --dry-run walks the same on the CPU"),
        (["--minutes", "9"], "finds no CUDA GPU here"),
        (["--minutes", "9", "--families"], "--families does not go with --minutes"),
        (["--dry-run", "--only", "nothing"], "--only nothing: no such case"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_check_that_another_backend_computed(monkeypatch):
    """Equality with the reference says nothing of a kernel then."""

    def no_kernel(*args):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "REFUSED", {})
    monkeypatch.setattr(triton, "_launched", no_kernel)
    with pytest.raises(Failed, match="blocked computed in place of the kernels: PassManager"):
        checks.worst_error(checks.Shape((3, 3), 1, 16, 16, dtype=torch.float32), 1, "cpu")


@pytest.mark.integration
def test_the_whole_plan_on_the_cpu(tmp_path, capsys):
    """Every line of it but for the GPU's own: it cannot fail for a typo when a GPU is there."""
    file, page = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--dry-run", "--json", str(file), "--markdown", str(page), "--check", str(GOALS)]
    code = main(["bench", *arguments])
    captured = capsys.readouterr()
    result = json.loads(file.read_text())
    plan = minutes.build_cases(Config(tiny=True))
    assert [case["name"] for case in result["cases"]] == [case.name for case in plan], captured.err[-2000:]
    expected = {
        "CUDA graphs need a GPU",
        "FlexAttention has no backward on the CPU",
        *(f["skipped"] for case in result["cases"] for n, f in case["subjects"].items() if n == "roofline"),
    }
    reasons = {f["skipped"] for case in result["cases"] for f in case["subjects"].values() if "skipped" in f}
    assert reasons == expected, captured.err[-2000:]
    assert code == 0
    for case, planned in zip(result["cases"], plan, strict=True):
        if planned.quantity == "kernels":
            names = {"all kernels", *(["until asked for"] if planned.name.startswith("step-") else [])}
            assert names | {planned.baseline} - {"roofline"} <= set(case["subjects"])
        else:
            assert {x.name for x in planned.subjects} <= set(case["subjects"])
    assert [goal["what"] for goal in result["goals"]] == [
        goal.what for goal in report.load_goals(GOALS) if goal.what.startswith("minutes:")
    ]
    assert "models-128" in page.read_text() and captured.out.isascii()

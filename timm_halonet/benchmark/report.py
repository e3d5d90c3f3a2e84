"""From the figures of a benchmark run to ratios, the verdict on each goal, text and Markdown. Standard library only.

A result is a dictionary that JSON can hold: `machine`, `options`, `selected` (names of all cases asked for),
`interrupted`, and `cases`, each with `name`, `batch`, `quantity` ("time" or, by kernel, "kernels" in seconds, "memory"
in bytes, "errors" as parts of what is allowed; of `deploy.py`, "latency" and "export" in seconds, "file" and "peak" in
bytes, "difference" as a part of the largest value), `baseline` and `subjects`: name -> {median, q1, q3, samples,
difference} or {skipped: reason}. With --minutes, `left_out` has the cases that did not fit: name -> reason.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..report.machine import machine_line
from ..report.markdown import replace_region

Result = dict[str, Any]
TIMES_OF = ("latency", "export", "file", "peak")  # quantities whose ratio says how many times the baseline's they are

_STATES = {"missed": "MISSED", "met": "met", "aim": "aim reached", "below": "below the aim", "unknown": "no figure"}


@dataclass(frozen=True)
class Target:
    """A goal: the median of `numerator` over that of `denominator`, as a geometric mean over all cases that match."""

    device: str  # cpu or cuda
    what: str
    cases: str  # pattern of case names
    numerator: str  # subject
    denominator: str  # subject
    must: float | None
    aim: float | None = None
    best: str = "high"  # or "low"


def load_goals(file: str | os.PathLike[str]) -> list[Target]:
    """Goals from a JSON file: a list of objects with the fields of `Target`.

    Raises:
        ValueError: not such a file; with its name.
    """
    try:
        return [Target(**entry) for entry in json.loads(Path(file).read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as e:
        raise ValueError(f"{file} is not a list of goals in JSON: {e}") from None


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of one or more positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number of one or more samples."""
    if len(samples) == 1:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": len(samples)}


def ratio(case: dict[str, Any], numerator: str, denominator: str) -> float | None:
    """The ratio of two subjects' medians; None where one is missing."""
    medians = [case["subjects"].get(name, {}).get("median") for name in (numerator, denominator)]
    if not medians[0] or not medians[1]:
        return None
    return medians[0] / medians[1]


def verdicts(result: Result, targets: Sequence[Target], device: str | None = None) -> list[dict[str, Any]]:
    """A row for each goal of a device whose cases were asked for: what, measured, must, aim, best, state.

    The device is the result's, where it is not given.

    `measured` is None where a subject of a case has no figure. State: "missed" (a must is not reached, or has no
    figure), "met", "aim" (that is reached too); where there is an aim only, "below" it or "unknown".
    """
    cases = {case["name"]: case for case in result["cases"]}
    rows = []
    for target in targets:
        names = [name for name in result["selected"] if fnmatchcase(name, target.cases)]
        if target.device != (device or result["machine"]["device"]) or not names:
            continue
        ratios = [ratio(cases[name], target.numerator, target.denominator) for name in names if name in cases]
        known = [x for x in ratios if x is not None]
        measured = geometric_mean(known) if len(known) == len(names) else None
        row = dict(what=target.what, measured=measured, must=target.must, aim=target.aim, best=target.best)
        row["cases"] = len(names)
        row["state"] = _state(measured, target)
        rows.append(row)
    return rows


def _state(measured: float | None, target: Target) -> str:
    def reached(wanted: float | None) -> bool:
        if measured is None or wanted is None:
            return False
        return measured >= wanted if target.best == "high" else measured <= wanted

    if target.must is not None and not reached(target.must):
        return "missed"
    if measured is None:
        return "unknown"
    if reached(target.aim):
        return "aim"
    return "below" if target.must is None else "met"


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each must that is missed."""
    return [
        f"missed: {row['what']}: {_times(row['measured'])}, must be {_wanted(row, 'must')}"
        for row in rows
        if row["state"] == "missed"
    ]


def join(results: Sequence[Result]) -> Result:
    """One result of several runs of parts of the benchmark on one machine; of a case measured twice, the later.

    Raises:
        ValueError: the runs differ in device, threads, versions, clock, size of images or opset.
    """
    whole = dict(results[0], cases=list(results[0]["cases"]), selected=list(results[0]["selected"]))
    for other in results[1:]:
        for key in ("device", "name", "threads", "versions"):
            if other["machine"][key] != whole["machine"][key]:
                raise ValueError(
                    f"these runs do not belong together: {key} is {whole['machine'][key]} in one and "
                    f"{other['machine'][key]} in another; measure again on one machine"
                )
        for key in ("clock", "img_size", "opset"):
            here, there = whole["options"].get(key), other["options"].get(key)
            if key in other["options"] and here != there and key in whole["options"]:
                raise ValueError(f"these runs do not belong together: {key} is {here} in one and {there} in another")
        whole["options"] = {**other["options"], **whole["options"]}
        new = {case["name"] for case in other["cases"]}
        whole["cases"] = [case for case in whole["cases"] if case["name"] not in new] + other["cases"]
        whole["selected"] = list(dict.fromkeys(whole["selected"] + other["selected"]))
        whole["interrupted"] = whole["interrupted"] or other["interrupted"]
        whole["left_out"] = whole.get("left_out", {}) | other.get("left_out", {})
    measured = {case["name"] for case in whole["cases"]}
    whole["left_out"] = {name: why for name, why in whole.get("left_out", {}).items() if name not in measured}
    return whole


def load(files: Sequence[str]) -> Result:
    """The joined result of JSON files that the benchmark wrote.

    Raises:
        ValueError: not such a file, or files that do not belong together.
    """
    results = []
    for file in files:
        try:
            result = json.loads(Path(file).read_text())
            result["machine"]["device"], result["selected"], result["cases"], result["interrupted"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
            raise ValueError(f"{file} is not a JSON file of timm-halonet bench ({type(e).__name__}: {e})") from None
        results.append(result)
    return join(results)


# ---- text --------------------------------------------------------------------------------------------------------


def _times(value: float | None) -> str:
    if value is None:
        return "no figure"
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _wanted(row: dict[str, Any], key: str) -> str:
    return "-" if row[key] is None else f"{'>=' if row['best'] == 'high' else '<='} {row[key]:g}x"


def _amount(case: dict[str, Any], value: float) -> str:
    if case["quantity"] in ("memory", "file", "peak"):
        return f"{value / 2**20:.1f} MiB"
    if case["quantity"] == "difference":
        return f"{value:.0e}"
    if case["quantity"] == "export":
        return f"{value:.1f} s"
    if case["quantity"] == "errors":
        return f"{value:.2f} of the error allowed"
    if value < 1e-4:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"


def _baseline_ratio(case: dict[str, Any], name: str) -> float | None:
    """Times faster, or smaller, than the baseline; of deployed models, times what the baseline takes."""
    if case["quantity"] == "difference":
        return None
    return ratio(case, name, case["baseline"]) if case["quantity"] in TIMES_OF else ratio(case, case["baseline"], name)


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """A table aligned to the right, except for the columns in `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text(result: Result) -> str:
    """The whole result as a table for a terminal, ratios first."""
    lines = [machine_line(result["machine"]), ""]
    rows = result.get("goals", [])
    if rows:
        table = [["measured", "must", "aim", "", "goal (geometric mean over the cases in brackets)"]]
        for row in rows:
            what = f"{row['what']} ({row['cases']})" if row["cases"] > 1 else row["what"]
            wanted = _wanted(row, "must"), _wanted(row, "aim")
            table.append([_times(row["measured"]), *wanted, _STATES[row["state"]], what])
        lines += [*_columns(table, left=(3, 4)), ""]
    if table := families_table(result):
        plain = [[cell.replace("±", "+-") for cell in row] for row in table]  # a terminal may know ASCII only
        lines += [_families_title(result), *_columns(plain, left=(0,)), ""]
    for case in _other_cases(result):
        kind = "smaller" if case["quantity"] == "memory" else "faster"
        if case["quantity"] == "difference":
            kind = "closer to eager PyTorch"  # without ratios
        against = f"that of {case['baseline']}" if case["quantity"] in TIMES_OF else f"{kind} than {case['baseline']}"
        lines.append(f"{case['name']}: batch {case['batch']}, times {against}")
        table = [["ratio", "median", "quartiles", "images/s", "samples", "difference", "subject"]]
        for name, figures in case["subjects"].items():
            if "skipped" in figures:
                continue
            spread = f"{_amount(case, figures['q1'])} - {_amount(case, figures['q3'])}"
            timed = case["quantity"] in ("time", "latency")
            rate = f"{case['batch'] / figures['median']:.1f}" if timed else "-"
            difference = figures.get("difference")
            table.append(
                [
                    _times(_baseline_ratio(case, name)),
                    _amount(case, figures["median"]),
                    spread,
                    rate,
                    str(figures["samples"]),
                    "-" if difference is None else f"{difference:.0e}",
                    name,
                ]
            )
        lines += ["  " + line for line in _columns(table, left=(6,))]
        lines.append("")
    skipped: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for subject in _skipped(case):
            skipped.setdefault(subject, []).append(case["name"])
    for (name, reason), where in skipped.items():
        lines.append(f"skipped: {name} ({where[0] if len(where) == 1 else f'{len(where)} cases'}): {reason}")
    lines += [f"not measured: {name}: {reason}" for name, reason in result.get("left_out", {}).items()]
    if result["interrupted"]:
        lines.append("Interrupted; the results above are what was measured so far.")
    return "\n".join(lines).rstrip()


def _skipped(case: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, figures["skipped"]) for name, figures in case["subjects"].items() if "skipped" in figures]


def _notes(cases: Sequence[dict[str, Any]]) -> str:
    return " ".join(dict.fromkeys(f"{name}: {reason}." for case in cases for name, reason in _skipped(case)))


# ---- families ----------------------------------------------------------------------------------------------------


def _other_cases(result: Result) -> list[dict[str, Any]]:
    return [case for case in result["cases"] if not case["name"].startswith("families/")]


def families_table(result: Result) -> list[list[str]]:
    """A header and a row for each model, of the cases of `families.py`; empty without them."""
    cases = [case for case in result["cases"] if case["name"].startswith("families/")]
    heads = {"time": "{}, images/s", "memory": "memory of a training step", "multiply-adds": "multiply-adds, G"}
    names = dict.fromkeys(name for case in cases for name in case["subjects"])
    header = [heads.get(case["quantity"], "{}").format(case["name"].split("/", 1)[1]) for case in cases]
    rows = [[name, *(_families_cell(case, case["subjects"].get(name, {})) for case in cases)] for name in names]
    return [["model", *header], *rows] if cases else []


def _families_cell(case: dict[str, Any], figures: dict[str, Any]) -> str:
    if "median" not in figures:
        return "skipped" if "skipped" in figures else ""
    value = figures["median"]
    if case["quantity"] == "parameters":
        return f"{value:,}"
    if case["quantity"] == "multiply-adds":
        return f"{value / 1e9:.2f}"
    if case["quantity"] == "memory":
        return f"{value / 2**20:.0f} MiB"
    spread = f" ± {50 * (figures['q3'] - figures['q1']) / value:.0f} %" if figures["samples"] > 1 else ""
    return f"{case['batch'] / value:.3g}{spread}"


def _families_title(result: Result) -> str:
    batch = next(case["batch"] for case in result["cases"] if case["name"].startswith("families/"))
    size = result["options"].get("img_size")
    return f"Batch {batch}, images of {size} x {size} pixels; multiply-adds of one image."


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """The goals, then a table for each group of cases: a row each case, a column each subject."""
    lines = [f"Measured on: {machine_line(result['machine'])}.", ""]
    rows = result.get("goals", [])
    if rows:
        lines += ["| goal | measured | must | aim | |", "|---|---|---|---|---|"]
        for row in rows:
            state = _STATES[row["state"]]
            what, measured = row["what"], _times(row["measured"])
            lines.append(f"| {what} | {measured} | {_wanted(row, 'must')} | {_wanted(row, 'aim')} | {state} |")
        lines.append("")
    if table := families_table(result):
        lines += [_families_title(result), "", "| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
        notes = _notes([case for case in result["cases"] if case not in _other_cases(result)])
        lines += ["", *([f"Skipped. {notes}", ""] if notes else [])]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in _other_cases(result):
        groups.setdefault((case["name"].split("/")[0], case["baseline"]), []).append(case)
    for (group, baseline), cases in groups.items():
        # who was skipped everywhere needs no column
        names = list(dict.fromkeys(n for case in cases for n, f in case["subjects"].items() if "skipped" not in f))
        lines += [f"`{group}`, against {baseline}:", ""]
        lines += ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for case in cases:
            cells = [_cell(case, name) for name in names]
            lines.append(f"| {case['name'].split('/', 1)[1]} | " + " | ".join(cells) + " |")
        lines.append("")
        if notes := _notes(cases):
            lines += [f"Skipped. {notes}", ""]
    left_out = result.get("left_out", {})
    cases_left = [name for name in left_out if name in result["selected"]]
    lines += [f"Not measured: {name} {reason}.\n" for name, reason in left_out.items() if name not in cases_left]
    if cases_left:
        lines += [f"Not measured, since the time did not suffice: {'; '.join(cases_left)}.", ""]
    if result["interrupted"]:
        lines += ["The run was interrupted; missing rows were not measured.", ""]
    return "\n".join(lines).rstrip()


def _cell(case: dict[str, Any], name: str) -> str:
    figures = case["subjects"].get(name)
    if figures is None:
        return ""
    if "skipped" in figures:
        return "skipped"
    spread = (figures["q3"] - figures["q1"]) / figures["median"] if figures["samples"] > 1 else 0
    spread_text = f" ± {50 * spread:.0f} %" if figures["samples"] > 1 else ""
    times = _baseline_ratio(case, name)
    ratio_text = "" if times is None or name == case["baseline"] else f"{_times(times)}, "
    return ratio_text + _amount(case, figures["median"]) + spread_text


def one_line(case: dict[str, Any]) -> str:
    """A case's figures in one line, for the terminal while others are measured."""
    parts = []
    for name, figures in case["subjects"].items():
        if "skipped" in figures:
            if name != "roofline":
                parts.append(f"{name}: {'FAILED' if figures.get('failed') else 'not measured'}: {figures['skipped']}")
            continue
        times = None if name == case["baseline"] else _baseline_ratio(case, name)
        parts.append(f"{name} {_amount(case, figures['median'])}" + ("" if times is None else f" ({_times(times)})"))
    return "; ".join(parts)


def failures(result: Result, quantity: str | None = None) -> list[str]:
    """A line for each subject, of all cases or those of one quantity, that should have run, or does not agree."""
    return [
        f"failed: {name} ({case['name']}): {figures['skipped']}"
        for case in result["cases"]
        if quantity in (None, case["quantity"])
        for name, figures in case["subjects"].items()
        if figures.get("failed")
    ]


def update_markdown(path: Path, result: Result) -> None:
    """Replace what stands between `<!-- bench:DEVICE -->` and the next `<!-- /bench -->`; a new file gets just that.

    With --deploy, "deploy" stands in place of the device.

    Raises:
        ValueError: the file is there, but these marks are not.
    """
    what = "deploy" if result["options"].get("deploy") else result["machine"]["device"]
    replace_region(path, f"<!-- bench:{what} -->", "<!-- /bench -->", markdown(result))

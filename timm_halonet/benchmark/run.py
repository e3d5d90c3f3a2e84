"""`timm-halonet bench`: speed and memory compared with timm's and other peers'.

One run measures all subjects of a case in turns, so that what else the machine does falls on all of them alike, and
reports medians and quartiles. `cases.py` has the cases, `report.py` the goals and the tables.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.files import whole_file
from ..report.machine import machine
from ..report.plots import check_output, save
from ..report.progress import progress_bar, say
from . import report
from .timing import CudaSeconds, cpu_seconds, difference, interleave, time_limit

if TYPE_CHECKING:
    from .cases import Case, Config, Step, Subject

DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_SECONDS = 0.005  # a sample on the CPU repeats a shorter step up to this
MAX_ROUNDS = 200


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory next to timm's and other attention code",
        epilog="Example: timm-halonet bench --quick --only small",
    )
    add_arguments(bench)
    bench.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: the first two"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="cases whose name has or matches this: layer, 'small/4x4*'"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--families",
        nargs="*",
        metavar="NAME",
        help="measure only this: one table of all families next to timm's ResNets and Swin, or of the models named",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="of --families (default 8, on a GPU 64)")
    parser.add_argument("--img-size", type=positive, default=224, metavar="PX", help="of --families (default 224)")
    parser.add_argument("--plot", metavar="PICTURE", help="of --families: images/s over parameters, as a picture")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also everything under torch.compile (default: on a GPU; on a CPU much of it takes minutes or fails)",
    )
    parser.add_argument(
        "--compile-limit", type=positive, default=120, metavar="S", help="seconds for one (default 120)"
    )
    parser.add_argument("--channels-last", action="store_true", help="models and images in channels_last")
    parser.add_argument(
        "--check", metavar="GOALS", help="a JSON file of goals: print how they stand, exit with 1 where one is missed"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured; also kept up to date on the way")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        help="write tables between <!-- bench:cpu --> (or cuda) and <!-- /bench --> in it, or a new file",
    )
    parser.add_argument(
        "--report", nargs="+", metavar="JSON", help="measure nothing: report what these runs, joined, measured"
    )
    parser.add_argument("--memory-worker", nargs=2, metavar=("CASE", "SUBJECT"), help=argparse.SUPPRESS)


def positive(text: str) -> int:
    """A whole number from 1 up, as a type for argparse.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """The command: 0, 1 where --check finds a goal missed, 130 after Ctrl-C (with all output of what was measured).

    Raises:
        ValueError: arguments that select nothing or ask for a device that is not there; files that do not fit.
    """
    goals = report.load_goals(args.check) if args.check else ()
    if args.report:
        return _finish(report.load(args.report), args, goals)
    import torch

    from . import cases as single
    from . import families
    from .cases import Config, dtype_name
    from .memory import worker

    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(args.dtype))
    compiling = device == "cuda" if args.compile is None else args.compile
    config = Config(device, dtypes, compiling, args.channels_last, args.quick)
    if args.families is not None:
        batch = args.batch_size or (64 if device == "cuda" else 8)
        names = tuple(dict.fromkeys(args.families)) or families.MODELS
        config = replace(config, compile=False, families=names, batch=batch, size=args.img_size)
    elif args.batch_size or args.plot:
        raise ValueError("--batch-size and --plot belong to --families")
    cases = (families if config.families else single).build_cases(config)
    if args.memory_worker:
        return worker(cases, device, *args.memory_worker)
    chosen = select(cases, args.only)
    if args.list:
        for case in chosen:
            print(f"{case.name}  ({', '.join(subject.name for subject in case.subjects)})")
        return 0
    if args.plot:
        check_output(args.plot)
    for file in (args.json, args.markdown, args.plot):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"cannot write {file}: there is no folder {Path(file).absolute().parent}")
    result: report.Result = {
        "machine": machine(device),
        "options": {
            "quick": args.quick,
            "compile": config.compile,
            "channels_last": args.channels_last,
            "dtypes": [dtype_name(dtype) for dtype in dtypes],
            "rounds": _rounds(config),
            **({"img_size": config.size} if config.families else {}),
        },
        "selected": [case.name for case in chosen],
        "interrupted": False,
        "cases": [],
    }
    load = result["machine"]["load"]
    if load is not None and load > 0.5 * (os.cpu_count() or 1):
        progress(f"load average {load:.1f}: other programs are running, and the spread will show it")
    measure_all(chosen, config, args, result)
    return _finish(result, args, goals)


def choose_device(wanted: str) -> str:
    """The device that is measured, cpu or cuda; "auto" means cuda where PyTorch finds a GPU.

    Raises:
        ValueError: cuda is asked for, and PyTorch finds no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU here; leave it out, or say cpu")
    return wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def select(cases: Sequence["Case"], patterns: Sequence[str] | None) -> list["Case"]:
    """The cases whose names contain or match one of the patterns; all without patterns."""
    if not patterns:
        return list(cases)
    for pattern in patterns:
        if not any(pattern in case.name or fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"--only {pattern}: no such case; there are {', '.join(case.name for case in cases)}")
    return [c for c in cases if any(pattern in c.name or fnmatchcase(c.name, pattern) for pattern in patterns)]


def _finish(result: report.Result, args: argparse.Namespace, goals: Sequence[report.Target]) -> int:
    result["goals"] = report.verdicts(result, goals)
    if args.json:
        _write_json(args.json, result)
    if args.markdown:
        report.update_markdown(Path(args.markdown), result)
    print(report.text(result), flush=True)
    if args.plot:
        from .families import draw

        save(draw(result), args.plot)
    if result["interrupted"]:
        return 130
    if not args.check:
        return 0
    lines = report.missed(result["goals"])
    if not result["goals"]:
        lines = [f"--check: no goal for these cases on {result['machine']['device']}"]
    print("\n".join(["", *lines] if lines else ["", "check: every goal that must be met is met"]))
    return 1 if lines else 0


def _write_json(file: str, result: report.Result) -> None:
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def progress(line: str) -> None:
    """Print a line on standard error at once; results go to standard output."""
    say(line, sys.stderr)


# ---- measuring --------------------------------------------------------------------------------------------------


def _rounds(config: "Config") -> int:
    return 2 if config.quick else 3


def prepare(subject: "Subject", case: "Case", wanted: Any, compile_limit: float) -> tuple["Step", Any, float | None]:
    """A subject's step, what it returned first, and its difference from what is wanted; called once more to warm up.

    Raises:
        cases.Skip: it cannot run, does not compile in time or does not agree.
    """
    from .cases import Skip

    limit = time_limit(compile_limit, "compilation") if subject.compiled else contextlib.nullcontext()
    try:
        with limit:
            step = subject.build(case.batch)
            start = time.perf_counter()
            first = step()
    except Skip:
        raise
    except Exception as e:  # a reason, whatever it was: the others go on
        raise Skip(f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:200]}") from e
    error = None
    if wanted is not None and subject.same:
        error = difference(first, wanted)
        if error > case.tolerance:
            raise Skip(f"differs from {case.baseline} by {error:.1e} of the largest value, allowed {case.tolerance:g}")
    if time.perf_counter() - start < 2 or subject.compiled:  # the slow ones have nothing to warm up
        step()
    return step, first, error


def measure(
    case: "Case", config: "Config", compile_limit: float, clock: Callable[[Callable, int], float]
) -> tuple[dict, bool]:
    """The case's part of the result, and whether Ctrl-C cut it short."""
    from .cases import Skip
    from .roofline import PEAKS

    subjects: dict[str, dict[str, Any]] = {}
    timers: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {subject.name: [] for subject in case.subjects}
    wanted, interrupted = None, False
    try:
        for subject in case.subjects:
            try:
                step, first, error = prepare(subject, case, wanted, compile_limit)
            except Skip as e:
                subjects[subject.name] = {"skipped": str(e)}
                continue
            wanted = first if subject.name == case.baseline else wanted
            repeat = max(1, math.ceil(SAMPLE_SECONDS / clock(step, 1))) if config.device == "cpu" else 1
            timers[subject.name] = lambda step=step, repeat=repeat: clock(step, repeat)  # type: ignore[misc]
            subjects[subject.name] = {"difference": error}
        wanted = None
        gc.collect()
        gc.disable()
        interleave(timers, case.seconds, _rounds(config), samples)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        gc.enable()
    for name in list(subjects):
        if samples[name]:
            subjects[name].update(report.summary(samples[name]))
        elif "skipped" not in subjects[name]:
            del subjects[name]  # interrupted before its first sample
    if case.bound is not None:
        subjects["roofline"] = {**report.summary([case.bound]), "samples": 0}
    elif case.name.startswith("op/"):
        subjects["roofline"] = {"skipped": f"worked out for 16-bit tensors on {', '.join(PEAKS)} only"}
    return {"subjects": subjects}, interrupted


def measure_all(cases: Sequence["Case"], config: "Config", args: argparse.Namespace, result: report.Result) -> None:
    """Fills `result["cases"]`, writing the JSON file after each; stops at Ctrl-C."""
    import torch

    from .families import COUNTS, count
    from .memory import measure_memory

    clock = CudaSeconds() if config.device == "cuda" else cpu_seconds
    seconds = [case.seconds + 15 * sum(subject.compiled for subject in case.subjects) for case in cases]  # a guess
    start, done = time.perf_counter(), 0.0
    for i, case in enumerate(progress_bar(cases, unit="case")):
        spent = time.perf_counter() - start
        left = sum(seconds[i:]) * (max(1.0, spent / done) if done else 1.5)  # setting up takes time too
        progress(f"[{i + 1}/{len(cases)}] {case.name}, about {left / 60:.1f} minutes left")
        if case.quantity == "memory":
            part, interrupted = measure_memory(case, config, result["machine"]["threads"])
        elif case.quantity in COUNTS:
            part, interrupted = count(case, config), False
        else:
            part, interrupted = measure(case, config, args.compile_limit, clock)
        done += seconds[i]
        entry = dict(name=case.name, batch=case.batch, quantity=case.quantity, baseline=case.baseline)
        result["cases"].append({**entry, **part})
        result["interrupted"] = interrupted
        if args.json:
            _write_json(args.json, result)
        if config.compile:
            torch.compiler.reset()  # here: while the case ran it would have undone the others' compilation
        if config.device == "cuda":
            torch.cuda.empty_cache()
        if interrupted:
            progress("interrupted")
            return

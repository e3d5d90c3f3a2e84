"""`timm-halonet bench`: speed and memory compared with timm's and other peers'.

One run measures all subjects of a case in turns, so that what else the machine does falls on all of them alike, and
reports medians and quartiles. `cases.py` has the cases, `report.py` the goals and the tables.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.machine import machine
from ..report.plots import check_output, save
from ..report.progress import progress_bar
from . import report
from .measuring import measure, progress, rounds, select, write_json
from .supervise import Supervisor
from .timing import CudaSeconds, cpu_seconds, processor_seconds

if TYPE_CHECKING:
    from .case import Case, Config

DTYPES = ("float32", "bfloat16", "float16")
DRY_MINUTES = 60
SIZE = 224  # pixels, of --families
COMPILE_LIMIT = 120  # seconds


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
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=positive,
        metavar="N",
        help="of --families (default 8, on a GPU 64), --deploy (default 1 and 8)",
    )
    parser.add_argument(
        "--img-size", "--size", type=positive, metavar="PX", help="of --families (default 224), --deploy (default 256)"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="of --families: images/s over parameters, as a picture")
    parser.add_argument(
        "--deploy",
        action="store_true",
        help="measure only this: exported models in ONNX Runtime, OpenVINO and AOTInductor, next to eager PyTorch and"
        " torch.compile, on the CPU (default: with 2 threads)",
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="of --deploy; the first is what others are compared with"
    )
    parser.add_argument("--opset", type=positive, metavar="N", help="of --deploy: of ONNX (default: the exporter's)")
    parser.add_argument(
        "--files",
        metavar="FOLDER",
        help="of --deploy: keep the exported models here, and take those that are here already if they are of the same"
        " model, size, threads, processor, versions and source",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="of --deploy: only export into --files, to measure later, on an idle machine, with the same options",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on the CPU: processor time of all threads in place of the clock's, where other programs run",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also everything under torch.compile (default: on a GPU; on a CPU much of it takes minutes or fails)",
    )
    parser.add_argument(
        "--compile-limit",
        type=positive,
        metavar="S",
        help="seconds for one compilation or export (default 120, with --deploy 1800)",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="N",
        help="on a GPU: the kernels' results, then the op, models, memory and compiled peers at batch 128, as far as"
        " they fit into N minutes; a crash or a hang loses nothing but its own case",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="walk the plan of --minutes, or --deploy, on the CPU with tiny sizes; 1 if it fails",
    )
    parser.add_argument("--channels-last", action="store_true", help="models and images in channels_last")
    parser.add_argument(
        "--check", metavar="GOALS", help="a JSON file of goals: print how they stand, exit with 1 where one is missed"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured; also kept up to date on the way")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        help="write tables between <!-- bench:cpu --> (or cuda, deploy) and <!-- /bench --> in it, or a new file",
    )
    parser.add_argument(
        "--report", nargs="+", metavar="JSON", help="measure nothing: report what these runs, joined, measured"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-worker", nargs=2, metavar=("CASE", "SUBJECT"), help=argparse.SUPPRESS)


def positive(text: str) -> int:
    """A whole number from 1 up, as a type for argparse.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    """A number above 0, as a type for argparse.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    with contextlib.suppress(ValueError):
        if 0 < (minutes := float(text)) < math.inf:
            return minutes
    raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")


def run(args: argparse.Namespace) -> int:
    """The command: 0, 1 where --check finds a goal missed, 130 after Ctrl-C (with all output of what was measured).

    Raises:
        ValueError: arguments that select nothing or ask for a device that is not there; files that do not fit.
    """
    goals = report.load_goals(args.check) if args.check else ()
    if args.report:
        return _finish(report.load(args.report), args, goals)
    if args.deploy:
        from . import deploy

        _check_files(args)
        return deploy.run(args, lambda result: _finish(result, args, goals))
    for name in ("models", "opset", "files", "export_only"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} belongs to --deploy")
    import torch

    from . import cases as single
    from . import families, minutes
    from .case import Config, dtype_name
    from .memory import worker

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.minutes or args.dry_run:
        if args.cpu_time:
            raise ValueError("--cpu-time does not go with --minutes or --dry-run, unless --deploy is there")
        return _run_minutes(minutes.build_cases, args, goals)
    device = choose_device("cpu" if args.cpu_time and args.device == "auto" else args.device)
    if args.cpu_time and device != "cpu":
        raise ValueError("--cpu-time is for the CPU: leave out --device")
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(args.dtype))
    compiling = device == "cuda" if args.compile is None else args.compile
    config = Config(device, dtypes, compiling, args.channels_last, args.quick)
    if args.families is not None:
        if args.batch_size and len(args.batch_size) > 1:
            raise ValueError(f"--families takes one --batch-size, got {' '.join(map(str, args.batch_size))}")
        batch = args.batch_size[0] if args.batch_size else 64 if device == "cuda" else 8
        names = tuple(dict.fromkeys(args.families)) or families.MODELS
        config = replace(config, compile=False, families=names, batch=batch, size=args.img_size or SIZE)
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
    _check_files(args)
    result: report.Result = {
        "machine": machine(device),
        "options": {
            "quick": args.quick,
            "compile": config.compile,
            "channels_last": args.channels_last,
            "dtypes": [dtype_name(dtype) for dtype in dtypes],
            "rounds": rounds(config),
            "clock": "processor time" if args.cpu_time else "wall clock",
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


def _check_files(args: argparse.Namespace) -> None:
    for file in (args.json, args.markdown, args.plot):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"cannot write {file}: there is no folder {Path(file).absolute().parent}")


def _run_minutes(
    build_cases: Callable[["Config"], list["Case"]], args: argparse.Namespace, goals: Sequence[report.Target]
) -> int:
    """The command with --minutes or --dry-run, or a process of its own for that."""
    from .case import Config

    dry = args.dry_run
    for name in ("families", "batch_size", "plot", "quick"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --minutes or --dry-run")
    device = "cpu" if dry else choose_device("cuda" if args.device == "auto" else args.device)
    if device == "cpu" and not dry:
        raise ValueError("--minutes is for a GPU; --dry-run walks the same on the CPU")
    config = Config(device, tiny=dry)
    cases = build_cases(config)
    if args.worker:
        from .worker import serve

        return serve(cases, config, args.compile_limit or COMPILE_LIMIT)
    chosen = select(cases, args.only)
    if args.list:
        for case in chosen:
            print(f"{case.name}  ({', '.join(subject.name for subject in case.subjects)})")
        return 0
    _check_files(args)
    result: report.Result = {
        "machine": machine(device),
        "options": {"minutes": args.minutes, "dry_run": dry, "channels_last": True, "dtypes": ["bfloat16"]},
        "selected": [case.name for case in chosen],
        "interrupted": False,
        "cases": [],
    }
    command = [sys.executable, "-m", "timm_halonet.benchmark", "--worker"]
    command += ["--compile-limit", str(args.compile_limit or COMPILE_LIMIT)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--dry-run"] if dry else ["--minutes", str(args.minutes), "--device", device]
    Supervisor(chosen, args.minutes or DRY_MINUTES, command, result, args.json, dry).run()
    code = _finish(result, args, goals)
    failed, wrong = report.failures(result), report.failures(result, "errors")
    if failed:
        print("\n".join(["", *failed]))
    return code or int(bool(wrong or (dry and (failed or result["left_out"]))))


def choose_device(wanted: str) -> str:
    """The device that is measured, cpu or cuda; "auto" means cuda where PyTorch finds a GPU.

    Raises:
        ValueError: cuda is asked for, and PyTorch finds no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU here; leave it out, or say cpu")
    return wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _finish(result: report.Result, args: argparse.Namespace, goals: Sequence[report.Target]) -> int:
    as_on = "cuda" if result["options"].get("dry_run") else result["machine"]["device"]
    result["goals"] = report.verdicts(result, goals, as_on)
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        report.update_markdown(Path(args.markdown), result)
    print(report.text(result), flush=True)
    if args.plot:
        from .families import draw

        save(draw(result), args.plot)
    if result["interrupted"]:
        return 130
    if not args.check or result["options"].get("dry_run"):
        return 0
    lines = report.missed(result["goals"])
    if not result["goals"]:
        lines = [f"--check: no goal for these cases on {result['machine']['device']}"]
    print("\n".join(["", *lines] if lines else ["", "check: every goal that must be met is met"]))
    return 1 if lines else 0


# ---- measuring --------------------------------------------------------------------------------------------------


def measure_all(cases: Sequence["Case"], config: "Config", args: argparse.Namespace, result: report.Result) -> None:
    """Fills `result["cases"]`, writing the JSON file after each; stops at Ctrl-C."""
    import torch

    from .families import COUNTS, count
    from .memory import measure_memory

    clock = CudaSeconds() if config.device == "cuda" else processor_seconds if args.cpu_time else cpu_seconds
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
            part, interrupted = measure(case, config, args.compile_limit or COMPILE_LIMIT, clock)
        done += seconds[i]
        entry = dict(name=case.name, batch=case.batch, quantity=case.quantity, baseline=case.baseline)
        result["cases"].append({**entry, **part})
        result["interrupted"] = interrupted
        if args.json:
            write_json(args.json, result)
        if config.compile:
            torch.compiler.reset()  # here: while the case ran it would have undone the others' compilation
        if config.device == "cuda":
            torch.cuda.empty_cache()
        if interrupted:
            progress("interrupted")
            return

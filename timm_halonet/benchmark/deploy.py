"""`timm-halonet bench --deploy`: models in the engines that people deploy with, next to resnet26t in the same engine.

Each engine has its cases: the seconds to export a model, the size of its file, the largest difference from eager
PyTorch, then the latency and the peak memory of each batch size. Last come inference and training with and without
torch.compile, in turns. A model is exported once, into the folder --files or
one of the run, see `exports.py`; with --export-only, nothing is measured but that.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..report.machine import machine
from . import report
from .case import Case, Config, Failed, Skip, Step, Subject, dtype_name
from .cases import accelerated, create, model_step, timm_h1
from .engines import ENGINES, Engine, check_opset, import_engine, missing
from .exports import Exports
from .measuring import progress, select
from .memory import peak_growth, printed_bytes
from .supervise import Supervisor
from .timing import difference

DISTRIBUTIONS = ("onnx", "onnxscript", "onnxruntime", "openvino")
THREADS = 2
BATCHES = (1, 8)
SIZE, TINY_SIZE = 256, 64  # pixels
SECONDS = 20.0  # of samples in turns, a case
COMPILE_SECONDS = 120.0  # the same, with and without torch.compile
MINUTES = 600
LIMIT = 1800  # seconds that an export or a compilation may take
TOLERANCE = 1e-4  # largest difference from eager PyTorch, as a part of the largest logit
# resnet26t first, which the others are compared with
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet26t": functools.partial(create, "resnet26t"),
    "halonet_h1": functools.partial(create, "halonet_h1"),
    "halonet_h0": functools.partial(create, "halonet_h0"),
    "uhalonet_tiny": functools.partial(timm.create_model, "uhalonet_tiny"),
    "halonet50ts accelerated": functools.partial(accelerated, "halonet50ts"),
    "resnet50": functools.partial(create, "resnet50"),
    "timm halonet_h1": timm_h1,
}
# with and without torch.compile, unless models are named
COMPILED = ("resnet26t", "halonet_h1", "halonet_h0")
# in place of them in a dry run; shallow ones
TINY_MODELS: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(timm.create_model, name, zero_init_last=False, **{option: (1, 1, 1, 1)})
    for name, option in (("resnet26t", "layers"), ("halonet_h0", "depths"))
}


def models(config: Config) -> dict[str, Callable[[], nn.Module]]:
    """Name -> how to make it; `config.families` chooses among them, and may name other models of timm.

    Raises:
        ValueError: a name that timm does not know.
    """
    known = TINY_MODELS if config.tiny else MODELS
    for name in config.families:
        if name not in known and not timm.is_model(name):
            raise ValueError(f"--models {name}: timm knows no such model, and it is none of {', '.join(known)}")
    if not config.families:
        return known
    return {name: known.get(name, functools.partial(timm.create_model, name)) for name in config.families}


def build_cases(config: Config, exports: Exports, batches: Sequence[int]) -> list[Case]:
    """All cases, one engine after the other; of each batch size in turn."""
    makes, cases = models(config), []
    baseline = next(iter(makes))
    for i, batch in enumerate(batches):
        for engine in ENGINES:
            quantities: dict[str, Callable[..., Step]] = {}
            if engine.export is not None and (i == 0 or not engine.dynamic):
                quantities |= {"export": _seconds, "file": _bytes}
            compiles = engine.export is None and engine.name != "eager"  # at each load, which takes minutes
            if engine.name != "eager" and not (compiles and i):
                quantities["difference"] = _difference
            quantities["latency"] = _latency
            if not compiles:  # the peak would be the compiler's
                quantities["peak"] = _peak
            for quantity, build in quantities.items():
                subjects = tuple(
                    Subject(name, functools.partial(build, exports, engine, name, make), False)
                    for name, make in makes.items()
                )
                seconds = (0 if config.tiny else SECONDS) if quantity == "latency" else 0
                name = f"{quantity}/{engine.name}, batch {batch}"
                cases.append(Case(name, subjects, baseline, seconds, batch=batch, quantity=quantity, setup=1))
    return cases + compile_cases(config, exports.size, batches[-1])


def compile_cases(config: Config, size: int, batch: int) -> list[Case]:
    """Inference and a step of SGD, eager and under torch.compile, in turns; in channels_last, in each dtype."""
    config = replace(config, channels_last=True)
    names = [name for name in models(config) if config.families or config.tiny or name in COMPILED]
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("inference", "training"):
            subjects = [
                Subject(
                    name + " compiled" * compiled,
                    functools.partial(
                        model_step, models(config)[name], config, dtype, mode == "training", size, compiled
                    ),
                    False,
                    compiled,
                )
                for name in names
                for compiled in (False, True)
            ]
            name, seconds = f"compile/{mode}, {dtype_name(dtype)}, batch {batch}", 0 if config.tiny else COMPILE_SECONDS
            cases.append(Case(name, tuple(subjects), names[0], seconds, batch=batch, quantity="latency"))
    return cases


def _latency(exports: Exports, engine: Engine, name: str, make: Any, batch: int) -> Step:
    return exports.loaded(engine, name, make, batch)


def _value(value: float) -> Step:
    return lambda: (torch.tensor(value, dtype=torch.float64),)


def _seconds(exports: Exports, engine: Engine, name: str, make: Any, batch: int) -> Step:
    return _value(exports.file(engine, name, make, batch)[1])


def _bytes(exports: Exports, engine: Engine, name: str, make: Any, batch: int) -> Step:
    file, _ = exports.file(engine, name, make, batch)
    return _value(sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*") if part.suffix != ".json"))


def _difference(exports: Exports, engine: Engine, name: str, make: Any, batch: int) -> Step:
    step = exports.loaded(engine, name, make, batch)
    with torch.inference_mode():
        wanted = (exports.model(make)(exports.images(batch)),)
    # thrice: an engine that reads memory which it has not written is not wrong each time
    worst = max(difference(step(), wanted) for _ in range(3))
    if not worst < TOLERANCE:
        raise Failed(f"differs from eager by {worst:.1e} of the largest logit, allowed {TOLERANCE:g}")
    return _value(worst)


def _peak(exports: Exports, engine: Engine, name: str, make: Any, batch: int) -> Step:
    if engine.export is not None:
        exports.file(engine, name, make, batch)  # before, and not in the process that is measured
    command = [*_command(exports, (batch,), (name,)), "--memory-worker", engine.name, name]
    return _value(printed_bytes(command))


def memory_worker(exports: Exports, engine_name: str, make: Callable[[], nn.Module], name: str, batch: int) -> int:
    """Prints as JSON by how much this process, which is its own, grows while it loads a model and runs it twice."""
    engine = next(x for x in ENGINES if x.name == engine_name)
    import_engine(engine)

    def load_and_run() -> None:
        step = exports.loaded(engine, name, make, batch)
        step()
        step()

    try:
        answer: dict[str, Any] = {"bytes": peak_growth(load_and_run)}
    except Skip as e:
        answer = {"skipped": str(e)}
    print(json.dumps(answer))
    return 0


def _command(exports: Exports, batches: Sequence[int], names: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "timm_halonet.benchmark", "--deploy", "--files", str(exports.folder)]
    command += ["--threads", str(exports.threads), "--size", str(exports.size)]
    command += ["--models", *names] if names else []
    command += ["--batch-size", *map(str, batches)]
    command += ["--opset", str(exports.opset)] if exports.opset else []
    return command + ["--dry-run"] * exports.tiny


def run(args: argparse.Namespace, finish: Callable[[report.Result], int]) -> int:
    """The command with --deploy, or a process of its own for that.

    Raises:
        ValueError: arguments that select nothing, an opset that is too old.
    """
    check_opset(args.opset)
    if args.export_only and not args.files:
        raise ValueError("--export-only needs --files FOLDER, where the exported models are kept")
    if args.device == "cuda":
        raise ValueError("--deploy measures engines on the CPU: leave out --device")
    for name in ("families", "plot", "quick", "channels_last", "compile"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --deploy")
    torch.set_num_threads(args.threads or THREADS)
    dry = args.dry_run
    config = Config("cpu", (torch.float32,), families=tuple(dict.fromkeys(args.models or ())), tiny=dry)
    batches = tuple(dict.fromkeys(args.batch_size or (BATCHES[:1] if dry else BATCHES)))
    size = args.img_size or (TINY_SIZE if dry else SIZE)
    with _folder(args.files) as folder:
        clock = time.process_time if args.cpu_time else time.perf_counter
        exports = Exports(Path(folder), size, args.opset, args.threads or THREADS, dry, clock)
        if args.memory_worker:
            engine_name, name = args.memory_worker
            return memory_worker(exports, engine_name, models(config)[name], name, batches[0])
        cases = build_cases(config, exports, batches)
        if args.worker:
            from .worker import serve

            return serve(cases, config, args.compile_limit or LIMIT, args.cpu_time)
        if args.export_only:
            cases = [case for case in cases if case.quantity in ("export", "file")]
        chosen = select(cases, args.only)
        if args.list:
            for case in chosen:
                print(f"{case.name}  ({', '.join(subject.name for subject in case.subjects)})")
            return 0
        exports.folder.mkdir(parents=True, exist_ok=True)
        result: report.Result = {
            "machine": machine("cpu", DISTRIBUTIONS),
            "options": {"deploy": True, "dry_run": dry, "img_size": size, "opset": args.opset}
            | {"clock": "processor time" if args.cpu_time else "wall clock"},
            "selected": [case.name for case in chosen],
            "interrupted": False,
            "cases": [],
            "left_out": {},
        }
        for engine in ENGINES:
            reason = missing(engine)
            if reason and any(_is_of(case, engine) for case in chosen):
                progress(f"{engine.name}: not measured: {reason}")
                result["left_out"][engine.name] = reason
                chosen = [case for case in chosen if not _is_of(case, engine)]
        if args.files:
            _say_what_is_there(exports, chosen, config)
        command = _command(exports, batches, config.families)
        command += ["--worker", *["--cpu-time"] * args.cpu_time]
        command += ["--compile-limit", str(args.compile_limit)] if args.compile_limit else []
        Supervisor(chosen, args.minutes or MINUTES, command, result, args.json).run()
    code = finish(result)
    failed = report.failures(result)
    return code or int(dry and bool(failed))


def _folder(kept: str | None) -> AbstractContextManager[str]:
    return nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="timm-halonet-deploy-")


def _say_what_is_there(exports: Exports, cases: Sequence[Case], config: Config) -> None:
    """One line: how many of the exports that these cases need are in the folder, and which are not."""
    needed = {
        exports.place(engine, name, case.batch)[0]: (engine, name, case.batch)
        for case in cases
        for engine in ENGINES
        if engine.export is not None and _is_of(case, engine)
        for name in models(config)
    }
    there = [exports.has(*what) for what in needed.values()]
    line = f"{sum(there)} of {len(there)} exports are in {exports.folder}"
    left = [
        f"{engine.name} {name}" + ("" if engine.dynamic else f" batch {batch}")
        for found, (engine, name, batch) in zip(there, needed.values(), strict=True)
        if not found
    ]
    progress(line + (f"; to be made with these versions, options and models: {', '.join(left)}" if left else ""))


def _is_of(case: Case, engine: Engine) -> bool:
    return f"/{engine.name}, batch" in case.name

"""`timm-halonet bench --deploy`: models in the engines that people deploy with, next to resnet26t in the same engine.

Each engine has its cases: the seconds to export a model, the size of its file, the largest difference from eager
PyTorch, then the latency and the peak memory of each batch size. A model is exported once, into a folder of the run;
what happened is written next to its file, so that an export that fails or ends the process is not tried again.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..report.machine import machine
from . import report
from .cases import Case, Config, Failed, Skip, Step, Subject, accelerated, create, timm_h1
from .engines import ENGINES, Engine, check_opset, export, import_engine, missing
from .measuring import progress, reason_of, select
from .memory import peak_growth, printed_bytes
from .supervise import Supervisor
from .timing import difference

DISTRIBUTIONS = ("onnx", "onnxscript", "onnxruntime", "openvino")
THREADS = 2
BATCHES = (1, 8)
SIZE, TINY_SIZE = 256, 64  # pixels
SECONDS = 20.0  # of samples in turns, a case
MINUTES = 600
LIMIT = 1800  # seconds that an export or a compilation may take
TOLERANCE = 1e-4  # largest difference from eager PyTorch, as a part of the largest logit
# resnet26t first, which the others are compared with
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet26t": functools.partial(create, "resnet26t"),
    "halonet_h1": functools.partial(create, "halonet_h1"),
    "halonet_h0": functools.partial(create, "halonet_h0"),
    "uhalonet_tiny": functools.partial(create, "uhalonet_tiny"),
    "halonet50ts accelerated": functools.partial(accelerated, "halonet50ts"),
    "resnet50": functools.partial(create, "resnet50"),
    "timm halonet_h1": timm_h1,
    "timm halonet50ts": functools.partial(create, "halonet50ts"),
}
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


class Exports:
    """The models of a run and their files.

    Args:
        folder: for the files.
        size: height and width of images, pixels.
        opset: of ONNX, None for the exporter's choice.
        threads: of the CPU.
        tiny: whether torch.compile is left out.
        clock: of the seconds that exports take.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        opset: int | None,
        threads: int,
        tiny: bool,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.folder, self.size, self.opset, self.threads, self.tiny = folder, size, opset, threads, tiny
        self.clock = clock

    def images(self, batch: int) -> torch.Tensor:
        """(batch, 3, size, size) noise, always the same."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def model(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The model in evaluation mode with random weights, always the same."""
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

    def file(self, engine: Engine, name: str, make: Callable[[], nn.Module], batch: int) -> tuple[Path, float]:
        """The engine's file for this batch and the seconds that its export took; exported where it is not there yet.

        Raises:
            cases.Failed: it cannot be exported, now or in an earlier try.
        """
        stem = f"{engine.name}-{name}" + ("" if engine.dynamic else f"-{batch}")
        stem = "".join(c if c.isalnum() else "-" for c in stem)
        file, note = self.folder / (stem + engine.suffix), self.folder / f"{stem}.json"
        if not note.exists():
            note.write_text(json.dumps({"failed": "its export ended the process in an earlier try"}))
            try:
                model = self.model(make)
                start = self.clock()
                export(engine, model, self.images(batch), file, self.opset)
                note.write_text(json.dumps({"seconds": self.clock() - start}))
            except Exception as e:
                note.write_text(json.dumps({"failed": f"cannot be exported: {reason_of(e)}"}))
        found = json.loads(note.read_text())
        if "failed" in found:
            raise Failed(found["failed"])
        return file, found["seconds"]

    def loaded(self, engine: Engine, name: str, make: Callable[[], nn.Module], batch: int) -> Callable[[], Any]:
        """Loads the model into the engine and returns a call with images of this batch."""
        if engine.export is not None:
            source: Any = self.file(engine, name, make, batch)[0]
        elif engine.name != "eager" and self.tiny:
            raise Skip("left out of a dry run")
        else:
            source = self.model(make)
        run, images = engine.load(source, self.threads), self.images(batch)

        def step() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode():
                return (run(images),)

        return step


def build_cases(config: Config, exports: Exports, batches: Sequence[int]) -> list[Case]:
    """All cases, one engine after the other; of each batch size in turn."""
    makes, cases = models(config), []
    baseline = next(iter(makes))
    for i, batch in enumerate(batches):
        for engine in ENGINES:
            quantities: dict[str, Callable[..., Step]] = {}
            if engine.export is not None and (i == 0 or not engine.dynamic):
                quantities |= {"export": _seconds, "file": _bytes}
            if engine.name != "eager":
                quantities["difference"] = _difference
            quantities |= {"latency": _latency, "peak": _peak}
            for quantity, build in quantities.items():
                subjects = tuple(
                    Subject(name, functools.partial(build, exports, engine, name, make), False)
                    for name, make in makes.items()
                )
                seconds = (0 if config.tiny else SECONDS) if quantity == "latency" else 0
                name = f"{quantity}/{engine.name}, batch {batch}"
                cases.append(Case(name, subjects, baseline, seconds, batch=batch, quantity=quantity, setup=1))
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
    command = [*_command(exports, batch, (name,)), "--memory-worker", engine.name, name]
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


def _command(exports: Exports, batch: int | None, names: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "timm_halonet.benchmark", "--deploy", "--folder", str(exports.folder)]
    command += ["--threads", str(exports.threads), "--size", str(exports.size), "--models", *names]
    command += ["--batch-size", str(batch)] if batch else []
    command += ["--opset", str(exports.opset)] if exports.opset else []
    return command + ["--dry-run"] * exports.tiny


def run(args: argparse.Namespace, finish: Callable[[report.Result], int]) -> int:
    """The command with --deploy, or a process of its own for that.

    Raises:
        ValueError: arguments that select nothing, an opset that is too old.
    """
    check_opset(args.opset)
    if args.device == "cuda":
        raise ValueError("--deploy measures engines on the CPU: leave out --device")
    for name in ("families", "plot", "quick", "channels_last", "compile"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --deploy")
    torch.set_num_threads(args.threads or THREADS)
    dry = args.dry_run
    config = Config("cpu", (torch.float32,), families=tuple(dict.fromkeys(args.models or ())), tiny=dry)
    batches = (args.batch_size,) if args.batch_size else BATCHES[:1] if dry else BATCHES
    size = args.img_size or (TINY_SIZE if dry else SIZE)
    with tempfile.TemporaryDirectory(prefix="timm-halonet-deploy-") as temporary:
        folder, clock = Path(args.folder or temporary), time.process_time if args.cpu_time else time.perf_counter
        exports = Exports(folder, size, args.opset, args.threads or THREADS, dry, clock)
        if args.memory_worker:
            engine_name, name = args.memory_worker
            return memory_worker(exports, engine_name, models(config)[name], name, batches[0])
        cases = build_cases(config, exports, batches)
        if args.worker:
            from .worker import serve

            return serve(cases, config, args.compile_limit or LIMIT, args.cpu_time)
        chosen = select(cases, args.only)
        if args.list:
            for case in chosen:
                print(f"{case.name}  ({', '.join(subject.name for subject in case.subjects)})")
            return 0
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
        command = _command(exports, args.batch_size, tuple(models(config)))
        command += ["--worker", *["--cpu-time"] * args.cpu_time]
        command += ["--compile-limit", str(args.compile_limit)] if args.compile_limit else []
        Supervisor(chosen, args.minutes or MINUTES, command, result, args.json).run()
    code = finish(result)
    failed = report.failures(result)
    return code or int(dry and bool(failed))


def _is_of(case: Case, engine: Engine) -> bool:
    return f"/{engine.name}, batch" in case.name

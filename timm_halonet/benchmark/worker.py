"""The process that measures the cases of `minutes.py` or `deploy.py`, which a crash or a hang may end.

`supervise.py` starts it.

A line of JSON on standard input is a request, {"case": name, "without": names of subjects, "seconds": ...}. Its answers
are lines of JSON on standard output: {"begin": subject, "limit": seconds or null} before each that may take long,
{"skipped": subject, "reason": ...}, and {"entry": ...}, the case's part of the result, at the end.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import report
from .case import Case, Config, Failed, Skip, Subject
from .checks import LONGEST, kernel_seconds, step_seconds
from .measuring import Watch, measure, reason_of
from .memory import peak_memory
from .timing import CudaSeconds, cpu_seconds, processor_seconds, time_limit

HIDDEN = 0.001  # seconds of Python before the first kernels of an op, which is not what is measured
TIMING = 60.0  # seconds that timing may take in addition to what it was given
SAVED = 2.0  # seconds to write down a case


class _Told(Watch):
    """Tells the other process, and stops this one where the GPU answers no more."""

    def __init__(self, case: Case, seconds: float, compile_limit: float, tell: Callable[[dict], None], device: str):
        super().__init__(compile_limit)
        self.case, self.tell, self.device = case, tell, device
        self.end = time.monotonic() + seconds - case.seconds - SAVED

    def begins(self, subject: Subject) -> float | None:
        left = max(1.0, self.end - time.monotonic())
        limit = min(left, self.compile_limit)
        self.tell({"begin": subject.name, "limit": limit})
        return limit

    def skipped(self, name: str, reason: str, stopped: bool = False) -> None:
        self.tell({"skipped": name, "reason": reason})
        if stopped:  # a compiler that is stopped half-way does wrong with the next model, or crashes
            os._exit(3)
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access, say: nothing more can be done in this process
                sys.stdout.flush()
                os._exit(3)
            torch.cuda.empty_cache()

    def times(self) -> None:
        self.tell({"begin": "", "limit": self.case.seconds + TIMING})


def serve(cases: Sequence[Case], config: Config, compile_limit: float, processor_time: bool = False) -> int:
    """Answer requests until standard input ends; on the CPU, times are the clock's or the processor's."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is not an answer
    by_name = {case.name: case for case in cases}

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=answers, flush=True)

    on_cpu = processor_seconds if processor_time else cpu_seconds
    clocks = {False: on_cpu, True: on_cpu}  # type: dict[bool, Any]
    if config.device == "cuda":
        clocks = {False: CudaSeconds(), True: CudaSeconds(HIDDEN)}
    tell({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        case = by_name[request["case"]]
        case = replace(case, subjects=tuple(x for x in case.subjects if x.name not in request["without"]))
        watch = _Told(case, request["seconds"], compile_limit, tell, config.device)
        if case.quantity in ("time", "latency"):
            part, _ = measure(case, config, compile_limit, clocks["op-" in case.name], watch)
        else:
            part = {"subjects": _one_by_one(case, config, watch)}
        tell({"entry": part})
        torch.compiler.reset()
        if config.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _one_by_one(case: Case, config: Config, watch: Watch) -> dict[str, dict[str, Any]]:
    """Name -> figures, of quantities that are not times in turns."""
    found: dict[str, dict[str, Any]] = {}
    for subject in case.subjects:
        limit = watch.begins(subject)
        try:
            with time_limit(limit or 0, "it"):
                found.update(_figures(case, subject, config.device))
        except Skip as e:
            found[subject.name] = {"skipped": str(e)} | ({"failed": True} if isinstance(e, Failed) else {})
            watch.skipped(subject.name, str(e))
        except Exception as e:
            found[subject.name] = {"skipped": reason_of(e), "failed": True}
            watch.skipped(subject.name, reason_of(e), isinstance(e, TimeoutError))
    if case.bound is not None:
        found["roofline"] = {**report.summary([case.bound]), "samples": 0}
    return found


def _figures(case: Case, subject: Subject, device: str) -> dict[str, dict[str, Any]]:
    if case.quantity == "memory":
        values = {subject.name: float(peak_memory(subject, case.batch, device))}
    elif case.quantity == "kernels":
        step = subject.build(case.batch)
        whole = step_seconds(step, device) if case.baseline == "by the clock" else {}
        kernels = kernel_seconds(step, device)
        values = {**whole, "all kernels": sum(kernels.values()), **dict(list(kernels.items())[:LONGEST])}
    else:
        (value,) = subject.build(case.batch)()
        values = {subject.name: value.item()}
    return {name: {**report.summary([value]), "difference": None} for name, value in values.items()}

"""Measuring one case: its subjects set up one after the other, then timed in turns."""

import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..files import whole_file
from ..report.progress import say
from . import report
from .timing import difference, interleave, time_limit

if TYPE_CHECKING:
    from .case import Case, Config, Step, Subject

SAMPLE_SECONDS = 0.005  # a sample on the CPU repeats a shorter step up to this


class Watch:
    """What is told about the subjects on the way; and how many seconds one may take to be set up, None for any."""

    def __init__(self, compile_limit: float):
        self.compile_limit = compile_limit

    def begins(self, subject: "Subject") -> float | None:
        """A subject is set up next: the seconds that it may take."""
        return self.compile_limit if subject.compiled else None

    def skipped(self, name: str, reason: str, stopped: bool = False) -> None:
        """A subject could not be measured; or it was stopped, which may leave a compiler in pieces."""

    def times(self) -> None:
        """All are set up and are timed from now on."""


def write_json(file: str, result: report.Result) -> None:
    """Write a result as JSON: all of the file or what was there before."""
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def select(cases: Sequence["Case"], patterns: Sequence[str] | None) -> list["Case"]:
    """The cases whose names contain or match one of the patterns; all without patterns."""
    if not patterns:
        return list(cases)
    for pattern in patterns:
        if not any(pattern in case.name or fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"--only {pattern}: no such case; there are {', '.join(case.name for case in cases)}")
    return [c for c in cases if any(pattern in c.name or fnmatchcase(c.name, pattern) for pattern in patterns)]


def progress(line: str) -> None:
    """Print a line on standard error at once; results go to standard output."""
    say(line, sys.stderr)


def rounds(config: "Config") -> int:
    """The least number of samples of a subject."""
    return 2 if config.quick else 3


def reason_of(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def prepare(subject: "Subject", case: "Case", wanted: Any, limit: float | None) -> tuple["Step", Any, float | None]:
    """A subject's step, what it returned first, and its difference from what is wanted; called once more to warm up.

    Raises:
        case.Skip: it cannot run, is not set up within `limit` seconds or does not agree.
    """
    from .case import Failed, Skip, Stopped

    what = "compilation" if subject.compiled else "setting up"
    try:
        with contextlib.nullcontext() if limit is None else time_limit(limit, what):
            step = subject.build(case.batch)
            start = time.perf_counter()
            first = step()
    except Skip:
        raise
    except TimeoutError as e:
        raise Stopped(reason_of(e)) from e
    except Exception as e:  # a reason, whatever it was: the others go on
        raise Failed(reason_of(e)) from e
    error = None
    if wanted is not None and subject.same:
        error = difference(first, wanted)
        if error > case.tolerance:
            raise Failed(
                f"differs from {case.baseline} by {error:.1e} of the largest value, allowed {case.tolerance:g}"
            )
    if time.perf_counter() - start < 2 or subject.compiled:  # the slow ones have nothing to warm up
        step()
    return step, first, error


def measure(
    case: "Case",
    config: "Config",
    compile_limit: float,
    clock: Callable[[Callable, int], float],
    watch: Watch | None = None,
) -> tuple[dict, bool]:
    """The case's part of the result, and whether Ctrl-C cut it short."""
    from .case import Failed, Skip, Stopped
    from .roofline import PEAKS

    watch = watch or Watch(compile_limit)
    subjects: dict[str, dict[str, Any]] = {}
    timers: dict[str, Callable[[], float | None]] = {}
    samples: dict[str, list[float]] = {subject.name: [] for subject in case.subjects}
    wanted, interrupted = None, False

    def sample(name: str, step: "Step", repeat: int) -> float | None:
        try:
            return clock(step, repeat)
        except Exception as e:  # out of memory, say, now that all are set up
            subjects[name] = {"skipped": f"while it was timed: {reason_of(e)}", "failed": True}
            samples[name].clear()
            watch.skipped(name, subjects[name]["skipped"])
            return None

    try:
        for subject in case.subjects:
            try:
                step, first, error = prepare(subject, case, wanted, watch.begins(subject))
            except Skip as e:
                subjects[subject.name] = {"skipped": str(e)} | ({"failed": True} if isinstance(e, Failed) else {})
                watch.skipped(subject.name, str(e), isinstance(e, Stopped))
                continue
            wanted = first if subject.name == case.baseline else wanted
            repeat = max(1, math.ceil(SAMPLE_SECONDS / clock(step, 1))) if config.device == "cpu" else 1
            timers[subject.name] = lambda x=(subject.name, step, repeat): sample(*x)  # type: ignore[misc]
            subjects[subject.name] = {"difference": error}
        wanted = None
        gc.collect()
        gc.disable()
        watch.times()
        interleave(timers, case.seconds, rounds(config), samples)
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
    elif case.name.startswith("op"):
        subjects["roofline"] = {"skipped": f"worked out for 16-bit tensors on {', '.join(PEAKS)} only"}
    return {"subjects": subjects}, interrupted

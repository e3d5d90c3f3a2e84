"""Seconds of a step on the CPU or on a GPU, of several in turns, and within a limit."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_ROUNDS = 200


def cpu_seconds(step: Callable[[], Any], repeat: int) -> float:
    """Wall-clock seconds of one of `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - start) / repeat


class CudaSeconds:
    """Seconds of one call as the GPU sees them, with its caches filled by something else before."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda
        self.other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2 cache

    def __call__(self, step: Callable[[], Any], repeat: int) -> float:
        total = 0.0
        for _ in range(repeat):
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            self.other.zero_()  # also gives the CPU time to queue the first kernels of the step
            start.record()
            step()
            end.record()
            self.cuda.synchronize()
            total += start.elapsed_time(end) / 1e3
        return total / repeat


def interleave(
    timers: dict[str, Callable[[], float]],
    seconds: float,
    rounds: int,
    samples: dict[str, list[float]],
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Call every timer once a round, each round beginning with the next one, until the time is up.

    Args:
        timers: name -> function that measures and returns one sample.
        seconds: budget; the round in which it ends is finished.
        rounds: the least number of rounds.
        samples: name -> list, which grow; so what was measured is there whatever stops this function.
    """
    names, start, i = list(timers), now(), 0
    while names and i < MAX_ROUNDS and (i < rounds or now() - start < seconds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timers[name]())
        i += 1


class _TooLong(BaseException):
    """Not an Exception: compilers catch those and go on."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """TimeoutError after so many seconds, where the system has alarms and this is the main thread; else no limit."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise TimeoutError(f"{what} did not finish in {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def difference(tensors: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Largest difference of any tensor, as a part of the largest value of the wanted one; nan counts as infinite."""
    worst = 0.0
    for a, b in zip(tensors, wanted, strict=True):
        a, b = a.double(), b.double()
        value = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        worst = max(worst, math.inf if math.isnan(value) else value)
    return worst

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


def processor_seconds(step: Callable[[], Any], repeat: int) -> float:
    """Seconds of all threads of this process on a processor, for one of `repeat` calls: what others do counts less."""
    start = time.process_time()
    for _ in range(repeat):
        step()
    return (time.process_time() - start) / repeat


class CudaSeconds:
    """Seconds of one call as the GPU sees them, with its caches filled by something else before.

    Args:
        hidden: seconds for which the GPU is kept busy before, so that a step whose kernels are queued in less time is
            measured without what Python takes. About 0.1 ms, the time to overwrite the caches, is always hidden.
    """

    def __init__(self, hidden: float = 0.0) -> None:
        import torch

        self.cuda = torch.cuda
        self.other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2 cache
        self.cycles = int(hidden * self._cycles_a_second()) if hidden else 0

    def _cycles_a_second(self) -> float:
        cycles = 2_000_000
        for _ in range(2):  # the first time it is loaded
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            start.record()
            self.cuda._sleep(cycles)
            end.record()
            self.cuda.synchronize()
        return cycles / (start.elapsed_time(end) / 1e3)

    def __call__(self, step: Callable[[], Any], repeat: int) -> float:
        total = 0.0
        for _ in range(repeat):
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            if self.cycles:
                self.cuda._sleep(self.cycles)
            self.other.zero_()  # also gives the CPU time to queue the first kernels of the step
            start.record()
            step()
            end.record()
            self.cuda.synchronize()
            total += start.elapsed_time(end) / 1e3
        return total / repeat


def interleave(
    timers: dict[str, Callable[[], float | None]],
    seconds: float,
    rounds: int,
    samples: dict[str, list[float]],
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Call every timer once a round, each round beginning with the next one, until the time is up.

    Args:
        timers: name -> function that measures and returns one sample, or None if it is not to be called again.
        seconds: budget; the round in which it ends is finished.
        rounds: the least number of rounds.
        samples: name -> list, which grow; so what was measured is there whatever stops this function.
    """
    names, start, i = list(timers), now(), 0
    while names and i < MAX_ROUNDS and (i < rounds or now() - start < seconds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            sample = timers[name]()
            if sample is None:
                names.remove(name)
            else:
                samples[name].append(sample)
        i += 1


def cuda_graph(step: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """A step without gradients, captured in a CUDA graph: a call launches all its kernels at once.

    Its tensors stay where they are, so each call overwrites what the one before returned.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and chooses what would not be allowed while capturing
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors = step()

    def replay() -> tuple[Any, ...]:
        graph.replay()
        return tensors

    return replay


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

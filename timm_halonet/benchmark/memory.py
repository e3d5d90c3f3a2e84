"""Peak extra memory of one step: the GPU's by PyTorch's allocator, the CPU's by the resident set of a fresh process.

On the CPU the kernel's own high-water mark is used (VmHWM in /proc/self/status, set back through
/proc/self/clear_refs), so no short peak is missed; on other systems the measurement is skipped.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .case import Case, Config, Skip, Subject, dtype_name

WORKER_SECONDS = 300


def peak_growth(step: Callable[[], Any]) -> int:
    """Bytes by which this process's resident set at most grew while `step` ran.

    Raises:
        Skip: this system does not tell.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: give back what is free, or it would be used unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_mark()
        step()
        return _high_water_mark() - before
    except OSError as e:
        raise Skip(f"this system does not tell a process's peak memory: {e}") from None


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def peak_memory(subject: Subject, batch: int, device: str) -> int:
    """Bytes that one step of this batch size takes at most in addition to what it starts with (parameters, inputs)."""
    import torch

    subject.build(1)()  # loads and sets up what is loaded and set up once
    step = subject.build(batch)
    if device == "cpu":
        return peak_growth(step)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def worker(cases: Sequence[Case], device: str, case_name: str, subject_name: str) -> int:
    """Prints the peak memory of one subject as JSON; runs in a process of its own."""
    case = next(case for case in cases if case.name == case_name)
    subject = next(subject for subject in case.subjects if subject.name == subject_name)
    try:
        answer: dict[str, Any] = {"bytes": peak_memory(subject, case.batch, device)}
    except Skip as e:
        answer = {"skipped": str(e)}
    print(json.dumps(answer))
    return 0


def _in_fresh_process(case: Case, subject: Subject, config: Config, threads: int) -> int:
    command = [sys.executable, "-m", "timm_halonet.benchmark", "--device", "cpu", "--threads", str(threads)]
    command += ["--dtype", *map(dtype_name, config.dtypes), *["--channels-last"] * config.channels_last]
    if config.families:
        command += ["--batch-size", str(config.batch), "--img-size", str(config.size), "--families", subject.name]
    command += ["--memory-worker", case.name, subject.name]
    return printed_bytes(command)


def printed_bytes(command: Sequence[str], seconds: float = WORKER_SECONDS) -> int:
    """The answer of a process like `worker`, {"bytes": ...} as the last line that it prints.

    Raises:
        Skip: it gives none within so many seconds, or says why not.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Skip(f"did not finish in {seconds:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Skip(f"its process returned {done.returncode}: {lines[-1][:200]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in answer:
        raise Skip(answer["skipped"])
    return answer["bytes"]


def measure_memory(case: Case, config: Config, threads: int) -> tuple[dict[str, Any], bool]:
    """The case's part of the result, and whether Ctrl-C cut it short."""
    subjects: dict[str, dict[str, Any]] = {}
    for subject in case.subjects:
        try:
            if config.device == "cpu":
                size = _in_fresh_process(case, subject, config, threads)
            else:
                size = peak_memory(subject, case.batch, config.device)
        except KeyboardInterrupt:
            return {"subjects": subjects}, True
        except Exception as e:  # a reason, whatever it was: the others go on
            reason = str(e) if isinstance(e, Skip) else f"{type(e).__name__}: {str(e)[:200]}"
            subjects[subject.name] = {"skipped": reason}
            continue
        subjects[subject.name] = {"median": size, "q1": size, "q3": size, "samples": 1, "difference": None}
    return {"subjects": subjects}, False

"""Runs the cases of `minutes.py` or `deploy.py` one after the other in a process of their own, within a given time.

Nothing is lost: a case is in the result, and in its file, as soon as it was measured. A subject that ends the process
or does not come to an end is named with its reason, and the rest is measured without it in a new process. Cases for
which the time does not suffice are named too. Standard library only, but for the cases.
"""

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import environment
from . import report
from .measuring import progress, write_json

if TYPE_CHECKING:
    from .case import Case

START = 120.0  # seconds that a new process may take until it is ready
GRACE = 20.0  # seconds over its limit after which a subject is given up from outside
LATE = 3.0  # seconds before the end of the time in which nothing more is begun


class _Gone(Exception):
    """The process ended, or was ended; the message is the reason."""


class _Process:
    """A worker that answers in lines of JSON."""

    def __init__(self, command: Sequence[str], dry: bool):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 as long as the process
        env = environment.for_dry_run() if dry else None
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=env, text=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise _Gone(self._ended()) from None

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            _Gone: there is none within so many seconds, or ever.
        """
        try:
            line = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.end()
            raise _Gone("did not come to an end, and its process was ended") from None
        if line is None:
            raise _Gone(self._ended())
        return json.loads(line)

    def _ended(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["it wrote no message"]
        return f"its process ended with {code}: {lines[-1][:200]}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def cost(case: "Case") -> float:
    """Seconds that a case takes, a guess."""
    compiled = sum(subject.compiled for subject in case.subjects)
    return case.seconds + case.setup * (len(case.subjects) - compiled) + case.compiling * compiled


class Supervisor:
    """Fills `result["cases"]` and `result["left_out"]` (case -> reason).

    Args:
        cases: in the order in which they are run.
        minutes: for all of them.
        command: what starts a process that measures these cases, see `worker.py`.
        result: to fill; `file` is rewritten after each case.
        file: JSON, or None.
        dry: walk the plan only: what cannot be measured on the CPU is interpreted.
    """

    def __init__(
        self,
        cases: Sequence["Case"],
        minutes: float,
        command: Sequence[str],
        result: report.Result,
        file: str | None = None,
        dry: bool = False,
    ):
        self.cases, self.command, self.result, self.file, self.dry = cases, command, result, file, dry
        self.start, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        self.process: _Process | None = None
        self.at = ""  # the subject that is set up; "" while all are timed
        self.told: tuple[str, str] | None = None  # what was skipped since, and why

    def run(self) -> None:
        """Measure until all is measured, or the time is over, or Ctrl-C."""
        self.result.setdefault("left_out", {})
        try:
            for i, case in enumerate(self.cases):
                left = max(0.0, self._left())
                if left < min(cost(case), 3 * LATE + 0.5 * cost(case)):
                    reason = f"takes about {cost(case):.0f} s, and {left:.0f} s were left"
                    self.result["left_out"][case.name] = reason
                    line = f"not measured: {reason}"
                else:
                    entry = self._measure(case)
                    self.result["cases"].append(entry)
                    line = report.one_line(entry)
                spent = time.monotonic() - self.start
                progress(f"[{i + 1}/{len(self.cases)}, {spent:.0f} s] {case.name}: {line}")
                if self.file:
                    write_json(self.file, self.result)
        except KeyboardInterrupt:
            self.result["interrupted"] = True
            progress("interrupted")
        finally:
            if self.process is not None:
                self.process.end()

    def _measure(self, case: "Case") -> dict[str, Any]:
        """The case's entry; each time the process ends, once more without the subject that it was at."""
        lost: dict[str, dict[str, Any]] = {}
        figures: dict[str, dict[str, Any]] = {}
        names = [subject.name for subject in case.subjects]
        while len(lost) < len(names):
            self.at, self.told = "", None
            try:
                figures = self._ask(case, list(lost))
                break
            except _Gone as e:
                self.process = None
                name, reason = self.told or (self.at, str(e))
                if self._left() < LATE:
                    name, reason = (
                        "",
                        f"the time was over while {self.at or 'it'} was {'set up' if self.at else 'timed'}",
                    )
                for lost_one in [name] if name else [x for x in names if x not in lost]:
                    lost[lost_one] = {"skipped": reason, "failed": True}
        figures = figures | lost
        rest = [name for name in figures if name not in names]
        ordered = {name: figures[name] for name in [*names, *rest] if name in figures}
        entry = dict(name=case.name, batch=case.batch, quantity=case.quantity, baseline=case.baseline)
        return {**entry, "subjects": ordered}

    def _ask(self, case: "Case", without: list[str]) -> dict[str, dict[str, Any]]:
        """The figures of the case's other subjects.

        Raises:
            _Gone: the process ended; `self.told` has the subject that it gave up last, else `self.at` where it was.
        """
        if self.process is None:
            self.process = _Process(self.command, self.dry)
            self.process.answer(min(START, self._left()))
        self.process.ask({"case": case.name, "without": without, "seconds": self._left() - LATE})
        limit = START
        while True:
            answer = self.process.answer(min(limit + GRACE, self._left()))
            if "entry" in answer:
                return answer["entry"]["subjects"]
            if "begin" in answer:
                self.at, self.told, limit = answer["begin"], None, answer["limit"]
            else:  # it may be the last that this process says
                self.told = answer["skipped"], answer["reason"]

    def _left(self) -> float:
        return self.end - time.monotonic()

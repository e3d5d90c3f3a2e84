"""SIGINT and SIGTERM, which end a run after the step that they come in."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# `timeout` and torchrun send a signal that the whole group had already to their child once more: not a second request
ECHO_SECONDS = 3.0


class Stopped(RuntimeError):
    """A signal came; what has to be saved is to be saved now."""


class StopRequest:
    """Whether the process was asked to stop, in the block of `watch`.

    Attributes:
        requested: SIGINT or SIGTERM came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The first signal sets `requested`; one that comes more than ECHO_SECONDS later has the effect that it had
        before the block, which is to end the process at once.
        """
        with suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            self._restore()

    def check(self) -> None:
        """Ends what runs here if a signal has come.

        Raises:
            Stopped: a signal came.
        """
        if self.requested:
            raise Stopped("stopped by a signal")

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._at = True, now
        elif now - self._at > ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def ignore_signals(worker: int) -> None:
    """Lets a data worker ignore signals: the main process ends it, after the checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

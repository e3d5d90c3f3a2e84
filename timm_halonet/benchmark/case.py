"""What a benchmark is made of: cases, the subjects measured in turns, the options of a run, reasons to leave out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[], tuple[torch.Tensor, ...]]


class Skip(Exception):
    """A subject that cannot run here; the message says why."""


class Failed(Skip):
    """A subject that should have run, or does not agree."""


class Stopped(Failed):
    """A subject that took longer than it may, and was stopped in the middle of what it did."""


@dataclass(frozen=True)
class Config:
    """The options of a run."""

    device: str = "cpu"  # or cuda
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    compile: bool = False  # with compiled subjects
    channels_last: bool = False  # models and their images
    quick: bool = False
    families: tuple[str, ...] = ()  # models to compare as a whole, in place of all else; see `families.py`
    batch: int = 8  # of theirs
    size: int = 224  # pixels, of their images
    tiny: bool = False  # `minutes.py` on small maps and batches and without torch.compile, to see that it runs

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of the cases that are measured in one dtype only."""
        wanted = torch.float32 if self.device == "cpu" else torch.bfloat16
        return wanted if wanted in self.dtypes else self.dtypes[0]

    def compiles(self, dtype: torch.dtype) -> bool:
        """Whether subjects are compiled too: in one dtype, as it takes most of a run's time."""
        return self.compile and dtype == self.main_dtype


@dataclass(frozen=True)
class Subject:
    """`build(batch)` sets it up and returns the step that is timed, whose tensors are compared with the baseline's."""

    name: str
    build: Callable[[int], Step]
    same: bool = True  # computes what the baseline does, and must agree with it
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """Subjects that are measured in turns."""

    name: str
    subjects: tuple[Subject, ...]
    baseline: str  # name of the subject that the others are compared with
    seconds: float  # budget for the samples
    tolerance: float = 0.0
    batch: int = 8
    quantity: str = "time"  # or memory, parameters, multiply-adds; errors, kernels (see `minutes.py`)
    bound: float | None = None  # seconds that the hardware allows
    setup: float = 3.0  # seconds to set up a subject, a guess
    compiling: float = 25.0  # and one under torch.compile


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its "torch.", as case names have it: float32."""
    return str(dtype).removeprefix("torch.")

"""How long a run lasts, and the learning rate over it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .configs import DetectorCfg, TrainCfg

FEW_STEPS = 100  # fewer teach a detector next to nothing


@dataclass
class Budget:
    """When to stop, whichever comes first; the learning rate falls to zero with the larger share that is used up."""

    epochs: int | None = None
    minutes: float | None = None  # of training, evaluation not counted

    def used(self, steps: int, seconds: float, steps_an_epoch: int) -> float:
        """The share that is used up after so many steps and seconds, 0 to 1."""
        shares = [0.0]
        if self.epochs:
            shares.append(steps / (self.epochs * steps_an_epoch))
        if self.minutes:
            shares.append(seconds / (60 * self.minutes))
        return min(1.0, max(shares))

    def steps(self, seconds_a_step: float, steps_an_epoch: int) -> int:
        """The number of steps that will be taken."""
        limits = []
        if self.epochs:
            limits.append(self.epochs * steps_an_epoch)
        if self.minutes:
            limits.append(max(1, int(60 * self.minutes / max(seconds_a_step, 1e-9))))
        return min(limits)


def learning_rate(cfg: TrainCfg, step: int, used: float, after: float) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine that falls to zero at the end of the budget.

    The warm-up lasts `warmup_steps` or the share `warmup` of the budget, whichever is less.

    Args:
        step: from 0.
        used, after: share of the budget that is used up before the step and after it.
    """
    by_steps = (step + 1) / max(1, cfg.warmup_steps)
    by_share = after / cfg.warmup if cfg.warmup else 1.0
    return cfg.lr * min(1.0, max(by_steps, by_share)) * 0.5 * (1 + math.cos(math.pi * used))


def few_steps_note(steps: int, seconds_a_step: float | None, preset: str, options: DetectorCfg) -> str | None:
    """A note on a budget that gives too few steps, with what would give more; None where it gives enough.

    Args:
        seconds_a_step: None where the budget is not a time: faster steps do not make more of them.
        preset, options: of the run.
    """
    if steps >= FEW_STEPS:
        return None
    ways = []
    if seconds_a_step is not None and options.min_size is not None:
        shortest = options.min_size if isinstance(options.min_size, int) else min(options.min_size)
        side = max(64, round(shortest * math.sqrt(steps / FEW_STEPS) / 32) * 32)
        if side < shortest:
            ways.append(f"smaller images (--set min_size={side} max_size={side * options.max_size // shortest})")
    proposals = getattr(options, "rpn_post_nms_top_n_train", 0)
    if seconds_a_step is not None and proposals > 300:
        ways.append("fewer proposals (--set rpn_post_nms_top_n_train=300 box_batch_size_per_image=128)")
    if seconds_a_step is not None and preset == "standard":
        ways.append("--preset quick, or small_objects for cells and the like")
    ways.append("more --epochs" if seconds_a_step is None else "more --minutes")
    pace = "" if seconds_a_step is None else f" of {seconds_a_step:.2f} s"
    return (
        f"the budget gives about {steps} steps{pace}, and a detector learns little in fewer than {FEW_STEPS}; "
        f"more would fit with {'; '.join(ways)}"
    )


def sides_of(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """`min_size` and `max_size` by a data set's own images: as large as they mostly are, 800 / 1333 at most.

    Args:
        sizes: heights and widths.
    """
    side = max(32, min(800, int(median(min(size) for size in sizes))))
    return side, side * 5 // 3


def smaller_sides(sides: tuple[int, int], steps: int, wanted: int, least: int = 160) -> tuple[int, int]:
    """Sides at which about `wanted` steps fit where `steps` do now, the time of a step growing with the pixels; not
    below `least`, where few objects can be told.
    """
    short, long = sides
    if steps >= wanted or short <= least:
        return sides
    side = max(least, int(short * math.sqrt(steps / wanted)) // 32 * 32)
    return side, max(side, long * side // short)


def check_budget(budget: Budget, cfg: TrainCfg) -> None:
    """Checks the numbers of a budget and of its learning rate.

    Raises:
        ValueError: numbers that do not fit.
    """
    if budget.epochs is None and budget.minutes is None:
        raise ValueError("a run needs a number of epochs or of minutes")
    numbers: list[Any] = [budget.epochs or 1, budget.minutes or 1, cfg.batch_size, cfg.lr]
    if budget.epochs == 0 or budget.minutes == 0 or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise ValueError(f"need epochs, minutes, batch_size and lr above 0, got {budget}, {cfg.batch_size=}, {cfg.lr=}")
    if not 0 <= cfg.warmup <= 1 or cfg.warmup_steps < 0:
        raise ValueError(f"need 0 <= warmup <= 1 and warmup_steps >= 0, got {cfg.warmup=}, {cfg.warmup_steps=}")
    if not 0 <= (cfg.ema or 0) < 1:
        raise ValueError(f"need 0 <= ema < 1, the share that a step keeps of the moving average, got {cfg.ema=}")

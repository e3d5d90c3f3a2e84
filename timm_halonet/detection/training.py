"""Training: one loop for one process or many, that can be stopped at any time and goes on where it was."""

import csv
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from ..files import remove_leftovers, whole_file
from ..report.progress import progress_bar, say
from .batches import Batch, Batches, seed_of
from .budget import Budget as Budget
from .budget import check_budget, learning_rate
from .checkpoint import CHECKPOINT_NAME as CHECKPOINT_NAME
from .checkpoint import check_keys, load_checkpoint, save_checkpoint
from .configs import TrainCfg
from .dataset import DetectionDataset, fingerprint
from .optimizing import make_optimizer
from .processes import largest, world_and_rank
from .signals import Stopped, StopRequest
from .storage import describe

SUMMARY_NAME = "summary.csv"
_KEPT = 1000  # seconds of the last steps that a checkpoint holds


@dataclass
class Progress:
    """How far a run is; part of its checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    seconds: float = 0.0  # of training, over all resumed parts
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch so far: losses, step and data seconds
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv
    step_seconds: list[float] = field(default_factory=list)  # of the last steps, without waiting for data
    peak_memory_mb: float = 0.0  # over all resumed parts


class NotFiniteError(RuntimeError):
    """A loss or a gradient is not finite."""


class Trainer:
    """Trains a detector on a dataset.

    Every sample's augmentation is drawn from (seed, epoch, index), and every step's random numbers from (seed, step,
    process). So a run that was stopped and resumed takes the same steps as one that was not.

    Args:
        model: made by this package, on its device.
        dataset: with its training transform.
        cfg: how to train.
        out: folder for checkpoint.pt and summary.csv.
        budget: when to stop.
        seed, workers: of the data's order and augmentation; processes that load it.
        amp: type for autocast, torch.bfloat16; None for float32.
        checkpoint_minutes: between two checkpoints; 0 for one after every step. There is one at the end too.
        log: called with lines for people, in the first process.
        log_steps: steps between them.

    Raises:
        ValueError: numbers that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: DetectionDataset,
        cfg: TrainCfg,
        out: Path,
        budget: Budget,
        *,
        seed: int = 0,
        workers: int = 0,
        amp: torch.dtype | None = None,
        checkpoint_minutes: float = 5.0,
        log: Callable[[str], None] = say,
        log_steps: int = 20,
    ):
        check_budget(budget, cfg)
        if log_steps < 1 or workers < 0 or not checkpoint_minutes >= 0:
            raise ValueError(
                f"need log_steps >= 1, workers >= 0 and checkpoint_minutes >= 0, got {log_steps=}, {workers=}, "
                f"{checkpoint_minutes=}"
            )
        self.world, self.rank = world_and_rank()
        self.model, self.dataset, self.cfg, self.out, self.budget = model, dataset, cfg, out, budget
        self.seed, self.amp = seed, amp
        self.checkpoint_minutes, self.log_steps = checkpoint_minutes, log_steps
        self.log = log if self.rank == 0 else lambda line: None
        self.device = next(model.parameters()).device
        if self.device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise ValueError("norm 'sync' needs GPUs; on the CPU take norm 'batch'")
        self.optimizer = make_optimizer(model, cfg)
        self.ema = ModelEmaV3(model, decay=cfg.ema, use_warmup=True) if cfg.ema else None
        self.progress = Progress()
        self.loader = Batches(dataset, model, cfg.batch_size, seed, workers)
        self.batches = math.ceil(math.ceil(len(dataset) / self.world) / cfg.batch_size)
        self.stop = StopRequest()
        self._pending: list[tuple[int, list[Any], list[str], torch.Tensor]] = []  # steps whose losses nobody has read
        self._timed = 0.0  # seconds of a step, before there is one
        self._saved = time.monotonic()  # the last checkpoint
        if self.rank == 0:
            for name in (CHECKPOINT_NAME, SUMMARY_NAME):  # of a run that was killed while it wrote
                remove_leftovers(out / name)

    @property
    def trained(self) -> nn.Module:
        """The weights to evaluate and to save: the moving average, if there is one."""
        return self.ema.module if self.ema else self.model

    def run(self, after_epoch: Callable[[int], dict[str, float]] | None = None) -> None:
        """Trains until the budget is used up, from where `resume` left it.

        Args:
            after_epoch: called with the epochs done; gives further columns of summary.csv. Where it takes long it calls
                `stop.check` now and then.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint is written.
            NotFiniteError: loss or gradient is not finite; with step, images and losses. The last checkpoint stays.
            ValueError, RuntimeError: an image that cannot be read or trained on, with its name; the checkpoint is
                written.
        """
        model: nn.Module = self.model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self._saved = time.monotonic()
        with self.stop.watch():
            try:
                self._train(model, after_epoch)
            except NotFiniteError:
                raise
            except Exception as e:
                self._save_after(e)
                if self.stop.requested:
                    raise KeyboardInterrupt from None
                raise

    def _train(self, model: nn.Module, after_epoch: Callable[[int], dict[str, float]] | None) -> None:
        while self._agree()[0] < 1:
            p = self.progress
            about: dict[str, Any] = dict(desc=f"epoch {p.epoch}", unit="step", total=self.batches, initial=p.batch)
            with progress_bar(shown=self.rank == 0, **about) as bar:
                for batch in self.loader.epoch(p.epoch, p.batch):
                    used, after, stop, due, failed = self._agree(batch.error)
                    if failed:
                        raise ValueError(batch.error or "another process could not go on; its error says why")
                    if used >= 1:
                        break
                    if stop:
                        raise Stopped("stopped by a signal")
                    if due:
                        self.save()
                    self._step(model, batch, learning_rate(self.cfg, p.step, used, after))
                    bar.update()
            self._close_epoch(after_epoch)
            self.write_summary()
        self._close_epoch(after_epoch)  # one that was stopped at its very end
        self.save()

    def _save_after(self, error: Exception) -> None:
        try:
            self.save()
        except OSError as e:
            raise OSError(str(e) if isinstance(error, OSError) else f"{e}; after: {error}") from None

    def resume(self) -> bool:
        """Goes back to the checkpoint in `out`; whether there was one.

        Raises:
            ValueError: it is of another detector or training, with what differs, or broken.
        """
        path = self.out / CHECKPOINT_NAME
        if not path.exists():
            return False
        state = load_checkpoint(path)
        own = self._identity()
        check_keys(state["identity"], own, f"{path}: identity")
        for key, value in own.items():
            if key == "data" and state["identity"][key] != value:
                raise ValueError(
                    f"{path} is of a run on another data set: its images or categories have other names there"
                )
            if state["identity"][key] != value:
                raise ValueError(f"{path} is of another run: {key} is {state['identity'][key]!r} there, {value!r} here")
        check_keys(state["progress"], asdict(self.progress), f"{path}: progress")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{path} does not fit this run: {' '.join(str(e).split())}") from None
        self.progress = Progress(**state["progress"])
        return True

    def save(self) -> None:
        """Writes checkpoint.pt and summary.csv, each the whole file or nothing.

        Raises:
            NotFiniteError: the last steps had losses that are not finite; nothing is written.
            OSError: it cannot be written.
        """
        self._read_losses()
        if self.rank:
            return
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.out / CHECKPOINT_NAME, state)
        self._saved = time.monotonic()
        self.write_summary()

    def write_summary(self) -> None:
        """Write summary.csv with a row for each epoch, the whole file or nothing; only the first process does."""
        rows = self.progress.rows
        if not rows or self.rank:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with whole_file(self.out / SUMMARY_NAME) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(rows)

    def _identity(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        training = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.cfg).items()}
        return {
            **describe(self.model),
            **training,
            "seed": self.seed,
            "images": len(self.dataset),
            "data": fingerprint(self.dataset),
            "processes": self.world,
        }

    def _used(self, steps: int = 0, seconds: float = 0.0) -> float:
        """The share of the budget that is used up, 0 to 1, so many steps and seconds from now."""
        return self.budget.used(self.progress.step + steps, self.progress.seconds + seconds, self.batches)

    def _agree(self, error: str | None = None) -> tuple[float, float, bool, bool, bool]:
        """The share of the budget that is used up before and after the next step, whether to stop, whether a checkpoint
        is due and whether a process has an error; the same in every process.
        """
        recent = self.progress.step_seconds[-20:]
        expected = 1.2 * median(recent or [self._timed])
        due = time.monotonic() - self._saved >= 60 * self.checkpoint_minutes
        own = [
            self._used(0, expected if recent else 0.0),  # a step that would end too late is not begun; but the first is
            self._used(1, expected),
            self.stop.requested,
            due,
            error is not None,
        ]
        used, after, stop, due_anywhere, failed = largest(own, self.device)
        return used, after, bool(stop), bool(due_anywhere), bool(failed)

    def time_steps(self, count: int = 2) -> float:
        """Seconds of a step without loading data: the faster of `count` on the first images, which leave weights,
        statistics and random numbers as they are. The largest over the processes; NaN where an image cannot be used.
        """
        self.model.train()
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        batch = self.loader.first()
        seconds = []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for _ in range(0 if batch.error else count):
                start = time.perf_counter()
                with suppress(RuntimeError):  # images that training will name
                    loss = torch.stack(list(self._forward(self.model, batch).values())).sum()
                    loss.backward()
                    loss.item()  # waits for a GPU
                    seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        [slowest] = largest([min(seconds, default=math.nan)], self.device)
        self._timed = 0.0 if math.isnan(slowest) else slowest
        return slowest

    def _forward(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses.

        Raises:
            RuntimeError: images that the model cannot be trained on; with their names.
        """
        model.train()
        try:
            with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
                return model(batch.images, batch.targets)
        except Exception as e:  # torchvision has assertions among them
            first = str(e).partition("\n")[0]
            raise RuntimeError(f"step {self.progress.step} failed, images {', '.join(batch.names)}: {first}") from e

    def _step(self, model: nn.Module, batch: Batch, lr: float) -> None:
        p, cfg = self.progress, self.cfg
        start = time.perf_counter()
        torch.manual_seed(seed_of(self.seed, "step", p.step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self._forward(model, batch)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad or math.inf)
        values = torch.stack([*(loss.detach().float() for loss in losses.values()), norm.float()])
        self._pending.append((p.step, [target["image_id"] for target in batch.targets], list(losses), values))
        if self.device.type == "cpu":  # where nothing waits for it
            self._read_losses()
        self.optimizer.step()
        p.step += 1
        p.batch += 1
        if self.ema:
            self.ema.update(self.model, p.step)
        shown = p.step % self.log_steps == 0 or p.step == 1
        if shown:
            self._read_losses()
        seconds = time.perf_counter() - start
        p.step_seconds = [*p.step_seconds[1 - _KEPT :], seconds]
        p.seconds += seconds + batch.waited
        for name, value in {"step_seconds": seconds, "data_seconds": batch.waited}.items():
            p.sums[name] = p.sums.get(name, 0.0) + value
        if shown:
            self.log(self._line({name: value.item() for name, value in losses.items()}, lr))

    def _read_losses(self) -> None:
        """Takes the losses and the norms since the last time from the device, at once, and adds them to the sums.

        Raises:
            NotFiniteError: with the first step where they are not finite.
        """
        p, pending = self.progress, self._pending
        if not pending:
            return
        self._pending = []
        for (step, ids, names, _), row in zip(pending, torch.stack([v for *_, v in pending]).tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                raise NotFiniteError(
                    f"the loss or its gradient is not finite at step {step} (images of ids "
                    f"{', '.join(map(str, ids))}): {dict(zip(names, row, strict=False))}, norm of the gradient "
                    f"{row[-1]}; the last checkpoint stays. A smaller learning rate than {self.cfg.lr} may help"
                )
            for name, value in zip(names, row, strict=False):
                p.sums[name] = p.sums.get(name, 0.0) + value
        p.peak_memory_mb = max(p.peak_memory_mb, peak_memory_mb(self.device))

    def _line(self, values: dict[str, float], lr: float) -> str:
        p = self.progress
        share = self._used()
        left = p.seconds * (1 - share) / share if share else math.nan
        parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items())
        return (
            f"epoch {p.epoch}  step {p.step}  loss {sum(values.values()):.3f} ({parts})  lr {lr:.1e}  "
            f"{median(p.step_seconds[-self.log_steps :]):.2f} s/step  {p.peak_memory_mb:.0f} MB  "
            f"{_clock(p.seconds)} done, {_clock(left)} left"
        )

    def _close_epoch(self, after_epoch: Callable[[int], dict[str, float]] | None) -> None:
        p = self.progress
        if not p.batch:
            return
        self._read_losses()
        if self.world > 1:  # each process has seen other images
            for model in (self.model, self.trained):
                distribute_bn(model, self.world, reduce=True)
        means = {name: value / p.batch for name, value in p.sums.items()}
        seconds = {name: means.pop(name) for name in ("step_seconds", "data_seconds")}
        row: dict[str, Any] = {
            "epoch": p.epoch,
            "step": p.step,
            "minutes": round(p.seconds / 60, 3),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": round(sum(means.values()), 5),
            **{name: round(value, 5) for name, value in means.items()},
            **{name: round(value, 4) for name, value in seconds.items()},
            "peak_memory_mb": round(p.peak_memory_mb),
        }
        p.epoch, p.batch, p.sums = p.epoch + 1, 0, {}
        p.rows.append(row)
        if after_epoch:
            row.update(after_epoch(p.epoch))


def peak_memory_mb(device: torch.device) -> float:
    """Megabytes: on a GPU the most that tensors took, elsewhere the most that this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

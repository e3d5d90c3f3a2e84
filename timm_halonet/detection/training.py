"""Training: one loop for one process or many, that can be stopped at any time and goes on where it was."""

import csv
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3, distribute_bn
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..report.files import whole_file
from .configs import TrainCfg
from .data import DetectionDataset
from .storage import describe, load_checkpoint, save_checkpoint

CHECKPOINT_NAME = "checkpoint.pt"
SUMMARY_NAME = "summary.csv"
# tables that are added to logits or maps: two dimensions, but no weight decay (timm's no_weight_decay of such models)
_NO_DECAY = ("height_rel", "width_rel", "relative_position_bias_table", "pos_embed")


@dataclass
class Budget:
    """When to stop, whichever comes first; the learning rate falls to zero with the larger share that is used up."""

    epochs: int | None = None
    minutes: float | None = None  # of training, evaluation not counted


@dataclass
class Progress:
    """Where a run is; in the checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    seconds: float = 0.0  # of training, over all resumed parts
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch so far: losses, step and data seconds
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv


class Trainer:
    """Trains a detector on a dataset.

    Every sample's augmentation is drawn from (seed, epoch, index), every step's random numbers from (seed, step,
    process): a run that was stopped and resumed takes the very steps that it would have taken.

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
        log: Callable[[str], None] = print,
        log_steps: int = 20,
    ):
        if budget.epochs is None and budget.minutes is None:
            raise ValueError("a run needs a number of epochs or of minutes")
        if (budget.epochs or 1) < 1 or (budget.minutes or 1) <= 0 or cfg.batch_size < 1 or cfg.lr <= 0:
            raise ValueError(
                f"need epochs, minutes, batch_size and lr above 0, got {budget}, {cfg.batch_size=}, {cfg.lr=}"
            )
        self.world, self.rank = 1, 0
        if distributed.is_initialized():
            self.world, self.rank = distributed.get_world_size(), distributed.get_rank()
        self.model, self.dataset, self.cfg, self.out, self.budget = model, dataset, cfg, out, budget
        self.seed, self.workers, self.amp = seed, workers, amp
        self.checkpoint_minutes, self.log_steps = checkpoint_minutes, log_steps
        self.log = log if self.rank == 0 else lambda line: None
        self.device = next(model.parameters()).device
        if self.device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise ValueError("norm 'sync' needs GPUs; on the CPU take norm 'batch'")
        self.optimizer = _optimizer(model, cfg)
        self.ema = ModelEmaV3(model, decay=cfg.ema, use_warmup=True) if cfg.ema else None
        self.progress = Progress()
        self.batches = math.ceil(math.ceil(len(dataset) / self.world) / cfg.batch_size)
        self.step_seconds: list[float] = []
        self._stop = False
        self._saved = time.monotonic()  # the last checkpoint

    @property
    def trained(self) -> nn.Module:
        """The weights to evaluate and to save: the moving average, if there is one."""
        return self.ema.module if self.ema else self.model

    def run(self, after_epoch: Callable[[int], dict[str, float]] | None = None) -> None:
        """Trains until the budget is used up, from where `resume` left it.

        Args:
            after_epoch: called with the epochs done; gives further columns of summary.csv.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the checkpoint is written.
            RuntimeError: loss or gradient is not finite; with step, images and losses. The last checkpoint stays.
        """
        model: nn.Module = self.model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self._saved = time.monotonic()
        used, _, _ = self._agree()
        with self._signals():
            while used < 1:
                for images, targets, waited in self._epoch():
                    self._step(model, images, targets, waited, used)
                    used, stop, due = self._agree()
                    if stop or due:
                        self.save()
                    if stop:
                        raise KeyboardInterrupt
                    if used >= 1:
                        break
                self._close_epoch(after_epoch)
                self.write_summary()
            self._close_epoch(after_epoch)  # one that was stopped at its very end
            self.save()

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
        for key, value in own.items():
            if state["identity"].get(key) != value:
                raise ValueError(
                    f"{path} is of another run: {key} is {state['identity'].get(key)!r} there, {value!r} here"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.progress = Progress(**state["progress"])
        return True

    def save(self) -> None:
        """Writes checkpoint.pt and summary.csv, each whole or not at all."""
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
            "processes": self.world,
        }

    def _used(self, margin: float = 0.0) -> float:
        """The share of the budget that is used up, 0 to 1, in `margin` seconds from now."""
        p, shares = self.progress, [0.0]
        if self.budget.epochs:
            shares.append(p.step / (self.budget.epochs * self.batches))
        if self.budget.minutes:
            shares.append((p.seconds + margin) / (60 * self.budget.minutes))
        return min(1.0, max(shares))

    def _agree(self) -> tuple[float, bool, bool]:
        """The used share of the budget, whether to stop and whether a checkpoint is due; the same in every process."""
        # a step that would end too late is not begun
        margin = 1.2 * median(self.step_seconds[-20:]) if self.step_seconds else 0.0
        due = time.monotonic() - self._saved >= 60 * self.checkpoint_minutes
        own = torch.tensor([self._used(margin), self._stop, due], dtype=torch.float64)
        if self.world > 1:
            own = own.to(self.device)
            distributed.all_reduce(own, distributed.ReduceOp.MAX)
        used, stop, due_anywhere = own.tolist()
        return used, bool(stop), bool(due_anywhere)

    def _epoch(self) -> Iterator[tuple[list[torch.Tensor], list[dict[str, Any]], float]]:
        """The batches of this epoch that are left, each with the seconds that it was waited for."""
        p = self.progress
        sampler: DistributedSampler = DistributedSampler(self.dataset, self.world, self.rank, seed=self.seed)
        sampler.set_epoch(p.epoch)
        indices = list(sampler)[p.batch * self.cfg.batch_size :]
        loader = DataLoader(
            _Seeded(self.dataset, self.seed, p.epoch),
            batch_size=self.cfg.batch_size,
            sampler=indices,
            num_workers=self.workers,
            collate_fn=list,
            pin_memory=False,
        )
        start = time.perf_counter()
        for batch in loader:
            errors = [item for item in batch if isinstance(item, str)]
            if errors:
                self.save()
                raise ValueError(errors[0])
            images = [image.to(self.device, non_blocking=True) for image, _ in batch]
            targets = [
                {
                    k: v.to(self.device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                    for k, v in target.items()
                }
                for _, target in batch
            ]
            yield images, targets, time.perf_counter() - start
            start = time.perf_counter()

    def _step(
        self, model: nn.Module, images: list[torch.Tensor], targets: list[dict[str, Any]], waited: float, used: float
    ) -> None:
        p, cfg = self.progress, self.cfg
        start = time.perf_counter()
        torch.manual_seed(_seed(self.seed, "step", p.step, self.rank))
        lr = cfg.lr * min(1.0, (p.step + 1) / max(1, cfg.warmup_steps)) * 0.5 * (1 + math.cos(math.pi * used))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        model.train()
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            losses = model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        values = {name: value.item() for name, value in losses.items()}
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad or math.inf).item()
        if not all(map(math.isfinite, [*values.values(), norm])):
            ids = ", ".join(str(t["image_id"]) for t in targets)
            raise RuntimeError(
                f"the loss or its gradient is not finite at step {p.step} (images of ids {ids}): {values}, norm of the "
                f"gradient {norm}; the last checkpoint stays. A smaller learning rate than {cfg.lr} may help"
            )
        self.optimizer.step()
        p.step += 1
        p.batch += 1
        if self.ema:
            self.ema.update(self.model, p.step)
        seconds = time.perf_counter() - start
        self.step_seconds.append(seconds)
        p.seconds += seconds + waited
        for name, value in {**values, "step_seconds": seconds, "data_seconds": waited}.items():
            p.sums[name] = p.sums.get(name, 0.0) + value
        if p.step % self.log_steps == 0 or p.step == 1:
            self.log(self._line(values, lr))

    def _line(self, values: dict[str, float], lr: float) -> str:
        p = self.progress
        share = self._used()
        left = p.seconds * (1 - share) / share if share else math.nan
        parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items())
        return (
            f"epoch {p.epoch}  step {p.step}  loss {sum(values.values()):.3f} ({parts})  lr {lr:.1e}  "
            f"{median(self.step_seconds[-self.log_steps :]):.2f} s/step  {peak_memory_mb(self.device):.0f} MB  "
            f"{_clock(p.seconds)} done, {_clock(left)} left"
        )

    def _close_epoch(self, after_epoch: Callable[[int], dict[str, float]] | None) -> None:
        p = self.progress
        if not p.batch:
            return
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
            "peak_memory_mb": round(peak_memory_mb(self.device)),
        }
        p.epoch, p.batch, p.sums = p.epoch + 1, 0, {}
        p.rows.append(row)
        if after_epoch:
            row.update(after_epoch(p.epoch))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step that they come in."""

        def stop(number: int, frame: Any) -> None:
            self._stop = True

        previous = {}
        with suppress(ValueError):  # not in the main thread
            previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Seeded(Dataset):
    """Items whose random numbers depend on seed, epoch and index alone; in place of an item that cannot be had, the
    error's text."""

    def __init__(self, dataset: DetectionDataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(self.seed, "item", self.epoch, index))
            try:
                return self.dataset[index]
            except (ValueError, OSError) as e:
                return str(e)


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _optimizer(model: nn.Module, cfg: TrainCfg) -> torch.optim.Optimizer:
    tables = [name for name, _ in model.named_parameters() if name.endswith(_NO_DECAY)]
    groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=tables)
    fused = {"fused": True} if cfg.opt in ("adam", "adamw", "sgd") else {}  # PyTorch's own
    return create_optimizer_v2(groups, opt=cfg.opt, lr=cfg.lr, weight_decay=0.0, **fused)


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

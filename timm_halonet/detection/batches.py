"""The batches of a training: seeded, checked, on their device; an error in place of one that cannot be loaded."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .dataset import DetectionDataset
from .processes import world_and_rank
from .signals import ignore_signals


@dataclass
class Batch:
    """One batch of this process: images and targets on its device, or an error in place of them."""

    images: list[torch.Tensor]
    targets: list[dict[str, Any]]
    names: list[str]  # of the images
    waited: float  # seconds
    error: str | None = None


class Batches:
    """Gives the batches of an epoch; the same ones for the same seed, epoch and number of processes.

    Args:
        dataset: with its training transform.
        model: on its device; what its transform cannot resize is an error.
        size: images a batch and process.
        seed: of the order and the augmentation.
        workers: processes that load.
    """

    def __init__(self, dataset: DetectionDataset, model: nn.Module, size: int, seed: int, workers: int):
        self.dataset, self.size, self.seed, self.workers = dataset, size, seed, workers
        self.device = next(model.parameters()).device
        self.check = getattr(getattr(model, "transform", None), "check_size", None)
        self.world, self.rank = world_and_rank()

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """All batches of an epoch but the first `skip`."""
        sampler: DistributedSampler = DistributedSampler(self.dataset, self.world, self.rank, seed=self.seed)
        sampler.set_epoch(epoch)
        indices = list(sampler)[skip * self.size :]
        loader = DataLoader(
            Seeded(self.dataset, self.seed, epoch),
            batch_size=self.size,
            sampler=indices,
            num_workers=self.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
        start = time.perf_counter()
        for n, items in enumerate(loader):
            yield self._batch(items, indices[n * self.size : (n + 1) * self.size], start)
            start = time.perf_counter()

    def first(self) -> Batch:
        """A batch of the data set's first images, loaded in this process."""
        indices = list(range(self.rank, len(self.dataset), self.world)[: self.size])
        items = [Seeded(self.dataset, self.seed, 0)[n] for n in indices]
        return self._batch(items, indices, time.perf_counter())

    def _batch(self, items: list[Any], indices: list[int], start: float) -> Batch:
        """Of a list of samples, or error texts, that was waited for since `start`."""
        names = [self.dataset.names[i] for i in indices]
        for name, item in zip(names, items, strict=True):
            try:
                if isinstance(item, str):
                    return Batch([], [], names, 0.0, item)
                if self.check is not None:
                    self.check(*item[0].shape[-2:])
            except ValueError as e:
                return Batch([], [], names, 0.0, f"{name}: {e}")
        images = [image.to(self.device, non_blocking=True) for image, _ in items]
        targets = [
            {k: v.to(self.device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
            for _, target in items
        ]
        return Batch(images, targets, names, time.perf_counter() - start)


class Seeded(Dataset):
    """Items whose random numbers depend on seed, epoch and index alone; in place of an item that cannot be had, the
    error's text, with the image's name.
    """

    def __init__(self, dataset: DetectionDataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, "item", self.epoch, index))
            try:
                return self.dataset[index]
            except Exception as e:  # decoders raise whatever they like for a broken file
                name, text = self.dataset.names[index], str(e).partition("\n")[0]
                return text if isinstance(e, ValueError) and name in text else f"{name}: {type(e).__name__}: {text}"


def seed_of(*parts: Any) -> int:
    """A seed of 56 bits that any of the parts changes."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")

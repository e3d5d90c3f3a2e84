"""What test_distributed.py runs in each of its processes: a small model, its data, and training on timm's parts."""

import io
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad, distribute_bn, reduce_tensor
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import timm_halonet  # noqa: F401

PROCESSES = 2
STEPS = 3
EPOCHS = 3
CLASSES = 5
# narrow and shallow, by family; the rest of each architecture stays as it is
SMALL = {
    "halonet": dict(depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), base_width=16, stem_chs=16, zero_init_last=False),
    "uhalonet": dict(depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), dims=(16, 16, 32, 32)),
}


def small_model(name: str = "halonet_h0", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A small model of that architecture, with the same weights at every call, in any dtype."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **SMALL[name.partition("_")[0]], **kwargs).to(dtype)


def images_and_labels(number: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The same ones at every call, 48x40 pixels: maps of odd sizes and ragged blocks."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 48, 40, generator=generator).to(dtype)
    return images, torch.randint(CLASSES, (number,), generator=generator)


def model_and_batch(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Model, images and labels for `precision`: in float32 for bfloat16."""
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    return small_model(dtype=kept), *images_and_labels(dtype=kept)


def precision(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def optimizer_and_schedule(model: nn.Module, updates: int = STEPS):
    """The recipes' kind: LAMB, groups with and without weight decay, a cosine over updates."""
    optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-2, weight_decay=0.02)
    return optimizer, CosineLRScheduler(optimizer, t_initial=updates, lr_min=1e-5, t_in_epochs=False)


# ---- processes ----


def launch(work: Callable, folder: Path, *args, limit: float = 300) -> None:
    """Run work(rank, folder, *args) in two processes that can talk to each other.

    Raises:
        ProcessRaisedException, ProcessExitedException: one of them failed; the other was stopped.
        TimeoutError: they took more than `limit` seconds and were killed.
    """
    # processes come from a server that has imported everything, not from this one, which has threads
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    store = f"file://{folder}/{work.__name__}-{time.monotonic_ns()}"  # no port that another program could take first
    context = torch.multiprocessing.start_processes(
        _process, (store, work, folder, args), nprocs=PROCESSES, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + limit
    try:
        while not context.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{work.__name__} still runs after {limit} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _process(rank: int, store: str, work: Callable, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timedelta(minutes=10), rank=rank, world_size=PROCESSES)
    work(rank, folder, *args)
    dist.destroy_process_group()


def hang(rank: int, folder: Path) -> None:
    """A process waits for one that does not take part."""
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(60)


# ---- gradients ----


def train_compiled(rank: int, folder: Path, backend: str) -> None:
    """`train_steps` in both orders of compiling and wrapping, each with a folder of its own."""
    for how in ("compiled, ddp", "ddp, compiled"):
        train_steps(rank, folder / how, torch.float64, "own", how, backend)


def train_steps(rank: int, folder: Path, dtype: torch.dtype, norms: str, how: str, backend: str = "") -> None:
    """STEPS updates, each on this process's half of the batch; losses, gradients and weights go to a file.

    Args:
        dtype: bfloat16 for autocast over float32 weights.
        norms: "frozen" for running statistics, "own" for those of the half, "synchronised" for those of the batch.
        how: see `parallel`.
    """
    model, images, labels = model_and_batch(dtype)
    images, labels = images[rank::PROCESSES], labels[rank::PROCESSES]
    if norms == "synchronised":
        model = convert_sync_batchnorm_on_cpu(model)
    model.train(norms != "frozen")
    forward = parallel(model, how, backend)
    optimizer, schedule = optimizer_and_schedule(model)
    log = []
    for step in range(STEPS):
        optimizer.zero_grad()
        with precision(dtype):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        log.append(losses_and_gradients(reduce_tensor(loss.detach(), PROCESSES), model))
        update(model, optimizer, schedule, step)
    distribute_bn(model, PROCESSES, reduce=True)
    result = sharded_weights(model, images) if how == "sharded" else {"model": model.state_dict()}
    folder.mkdir(exist_ok=True)
    torch.save({"log": log, **result}, folder / str(rank))


def parallel(model: nn.Module, how: str, backend: str) -> Callable:
    """`model`, ready for several processes.

    Args:
        how: "ddp", "compiled, ddp" (train.py's order), "ddp, compiled", or "sharded" by FSDP2, blocks first.
    """
    if how == "sharded":
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for stage in model.stages:
            for block in stage:
                fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    wrapped = torch.compile(model, backend=backend) if how == "compiled, ddp" else model
    wrapped = DistributedDataParallel(wrapped, find_unused_parameters=False)
    return torch.compile(wrapped, backend=backend) if how == "ddp, compiled" else wrapped


def losses_and_gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}
    return {"loss": loss.detach(), **whole}


def update(model: nn.Module, optimizer, schedule, step: int) -> None:
    dispatch_clip_grad(model.parameters(), 1.0)
    optimizer.step()
    schedule.step_update(step + 1)


def sharded_weights(model: nn.Module, images: torch.Tensor) -> dict[str, object]:
    """The gathered weights (rank 0), this process's share of them, and how far another model that gets them is off."""
    share = sum(p.to_local().numel() for p in model.parameters())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    other = small_model(dtype=images.dtype)
    nn.init.zeros_(other.head.fc.weight)
    parallel(other, "sharded", "")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(whole), options=options)
    with torch.no_grad():
        off = float((other.eval()(images) - model.eval()(images)).abs().max())
    return {"model": whole, "share": share, "off": off}


class SyncBatchNormOnCPU(nn.BatchNorm2d):
    """What torch.nn.SyncBatchNorm computes, with timm's activation behind it; every process has as many images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            center = self._mean(x)
            x = x - center[:, None, None]
            variance = self._mean(x.square())
            count = x.numel() // x.shape[1] * dist.get_world_size()
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(center, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            x = x * ((variance + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(x)) if hasattr(self, "act") else x

    @staticmethod
    def _mean(x: torch.Tensor) -> torch.Tensor:
        """Over the batch of all processes; (batch, C, H, W) -> (C,)."""
        return dist.nn.functional.all_reduce(x.mean((0, 2, 3))) / dist.get_world_size()


def convert_sync_batchnorm_on_cpu(model: nn.Module) -> nn.Module:
    """timm's convert_sync_batchnorm, for layers that PyTorch and DistributedDataParallel refuse on CPUs."""
    model = convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = SyncBatchNormOnCPU
    return model


def sync_batchnorm_refuses(rank: int, folder: Path) -> None:
    """PyTorch's message on a CPU, in a file."""
    try:
        convert_sync_batchnorm(small_model()).train()(images_and_labels()[0])
    except ValueError as error:
        (folder / str(rank)).write_text(str(error))


def all_architectures(rank: int, folder: Path, names: list[str]) -> None:
    """Two steps of each; names of parameters that got no gradient, in a file."""
    without = {}
    images, labels = (x[rank::PROCESSES] for x in images_and_labels())
    for name in names:
        model = small_model(name, drop_path_rate=0.1).train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # the second forward raises where the first left a parameter out
            model.zero_grad()
            F.cross_entropy(wrapped(images), labels).backward()
        without[name] = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    torch.save(without, folder / str(rank))


# ---- resuming ----


def train(rank: int, folder: Path, run: str, resume: str = "", die: str = "") -> None:
    """Train EPOCHS epochs as train.py does it, with a checkpoint at the end of each, in folder/run.

    Args:
        resume: checkpoint to go on from.
        die: how to die by SIGKILL in the second epoch: "in mid-epoch", "while writing" its checkpoint, or "before
            renaming" it.
    """
    model = small_model().train()
    data = TensorDataset(*images_and_labels(16))
    sampler = DistributedSampler(data, PROCESSES, rank)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    optimizer, schedule = optimizer_and_schedule(model, EPOCHS * len(loader))
    start = resume_checkpoint(model, resume, optimizer) if resume else 0
    ema = ModelEmaV3(model, decay=0.9)
    if resume:
        load_checkpoint(ema.module, resume, use_ema=True)
        schedule.step_update(start * len(loader))
    wrapped = DistributedDataParallel(model)
    saver = CheckpointSaver(wrapped, optimizer, model_ema=ema, checkpoint_dir=f"{folder}/{run}", max_history=EPOCHS)
    for epoch in range(start, EPOCHS):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            if (rank, epoch, die) == (1, 1, "in mid-epoch") and step == (epoch + 0.5) * len(loader):
                kill_this_process()
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images), labels).backward()
            update(model, optimizer, schedule, step)
            ema.update(model, step=step + 1)
        distribute_bn(wrapped, PROCESSES, reduce=True)
        distribute_bn(ema, PROCESSES, reduce=True)
        if rank == 0:
            with dying(die if epoch == 1 else ""):
                saver.save_checkpoint(epoch, metric=float(epoch))


def kill_this_process(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(die: str) -> AbstractContextManager:
    """Die in timm's CheckpointSaver."""
    if die == "while writing":
        return mock.patch("torch.save", write_half)
    return mock.patch("os.replace", kill_this_process) if die == "before renaming" else nullcontext()


def write_half(state: dict, path: str, save: Callable = torch.save) -> None:
    whole = io.BytesIO()
    save(state, whole)
    Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    kill_this_process()

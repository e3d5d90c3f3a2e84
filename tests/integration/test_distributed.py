"""Training on two processes: what they compute is what one computes, and a killed run goes on where it was.

With timm's library parts; timm's train.py itself, which no wheel carries, is shown at work in docs/reports/scaling.md.
"""

import copy
from functools import cache

import pytest
import timm
import torch
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from timm.layers.norm_act import BatchNormAct2d
from timm.models import resume_checkpoint
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn import functional as F

from ..support import distributed_parts as parts

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
# Updates compared, and how far they may be off, of a tensor's largest entry. In float64, what differs is rounding alone
# (1e-11 was seen), and anything forgotten or counted twice shows. In float32, and under autocast to bfloat16, the first
# update, since LAMB's steps have the size of the weights even where a gradient is all rounding; batch norm over few
# small maps amplifies that (3e-5 was seen in float32).
TOLERANCE = {torch.float64: (3, 1e-9), torch.float32: (1, 3e-4), torch.bfloat16: (1, 1e-2)}


@cache
def one_process(dtype, norms):
    """Losses, gradients and weights of parts.train_steps, on the whole batch in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there; in bfloat16 the number changes what is rounded where, by percents
    try:
        return _one_process(dtype, norms)
    finally:
        torch.set_num_threads(threads)


def _one_process(dtype, norms):
    model, images, labels = parts.model_and_batch(dtype)
    model.train(norms != "frozen")
    optimizer, schedule = parts.optimizer_and_schedule(model)
    shares = [slice(rank, None, 2) for rank in range(2)] if norms == "own" else [slice(None)]
    log = []
    for step in range(parts.STEPS):
        optimizer.zero_grad()
        copies = [copy.deepcopy(model) for _ in shares]
        with parts.precision(dtype):
            losses = [F.cross_entropy(m(images[s]), labels[s]) for m, s in zip(copies, shares, strict=True)]
        loss = torch.stack(losses).mean()
        loss.backward()
        for p, *of_copies in zip(model.parameters(), *(m.parameters() for m in copies), strict=True):
            p.grad = torch.stack([q.grad for q in of_copies]).sum(0)
        log.append(parts.losses_and_gradients(loss, model))
        # DistributedDataParallel starts every step from the first process's running statistics; --dist-bn reduce
        # averages them at the end
        for name, buffer in model.named_buffers():
            of_copies = [m.get_buffer(name) for m in copies]
            last = step == parts.STEPS - 1 and buffer.is_floating_point()
            buffer.copy_(torch.stack(of_copies).mean(0) if last else of_copies[0])
        parts.update(model, optimizer, schedule, step)
    return log, model.state_dict()


def close(actual, expected, tolerance):
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype
        scale = float(x.abs().max())
        torch.testing.assert_close(actual[name], x, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norms", ["frozen", "own", "synchronised"])
def test_two_processes_are_one(tmp_path, norms, dtype):
    parts.launch(parts.train_steps, tmp_path, dtype, norms, "ddp")
    are_one_process(tmp_path, norms, dtype)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_compiled_processes_are_one(tmp_path, backend):
    parts.launch(parts.train_compiled, tmp_path, backend, limit=1500)
    for how in ("compiled, ddp", "ddp, compiled"):
        are_one_process(tmp_path / how, "own", torch.float64)


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_two_processes_are_one_under_autocast(tmp_path, how):
    parts.launch(parts.train_steps, tmp_path, torch.bfloat16, "own", how)
    are_one_process(tmp_path, "own", torch.bfloat16)


def test_two_sharded_processes_are_one(tmp_path):
    parts.launch(parts.train_steps, tmp_path, torch.float64, "own", "sharded")
    are_one_process(tmp_path, "own", torch.float64, sharded=True)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    model = parts.small_model(dtype=torch.float64)
    model.load_state_dict(first["model"], strict=True)  # the whole weights, by the plain model's names
    assert second["model"] == {}
    assert (first["off"], second["off"]) == (0.0, 0.0)  # and back into a sharded model
    parameters = sum(p.numel() for p in model.parameters())
    assert first["share"] + second["share"] == parameters
    assert first["share"] < 0.51 * parameters


def are_one_process(folder, norms, dtype, sharded=False):
    first, second = (torch.load(folder / str(rank)) for rank in range(2))
    log, state = one_process(dtype, norms)
    steps, tolerance = TOLERANCE[dtype]
    for actual, other, expected in zip(first["log"][:steps], second["log"], log, strict=False):
        assert all(torch.equal(other[name], x) for name, x in actual.items())
        close(actual, expected, tolerance)
    if dtype == torch.float64:
        # sharded, each process goes on from its own running statistics, not from the first one's
        expected = {name: x for name, x in state.items() if not (sharded and "running" in name)}
        close({name: first["model"][name] for name in expected}, expected, tolerance)
        assert list(first["model"]) == list(state)


def test_the_processes_need_each_other():
    """The comparison above can fail: half the batch has another gradient, and other statistics have another one yet."""
    log = {norms: one_process(torch.float64, norms)[0][0] for norms in ("own", "synchronised")}
    with pytest.raises(AssertionError, match="not close"):
        close(log["own"], log["synchronised"], 1e-2)


def test_sync_batchnorm_conversion(tmp_path):
    """train.py's --sync-bn turns every batch norm into PyTorch's, which runs on GPUs alone."""
    model = parts.small_model()
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    before = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    after = {name: m for name, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert list(after) == list(before) and len(before) == 1 + 4 * 3 + 4  # stem, blocks, shortcuts
    for name, norm in before.items():
        assert type(norm) is BatchNormAct2d and type(after[name]) is SyncBatchNormAct
        assert type(after[name].act) is type(norm.act) and after[name].eps == norm.eps
    assert {nn.Identity, nn.ReLU} == {type(m.act) for m in after.values()}
    assert list(converted.state_dict()) == list(model.state_dict())

    parts.launch(parts.sync_batchnorm_refuses, tmp_path)
    for rank in range(2):
        assert "SyncBatchNorm expected input tensor to be on GPU" in (tmp_path / str(rank)).read_text()


def test_no_architecture_has_unused_parameters(tmp_path):
    names = timm.list_models("halonet_h*") + timm.list_models("uhalonet_*")
    assert len(names) >= 16
    parts.launch(parts.all_architectures, tmp_path, names)
    for rank in range(2):
        assert torch.load(tmp_path / str(rank)) == {name: [] for name in names}


# ---- killed and resumed ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "run").mkdir()
    parts.launch(parts.train, folder, "run")
    return torch.load(folder / "run" / "last.pth.tar")


def flat(x, name=""):
    """Everything in a checkpoint by its path."""
    if isinstance(x, dict):
        return {k: v for key, value in x.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(x, list | tuple):
        return flat(dict(enumerate(x)), name)
    return {name: x}


@pytest.mark.parametrize(
    ("die", "newest"),
    [
        ("in mid-epoch", "last.pth.tar"),
        ("while writing", "last.pth.tar"),
        # timm deletes the old last.pth.tar right before: numbered checkpoints remain
        ("before renaming", "checkpoint-0.pth.tar"),
    ],
)
def test_killed_and_resumed(tmp_path, uninterrupted, die, newest):
    """SIGKILL in the second epoch loses that epoch alone: what the resumed run ends with is equal bit for bit."""
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        parts.launch(parts.train, tmp_path, "run", "", die)
    files = {"last.pth.tar", "checkpoint-0.pth.tar", "model_best.pth.tar"}
    if die != "in mid-epoch":
        files.add("tmp.pth.tar")
    if die == "before renaming":
        files.remove("last.pth.tar")
    assert {p.name for p in run.iterdir()} == files
    if die == "while writing":
        with pytest.raises(RuntimeError, match="zip archive"):
            resume_checkpoint(parts.small_model(), str(run / "tmp.pth.tar"))
    assert torch.load(run / newest)["epoch"] == 0
    of_first_epoch = (run / "checkpoint-0.pth.tar").stat()
    parts.launch(parts.train, tmp_path, "run", str(run / newest))
    assert (run / "checkpoint-0.pth.tar").stat().st_mtime_ns == of_first_epoch.st_mtime_ns  # trained once
    actual, expected = flat(torch.load(run / "last.pth.tar")), flat(uninterrupted)
    ours = {k for k in expected if k.startswith((".state_dict.", ".state_dict_ema.", ".optimizer.", ".epoch"))}
    assert {f".state_dict{ema}.head.fc.weight" for ema in ("", "_ema")} | {".epoch"} < ours
    assert any(k.startswith(".optimizer.state.") for k in ours) and ours <= set(actual)
    for key in ours:
        same = torch.equal if isinstance(expected[key], torch.Tensor) else lambda a, b: a == b
        assert same(actual[key], expected[key]), key


def test_a_hang_is_no_wait(tmp_path):
    with pytest.raises(TimeoutError, match="hang still runs after 2 s"):
        parts.launch(parts.hang, tmp_path, limit=2)

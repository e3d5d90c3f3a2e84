"""The output of an attention belongs to its caller: in-place operations behind it train as others do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from timm_halonet import HaloAttention, accelerate
from timm_halonet.families.block_unet.attention import BlockSelfAttention2d
from timm_halonet.families.eamlp.attention import ExternalAttention
from timm_halonet.families.focal.attention import FocalAttention
from timm_halonet.ops import BACKENDS, backend_for, blocked_attention, halo_attention, use_backend

# in place, and the same out of place; what stands behind the attention
TAILS = {
    "relu": (lambda y: F.relu(y, inplace=True), F.relu),
    "residual": (lambda y: y.add_(1.5), lambda y: y + 1.5),
    "dropout": (lambda y: F.dropout(y, 0.5, inplace=True), lambda y: F.dropout(y.clone(), 0.5, inplace=True)),
    "a part": (lambda y: (y[:, :1].zero_(), y)[1], lambda y: torch.cat([torch.zeros_like(y[:, :1]), y[:, 1:]], 1)),
    "twice": (lambda y: y.mul_(2).sigmoid_(), lambda y: (2 * y).sigmoid()),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.importorskip("triton")
        if not torch.cuda.is_available():
            monkeypatch.setenv("TRITON_INTERPRET", "1")


def attention(backend, **kwargs):
    """The op over five tensors that need gradients."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    like = torch.empty(1, 8, device=device)
    try:
        backend_for(like, backend)
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in [(1, 2, 3, 1, 8)] * 3 + [(7, 8)] * 2]
    tensors = [x.to(device).requires_grad_() for x in tensors]
    return tensors, lambda: halo_attention(*tensors, block_size=2, halo_size=1, backend=backend, **kwargs)


def gradients(run, tail, tensors):
    torch.manual_seed(1)
    out = tail(run())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach().clone(), *torch.autograd.grad((out * weight.to(out.device)).sum(), tensors)]


def same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_behind_the_op(backend, tail):
    tensors, run = attention(backend)
    same(gradients(run, TAILS[tail][0], tensors), gradients(run, TAILS[tail][1], tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["seen by a counter", "checkpointed", "saved on the CPU", "one table only", "vmap"])
def test_however_the_op_is_run(backend, how):
    tensors, plain = attention(backend)
    runs = {
        "checkpointed": lambda: checkpoint(plain, use_reentrant=False),
        "vmap": lambda: torch.vmap(
            lambda q: halo_attention(q, *tensors[1:], block_size=2, halo_size=1, backend=backend)
        )(tensors[0][None])[0],
    }
    run = runs.get(how, plain)
    wanted = tensors[3:4] if how == "one table only" else tensors
    expected = gradients(plain, F.relu, wanted)
    if how == "seen by a counter":
        with FlopCounterMode(display=False):
            actual = gradients(run, TAILS["relu"][0], wanted)
    elif how == "saved on the CPU":
        with save_on_cpu():
            actual = gradients(run, TAILS["relu"][0], wanted)
    else:
        actual = gradients(run, TAILS["relu"][0], wanted)
    same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [True, False])
def test_compiled(backend, inside):
    """With the in-place operation in the graph, and behind it."""
    tensors, run = attention(backend)
    expected = gradients(run, F.relu, tensors)
    relu_ = TAILS["relu"][0]
    compiled = torch.compile(lambda: relu_(run()) if inside else run(), backend="aot_eager", fullgraph=True)
    same(gradients(compiled, (lambda y: y) if inside else relu_, tensors), expected)


@pytest.mark.parametrize("kwargs", [{}, dict(stride=2), dict(stride=2, avg_down=True), dict(num_heads=2)], ids=str)
def test_behind_an_accelerated_layer(kwargs):
    torch.manual_seed(0)
    theirs = HaloAttn(32, **kwargs)
    ours, x = accelerate(copy.deepcopy(theirs)), torch.randn(2, 32, 16, 16)
    for inplace, _ in TAILS.values():
        expected = gradients(lambda: theirs(x), inplace, list(theirs.parameters()))
        for actual, exact in zip(gradients(lambda: ours(x), inplace, list(ours.parameters())), expected, strict=True):
            assert (actual - exact).norm() <= 1e-5 * exact.norm()


LAYERS = {
    "halo": (lambda: HaloAttention(16, num_heads=2), (2, 16, 9, 11)),
    "one block": (lambda: HaloAttention(16, num_heads=2), (2, 16, 8, 8)),
    "block unet": (lambda: BlockSelfAttention2d(8, 4, 6), (1, 8, 7, 9)),
    "block unet, fused": (lambda: BlockSelfAttention2d(8, 4, 6, symmetric=True), (1, 8, 7, 9)),
    "focal": (lambda: FocalAttention(16, num_heads=2), (1, 8, 9, 16)),
    "external": (lambda: ExternalAttention(16, num_heads=2), (1, 12, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_behind_every_familys_layer(name):
    torch.manual_seed(0)
    build, size = LAYERS[name]
    layer, x = build(), torch.randn(size)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for inplace, plain in TAILS.values():
        same(
            gradients(lambda: layer(x), inplace, parameters),
            gradients(lambda: layer(x), plain, parameters),
        )


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (4, 4), (5, 9)], ids=str)
@pytest.mark.parametrize("options", [dict(block_size=4), dict(block_size=4, halo=1), dict(block_size=(1, 9))], ids=str)
def test_behind_blocked_attention(size, options):
    """Of one column of blocks the output of PyTorch's attention would come back as it is."""
    tensors = [torch.randn(1, 2, *size, 16, requires_grad=True) for _ in range(3)]

    def run():
        return blocked_attention(*tensors, **options)

    for inplace, plain in TAILS.values():
        same(gradients(run, inplace, tensors), gradients(run, plain, tensors))


def test_only_gradients_cost_a_copy_of_the_output(monkeypatch):
    """Where the backward needs the output (Triton), it is copied; not without gradients, and never elsewhere."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend, copies in (("triton", 1), ("blocked", 0)):
        tensors, run = attention(backend)
        out = run()
        kept = [x for x in out.grad_fn.saved_tensors if x.shape == tensors[2].shape]
        assert len(kept) == 3 + copies
        with torch.profiler.profile() as profile, torch.no_grad():
            run()
        assert "aten::clone" not in [row.name for row in profile.events()]


def test_accelerated_layers_as_they_are_used():
    """A block's activation and its residual in place, on the backends of the CPU."""
    x = torch.randn(1, 16, 16, 16)
    for tail in (nn.ReLU(inplace=True), nn.Dropout(0.1, inplace=True)):
        model = nn.Sequential(accelerate(HaloAttn(16, num_heads=2)), tail)
        for backend in ("native", "blocked"):
            with use_backend(backend):
                y = model[0](x)
                y += x
                model[1](y).sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())

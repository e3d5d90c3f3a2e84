"""Queries, keys and values of one convolution: the same numbers as of two, and two where something asks for them."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from timm_halonet import HaloAttention
from timm_halonet.layers import halo_attention
from timm_halonet.layers.halo_attention import are_one_convolution
from timm_halonet.ops import packed
from timm_halonet.ops.native import native_backward, native_backward_packed, native_forward
from timm_halonet.ops.packed import split_keys_and_values, split_queries_keys_and_values

from .test_native import _inputs, _options, needs_native


class _Convolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func.overloadpacket is torch.ops.aten.convolution
        self.backward += func.overloadpacket is torch.ops.aten.convolution_backward
        return func(*args, **(kwargs or {}))


def layer_of(**kwargs):
    torch.manual_seed(0)
    layer = HaloAttention(16, 24, num_heads=2, dim_head=4, block_size=4, halo_size=1, **kwargs)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def map_of(memory_format=torch.channels_last, dtype=torch.float32):
    x = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).to(memory_format=memory_format).requires_grad_()


def results(layer, x):
    out = layer(x)
    return [out, *torch.autograd.grad(out.float().sin().sum(), [x, *layer.parameters()])]


BACKENDS = ["blocked", "reference", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{}, dict(qkv_bias=True), dict(stride=2, avg_down=True)], ids=str)
def test_equals_two(kwargs, backend, memory_format, monkeypatch):
    layer, x = layer_of(backend=backend, **kwargs), map_of(memory_format)
    with _Convolutions() as convolutions:
        found = results(layer, x)
    assert (convolutions.forward, convolutions.backward) == (1, 1)
    monkeypatch.setattr(halo_attention, "are_one_convolution", lambda *args: False)
    with _Convolutions() as convolutions:
        expected = results(layer, x)
    assert (convolutions.forward, convolutions.backward) == (2, 2)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_under_autocast_and_in_bfloat16():
    layer, expected = layer_of(qkv_bias=True), results(layer_of(qkv_bias=True), map_of())
    with torch.autocast("cpu", torch.bfloat16), _Convolutions() as convolutions:
        found = results(layer, map_of())
    assert convolutions.forward == 1
    low = copy.deepcopy(layer).bfloat16()
    for tensors in (found, results(low, map_of(dtype=torch.bfloat16))):
        for a, b in zip(tensors, expected, strict=True):
            assert (a.float() - b).norm() < 0.03 * b.norm()
    assert all(x.dtype == torch.float32 for x in found[1:])


def _hook(kind):
    def change(layer):
        calls = []
        getattr(layer.kv, f"register_{kind}")(lambda *args: calls.append(kind))
        return calls

    return change


class _Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class _Weight(nn.Parameter):
    """As quantised weights are, a class of its own."""


class _Subclass(nn.Conv2d):
    pass


def _with_own_forward(layer):
    inner, layer.q.forward = layer.q.forward, lambda x: 2 * inner(x)


CHANGES = {
    "forward hook": _hook("forward_hook"),
    "forward pre-hook": _hook("forward_pre_hook"),
    "backward hook": _hook("full_backward_hook"),
    "backward pre-hook": _hook("full_backward_pre_hook"),
    "wrapped": lambda layer: setattr(layer, "q", _Wrapped(layer.q)),
    "subclass": lambda layer: setattr(layer.kv, "__class__", _Subclass),
    "forward of its own": _with_own_forward,
    "parametrised": lambda layer: parametrizations.weight_norm(layer.kv),
    "weight norm of old": lambda layer: nn.utils.weight_norm(layer.q),
    "pruned": lambda layer: prune.l1_unstructured(layer.q, "weight", 0.5),
    "weight of a class": lambda layer: setattr(layer.q, "weight", _Weight(layer.q.weight.detach())),
    "frozen": lambda layer: layer.kv.requires_grad_(False),
    "bias of one": lambda layer: setattr(layer.q, "bias", nn.Parameter(torch.ones(8))),
    "larger kernel": lambda layer: setattr(layer, "q", nn.Conv2d(16, 8, 3, padding=1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", CHANGES)
def test_two_where_one_would_leave_something_out(name):
    layer, x = layer_of(backend="reference"), map_of()
    assert are_one_convolution(layer.q, layer.kv, x)
    calls = CHANGES[name](layer)
    assert not are_one_convolution(layer.q, layer.kv, x)
    with _Convolutions() as convolutions:
        out = layer(x)
    assert convolutions.forward == 2
    q, k, v = layer.project(x)
    assert torch.equal(q.flatten(3).permute(0, 3, 1, 2), layer.q(x))
    assert torch.equal(torch.cat([k, v], -1).flatten(3).permute(0, 3, 1, 2), layer.kv(x))
    if isinstance(calls, list):
        before = len(calls)
        out.sum().backward()
        assert calls and (len(calls) > before) == ("backward" in name)


def test_two_where_all_modules_are_watched():
    layer, x, seen = layer_of(), map_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.q in seen and layer.kv in seen
    assert are_one_convolution(layer.q, layer.kv, x)


def test_two_at_stride_2_and_for_exporters():
    layer, x = layer_of(stride=2), map_of()
    assert not are_one_convolution(layer.q, layer.kv, x)
    layer = layer_of(backend="reference").eval().requires_grad_(False)
    x = x.detach()
    kinds = [node.kind() for node in torch.jit.trace(layer, x).inlined_graph.nodes()]
    assert kinds.count("aten::_convolution") == 2
    for strict in (True, False):
        targets = [node.target for node in torch.export.export(layer, (x,), strict=strict).graph.nodes]
        assert targets.count(torch.ops.aten.conv2d.default) == 2
    modules = [node.target for node in torch.fx.symbolic_trace(layer).graph.nodes if node.op == "call_module"]
    assert {"q", "kv"} <= set(modules)


def test_compiled():
    layer, graphs = layer_of(qkv_bias=True), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    for a, b in zip(results(compiled, map_of()), results(layer, map_of()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert sum(node.target is torch.conv2d for node in graphs[0].graph.nodes) == 1
    layer.q.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(compiled(map_of()), layer(map_of()), atol=1e-5, rtol=1e-5)


def test_functional_call_and_samples_apart():
    layer, x = layer_of(backend="reference").double(), map_of(dtype=torch.double).detach()
    state = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(state, x):
        return torch.func.functional_call(layer, state, (x[None],)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for i, one in enumerate(x):
        layer.zero_grad()
        layer(one[None]).sin().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)


@pytest.mark.parametrize("stride", [1, 2])
def test_forward_mode_and_jacobians(stride):
    """The derivative along a direction, and the same from gradients that are taken all at once."""
    layer, x = layer_of(stride=stride, backend="reference").double(), map_of(dtype=torch.double)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along))).tangent
    out = layer(x)
    each = torch.eye(out.numel(), dtype=torch.double)[:5].unflatten(1, out.shape)
    (rows,) = torch.autograd.grad(out, x, each, is_grads_batched=True)
    torch.testing.assert_close((rows * along).flatten(1).sum(1), tangent.flatten()[:5])
    layer.backend = "blocked"
    (others,) = torch.autograd.grad(layer(x), x, each, is_grads_batched=True)
    torch.testing.assert_close(others, rows)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (4, 12), (36, 44)], ids=str)
def test_native_gradients_are_slices_of_one(dims, memory_format, dtype):
    options = _options((4, 1, 1), dims, (True, False, True))
    inputs, grad = _inputs((6, 5), (4, 1, 1), dims)
    tables = inputs[3:]
    q, k, v = (x.to(dtype) for x in inputs[:3])
    whole = torch.randn(2, 2 * (2 * dims[0] + dims[1]), 6, 5).to(dtype).to(memory_format=memory_format)
    cases = [
        (3, split_queries_keys_and_values(whole.permute(0, 2, 3, 1), 2, dims[0])),
        (2, (q, *split_keys_and_values(torch.cat([k, v], -1).flatten(3), 2, dims[0]))),
        (0, (q, k.contiguous(), v.contiguous())),
    ]
    grad = grad.to(dtype)
    for together, (q, k, v) in cases:
        out, saved = native_forward(q, k, v, *tables, options)
        expected = native_backward(grad, q, k, v, *tables, out, saved, options)
        found = native_backward_packed(grad, q, k, v, *tables, out, saved, options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(x._base is None for x in expected)
        dq, dk, dv, *_ = found
        assert packed.slices_of_one(q, k, v) == together
        assert (dk._base is not None and dk._base is dv._base) == (together > 0)
        assert (dq._base is not None and dq._base is dk._base) == (together == 3)


@needs_native
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_layers_gradients_need_no_cat(stride, memory_format, monkeypatch):
    wholes, whole_of = [], packed.whole_of

    def kept(*parts):
        wholes.append((parts[-1]._base, whole_of(*parts)))
        return wholes[-1][1]

    monkeypatch.setattr(packed, "whole_of", kept)
    layer = layer_of(stride=stride, backend="native")
    results(layer, map_of(memory_format))
    (base, whole), *more = wholes
    assert not more and whole is base
    assert whole.shape == (2, 6, 5, 2 * (4 + 12) + (8 if stride == 1 else 0))


SPLIT = {"kv": split_keys_and_values, "qkv": split_queries_keys_and_values}


@pytest.mark.parametrize("name", SPLIT)
def test_split_is_differentiable_twice(name):
    split, first = SPLIT[name], 6 if name == "qkv" else 0
    x = torch.randn(1, 2, 1, first + 10, dtype=torch.double, requires_grad=True)
    *q, k, v = split(x, 2, 3)
    assert [y.shape for y in q] == [k.shape] * len(q)
    assert torch.equal(torch.cat([y.flatten(3) for y in q] + [torch.cat([k, v], -1).flatten(3)], -1), x)
    for i in range(len(name)):

        def one(x, i=i):  # the others have no gradient
            return split(x, 2, 3)[i].sin() * 2

        assert torch.autograd.gradcheck(one, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(one, x, fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("name", SPLIT)
def test_only_slices_that_fit_are_taken_for_one_tensor(name):
    split, whole = SPLIT[name], torch.randn(2, 3, 1, 20)
    *q, k, v = split(whole, 2, 3)
    assert packed.whole_of(*q, k, v) is whole
    others = [
        (*q, k.clone(), v),
        (*q, k, v + 0),
        (*q, k, v.flip(0)),
        (*q, k.flip(3), v),
        [x.clone() for x in (*q, k, v)],
        [x[:1] for x in (*q, k, v)],
        [x[..., :2] for x in (*q, k, v)],
        split(whole.transpose(0, 1), 2, 3),
        split(whole[:1].expand(2, -1, -1, -1), 2, 3),
        split(torch.randn(2, 3, 1, 24)[..., :20], 2, 3),
        split(torch.randn(2, 3, 1, 24)[..., 4:], 2, 3),
    ]
    if q:
        others += [(q[0].clone(), k, v), (k, q[0], v), (q[0], q[0], v)]
    for parts in others:
        found = packed.whole_of(*parts)
        assert found.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in parts}
        for a, b in zip(split(found, 2, parts[-2].shape[-1]), parts, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "blocked"])
@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_gradients_are_one_tensor(stride, backend):
    """torch.compile's backward hands the gradients of q, k and v to the convolution without putting them together."""
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=2, stride=stride, backend=backend)
    x = torch.randn(2, 16, 12, 10).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).sin().sum(), leaves)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    for _ in range(2):
        actual = torch.autograd.grad(compiled(x).sin().sum(), leaves)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    called = [str(node.target) for node in graphs[1].graph.nodes]
    if stride == 1:
        assert f"timm_halonet.halo_attention_{backend}_backward_packed.default" in called
        assert "aten.cat.default" not in called
    else:
        assert f"timm_halonet.halo_attention_{backend}_backward.default" in called


@needs_native
def test_the_packed_backward_checks_what_it_gets():
    """A compiled graph comes to it past the checks of `halo_attention`."""
    q = k = v = torch.randn(1, 4, 4, 2, 8)
    table, nothing, saved = torch.randn(15, 8), torch.empty(0), torch.empty(1, 4, 4, 2, 2)
    run = torch.ops.timm_halonet.halo_attention_native_backward_packed
    options = (4, 2, 1, 1.0, False, True, 1)
    with pytest.raises(ValueError, match=r"must be \(1, 4, 4, 2, 8\), got \(1, 4, 4, 2, 7\)"):
        run(torch.randn(1, 4, 4, 2, 7), q, k, v, table, table, nothing, saved, *options)
    with pytest.raises(ValueError, match="rel_height"):
        run(q, q, k, v, table[1:], table, nothing, saved, *options)

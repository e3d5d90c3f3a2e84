"""The form of halo attention that exporters get: equal to the reference, and made of what every engine has."""

import math
from collections import Counter

import pytest
import torch

from timm_halonet import use_backend
from timm_halonet.layers import HaloAttention
from timm_halonet.ops import backend_for, export
from timm_halonet.ops.export import halo_attention_export
from timm_halonet.ops.options import make_options
from timm_halonet.ops.reference import halo_attention_reference

SIZES = [(1, 1), (3, 5), (8, 16), (19, 38), (12, 12)]
# block, halo, query stride: windows of one, two, three and more blocks
GEOMETRIES = [(8, 3, 1), (8, 3, 2), (7, 2, 1), (4, 0, 2), (4, 4, 1), (2, 3, 1), (1, 2, 1), (3, 5, 3)]


def make(size, block, halo, stride, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    height, width = size
    shapes = [(2, -(-height // stride), -(-width // stride), 2, 6), (2, height, width, 2, 6), (2, height, width, 2, 5)]
    shapes += [(2 * (block + 2 * halo) - 1, 6)] * 2
    factors = (1, scale, 1, scale, scale)
    return [
        f * torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s, f in zip(shapes, factors, strict=True)
    ]


@pytest.mark.parametrize("scale_rel", [True, False])
@pytest.mark.parametrize("strided_rel", ["true", "grid"])
@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_the_reference(geometry, mask_border, strided_rel, scale_rel):
    options = make_options(*geometry, 0.4, scale_rel, mask_border, strided_rel)
    for size in SIZES:
        tensors = make(size, *geometry)
        expected = halo_attention_reference(*tensors, options)
        torch.testing.assert_close(halo_attention_export(*tensors, options), expected, rtol=1e-10, atol=1e-12)
        actual = halo_attention_export(*(x.float() for x in tensors), options)
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("dim_v", [6, 5])
@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_onnx_gets_equals_the_reference(geometry, mask_border, dim_v, images, monkeypatch):
    """Each head by itself; keys and values that are as wide are one map's rows; one square image has fewer reshapes."""
    monkeypatch.setattr(export, "_is_for_onnx", lambda: True)
    monkeypatch.setenv("TIMM_HALONET_ONNX_SCAN", "0")
    options = make_options(*geometry, 0.4, False, mask_border, "true")
    for size in [(1, 1), (7, 7), (12, 12), (19, 19), (5, 12)]:
        q, k, v, *tables = make(size, *geometry)
        tensors = [q[:images], k[:images], torch.cat([v, v.flip(1, 2)], -1)[:images, ..., :dim_v], *tables]
        expected = halo_attention_reference(*tensors, options)
        torch.testing.assert_close(halo_attention_export(*tensors, options), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("images", "reshapes"), [(1, 6), (2, 10)])
def test_nodes_of_a_layer_in_onnx(images, reshapes, tmp_path):
    """Two convolutions, their two maps with channels last and the output back, keys once: no other transposition."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.onnx.export(layer(), (torch.randn(images, 16, 12, 12),), str(tmp_path / "a.onnx"), dynamo=True)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node)
    expected = {"Conv": 2, "Transpose": 4, "Gather": 6, "MatMul": 4, "Reshape": reshapes}
    assert kinds == expected | {"Mul": 1, "Sub": 1, "Add": 1, "Softmax": 1}


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (19, 17)])
def test_logits_of_any_size(size):
    """What is outside the map never outweighs it: no finite constant stands in for minus infinity."""
    options = make_options(8, 3, 1, 1.0, False, True, "true")
    tensors = make(size, 8, 3, 1, scale=3000.0)
    tensors[1] = -tensors[1].abs() * tensors[0].sign().amax(3, keepdim=True)
    out = halo_attention_export(*tensors, options)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, halo_attention_reference(*tensors, options), rtol=1e-9, atol=1e-9)


def test_gradients():
    options = make_options(4, 2, 2, 0.4, True, True, "true")
    tensors = [x.requires_grad_() for x in make((5, 7), 4, 2, 2)]
    weight = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = [
        torch.autograd.grad((f(*tensors, options) * weight).sum(), tensors)
        for f in (halo_attention_export, halo_attention_reference)
    ]
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    options = make_options(4, 2, 1, 0.4, False, True, "true")
    tensors = make((6, 7), 4, 2, 1, dtype)
    expected = halo_attention_reference(*(x.double() for x in tensors), options)
    actual = halo_attention_export(*tensors, options)
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() < 0.02 * expected.norm()


def layer(**kwargs):
    torch.manual_seed(0)
    return HaloAttention(16, num_heads=2, block_size=4, halo_size=2, **kwargs).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
@pytest.mark.parametrize("mask_border", [True, False])
def test_only_what_every_engine_has(mask_border, size):
    program = torch.export.export(layer(mask_border=mask_border), (torch.randn(2, 16, *size),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("gather", "index.Tensor", "unfold", "einsum", "as_strided", "where", "and", "timm_halonet"):
        assert not [n for n in names if name in n.removeprefix("aten.expand")], names
    for node in program.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.Tensor) or value.ndim <= 5, node
        assert not [a for a in node.args if isinstance(a, float) and (math.isinf(a) or abs(a) > 100)], node


def test_what_depends_on_sizes_only_is_constant():
    """Operators that do not depend on the map: those that lay out the two tables."""
    program = torch.export.export(layer(), (torch.randn(2, 16, 8, 12),))
    [x] = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    from_map, names = {x}, []
    for node in program.graph.nodes:
        if from_map & set(node.all_input_nodes):
            from_map.add(node)
        elif node.op == "call_function":
            names.append(str(node.target))
    assert sorted(names) == ["aten.embedding.default"] * 2 + ["aten.transpose.int"] * 2


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_products_and_softmax_are_one_chain(size):
    """Without a reshape in between, which would keep engines from fusing them."""
    program = torch.export.export(layer(), (torch.randn(2, 16, *size),))
    [softmax] = [n for n in program.graph.nodes if "softmax" in str(n.target)]
    chain = [softmax.args[0].args[0], softmax.args[0], softmax, *softmax.users]
    kinds = ["aten.matmul.default", "aten.add.Tensor", "aten.softmax.int", "aten.matmul.default"]
    assert [str(node.target) for node in chain] == kinds


def test_nothing_is_masked_where_there_is_no_border():
    def operators(**kwargs):
        program = torch.export.export(layer(**kwargs), (torch.randn(2, 16, 8, 12),))
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    assert "aten.sub.Tensor" in operators()
    assert "aten.sub.Tensor" not in operators(mask_border=False)


@pytest.mark.parametrize(
    ("size", "keys"),
    [((4, 4), 16), ((8, 4), 24), ((8, 8), 36), ((3, 8), 18), ((8, 12), 48), ((12, 12), 64), ((7, 4), 32)],
)
def test_small_maps_have_no_keys_outside(size, keys):
    """Windows of 8 x 8 pixels around blocks of 4 x 4: in maps of one block or two, only what lies inside."""
    program = torch.export.export(layer(), (torch.randn(2, 16, *size),))
    [softmax] = [n for n in program.graph.nodes if "softmax" in str(n.target)]
    assert softmax.meta["val"].shape[-1] == keys


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2}, {"mask_border": False, "strided_rel": "grid", "stride": 2}])
def test_scripted_and_traced_for_other_sizes(kwargs):
    module = layer(**kwargs)
    scripted = torch.jit.script(module)
    traced = torch.jit.trace(module, torch.randn(2, 16, 8, 8), check_trace=False)
    for size in [(8, 8), (1, 1), (5, 7), (13, 4)]:
        x = torch.randn(3, 16, *size)
        for run in (scripted, traced):
            torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 11])
def test_an_opset_that_is_too_old_is_refused(tmp_path, opset):
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=f"opset_version={opset} is too old .* needs 12 or newer"):
        torch.onnx.export(
            layer(), (torch.randn(1, 16, 8, 8),), str(tmp_path / "x.onnx"), dynamo=False, opset_version=opset
        )


class Noting(torch.nn.Module):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        return self.note(x) + 1


def test_torch_export_keeps_the_op_of_a_backend():
    """Inside `use_backend` only: a layer's own backend is what it runs on, not what it is exported with."""
    module, x = layer(), torch.randn(2, 16, 8, 12)

    def ops(program):
        return [str(n.target) for n in program.graph.nodes if "timm_halonet" in str(n.target)]

    assert not ops(torch.export.export(layer(backend="blocked"), (x,)))
    with use_backend("blocked"):
        program = torch.export.export(module, (x,))
    assert ops(program) == ["timm_halonet.halo_attention_blocked.default"]
    torch.testing.assert_close(program.module()(x), module(x))


def test_onnx_gets_plain_operators_inside_use_backend(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with use_backend("blocked"):
        torch.onnx.export(layer(), (torch.randn(1, 16, 8, 8),), str(tmp_path / "a.onnx"), dynamo=True)
    assert {node.domain for node in onnx.load(tmp_path / "a.onnx").graph.node} == {""}


def test_who_gets_it():
    """Tracers, whatever is forced, but the reference, which is made of plain operators too."""
    chosen = []

    def note(x):
        chosen.append(backend_for(x))
        return x

    q = torch.zeros(1, 1, 1, 1, 4)
    torch.jit.trace(note, q, check_trace=False)
    for name in ("blocked", "reference"):
        with use_backend(name):
            torch.jit.trace(note, q, check_trace=False)
    assert chosen == ["export", "export", "reference"]
    torch.export.export(Noting(note), (q,), strict=False)
    for name in ("blocked", "reference"):
        with use_backend(name):
            torch.export.export(Noting(note), (q,), strict=False)
    assert chosen[3:] == ["export", "blocked", "reference"]
    with pytest.raises(ValueError, match="unknown halo attention backend 'export'"):
        backend_for(q, "export")

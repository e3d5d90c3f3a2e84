"""Exported models in the engines people deploy with: a tiny model of each family with halo attention equals PyTorch.

Each engine is skipped where it is not installed (extra `deploy`).
"""

import numpy as np
import pytest
import timm
import torch

import timm_halonet
from timm_halonet.ops import BACKENDS

MODELS = {
    "halonet": ("halonet_h0", dict(depths=(1, 1, 1, 1), zero_init_last=False)),
    "uhalonet": ("uhalonet_micro", {}),
    "timm": ("halonet26t", {}),
}
SIZE = (2, 3, 64, 64)
PARTIAL = (1, 3, 72, 104)  # blocks do not cover its maps exactly


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, kwargs = MODELS[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval().requires_grad_(False)
    return timm_halonet.accelerate(model) if request.param == "timm" else model


def close(actual, expected, tolerance=1e-5):
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("backend", ["native", "blocked"])
def test_aotinductor_with_the_op(backend, tmp_path):
    """What torch.export keeps inside `use_backend` is called from the compiled package."""
    layer = timm_halonet.layers.HaloAttention(16, num_heads=2, block_size=4, halo_size=2).eval().requires_grad_(False)
    x = torch.randn(2, 16, 12, 10)
    if reason := BACKENDS[backend][1](x):
        pytest.skip(reason)
    with timm_halonet.use_backend(backend):
        program = torch.export.export(layer, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    run = torch._inductor.aoti_load_package(package)
    with torch.profiler.profile() as profile:
        actual = run(x)
    assert f"timm_halonet::halo_attention_{backend}" in {event.name for event in profile.events()}
    close(actual, layer(x))


def test_onnx_runtime(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    path = str(tmp_path / "model.onnx")
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        model, (torch.randn(SIZE),), path, opset_version=17, dynamo=False, input_names=["x"], dynamic_axes=axes
    )
    session = runtime.InferenceSession(path)
    for size in (SIZE, (1, 3, 64, 64), (3, 3, 96, 80)):
        x = torch.randn(size)
        close(session.run(None, {"x": x.numpy()})[0], model(x))


def test_onnx_runtime_fixed_size(model, tmp_path):
    """PyTorch's default exporter; nothing that depends on sizes only is left to compute."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (torch.randn(SIZE),), path, dynamo=True, input_names=["x"], external_data=False)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Range", "Shape", "Where", "And", "Einsum", "ConstantOfShape", "Unsqueeze", "Slice"}
    session = runtime.InferenceSession(path)
    for _ in range(2):
        x = torch.randn(SIZE)
        close(session.run(None, {"x": x.numpy()})[0], model(x))


@pytest.mark.parametrize("sizes", ["fixed", "any batch"])
@pytest.mark.parametrize(("size", "group"), [((2, 16, 24, 16), 4), ((1, 16, 19, 10), 5)])
def test_groups_of_windows_in_onnx(size, group, sizes, tmp_path, monkeypatch):
    """`Scan` over groups of windows, where a cache would not hold the logits of all; in each of two layers."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(timm_halonet.ops.export, "GROUP_BYTES", 4 * 4**2 * 8**2 * 5)  # of five windows, at most
    layers = [timm_halonet.layers.HaloAttention(16, num_heads=2, block_size=4, halo_size=2) for _ in range(2)]
    module = torch.nn.Sequential(*layers).eval().requires_grad_(False)

    def exported(name):
        path = str(tmp_path / name)
        shapes, batch = (None, size[0]) if sizes == "fixed" else (({0: torch.export.Dim.DYNAMIC},), 3)
        options = dict(dynamo=True, input_names=["x"], external_data=False, dynamic_shapes=shapes)
        torch.onnx.export(module, (torch.randn(batch, *size[1:]),), path, **options)
        return path

    path = exported("scan.onnx")
    scans = [node for node in onnx.load(path).graph.node if node.op_type == "Scan"]
    bodies = [attribute.g for node in scans for attribute in node.attribute if attribute.name == "body"]
    assert [body.output[1].type.tensor_type.shape.dim[0].dim_value for body in bodies] == [group, group]
    session = runtime.InferenceSession(path)
    for batch in (size[0],) if sizes == "fixed" else (1, size[0], 5):
        x = torch.randn(batch, *size[1:])
        close(session.run(None, {"x": x.numpy()})[0], module(x))
    monkeypatch.setenv("TIMM_HALONET_ONNX_SCAN", "0")
    assert "Scan" not in {node.op_type for node in onnx.load(exported("plain.onnx")).graph.node}


def test_no_scan_over_many_small_groups(tmp_path, monkeypatch):
    """121 windows have no divisor near the ten that a group could have."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layer = timm_halonet.layers.HaloAttention(16, num_heads=1, block_size=4, halo_size=2).eval().requires_grad_(False)
    found = []
    for most in (11, 10):
        monkeypatch.setattr(timm_halonet.ops.export, "GROUP_BYTES", 4 * 4**2 * 8**2 * most)
        path = str(tmp_path / f"{most}.onnx")
        torch.onnx.export(layer, (torch.randn(1, 16, 44, 44),), path, dynamo=True, external_data=False)
        found.append("Scan" in {node.op_type for node in onnx.load(path).graph.node})
    assert found == [True, False]


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
@pytest.mark.parametrize("size", [SIZE, PARTIAL])
def test_openvino_from_torch_export(model, size, shapes):
    ov = pytest.importorskip("openvino")
    fixed = {"input": size} if shapes == "static" else {}
    converted = ov.convert_model(torch.export.export(model, (torch.randn(size),)), **fixed)
    compiled = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for _ in range(3):
        x = torch.randn(size)
        close(compiled(x.numpy())[0], model(x))


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_openvino(model, shapes):
    """Dynamic shapes are what convert_model makes of an example."""
    ov = pytest.importorskip("openvino")
    fixed = {"input": [SIZE]} if shapes == "static" else {}
    converted = ov.convert_model(model, example_input=torch.randn(SIZE), **fixed)
    compiled = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (SIZE, SIZE) if fixed else (SIZE, SIZE, (1, 3, 64, 64), (3, 3, 96, 80)):
        x = torch.randn(size)
        close(compiled(x.numpy())[0], model(x))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_focal_in_onnx_runtime(tmp_path, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model("focal_transformer_tiny", num_classes=10, depths=(1, 1, 1, 1)).eval()
    x, path = torch.randn(1, 3, 64, 64), str(tmp_path / "model.onnx")
    model.requires_grad_(False)
    torch.onnx.export(model, (x,), path, opset_version=18, dynamo=dynamo, input_names=["x"])
    close(runtime.InferenceSession(path).run(None, {"x": x.numpy()})[0], model(x))


@pytest.fixture
def tiny():
    """One HaloNet for the engines of phones, whose converters are slow."""
    torch.manual_seed(0)
    name, kwargs = MODELS["halonet"]
    return timm.create_model(name, num_classes=10, **kwargs).eval().requires_grad_(False)


@pytest.mark.parametrize("path", ["export", "trace"])
def test_coreml_converts(tiny, path):
    """Its runtime is on macOS only."""
    ct = pytest.importorskip("coremltools", reason="pip install coremltools 'numpy<2.4'")
    if path == "trace" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("coremltools 9.0 makes integers of arrays, which NumPy 2.4 refuses")
    x = torch.randn(1, 3, 64, 64)
    target = ct.target.iOS17
    if path == "export":
        program = torch.export.export(tiny, (x,)).run_decompositions({})
        converted = ct.convert(program, minimum_deployment_target=target)
    else:
        inputs = [ct.TensorType(shape=x.shape)]
        converted = ct.convert(torch.jit.trace(tiny, x), inputs=inputs, minimum_deployment_target=target)
    [function] = converted.get_spec().mlProgram.functions.values()
    [block] = function.block_specializations.values()
    kinds = [operation.type for operation in block.operations]
    assert kinds.count("softmax") == 4  # an attention a stage


def test_litert(tiny):
    litert_torch = pytest.importorskip("litert_torch", reason="pip install litert-torch")
    converted = litert_torch.convert(tiny, (torch.randn(1, 3, 64, 64),))
    for _ in range(2):
        x = torch.randn(1, 3, 64, 64)
        close(converted(x.numpy()), tiny(x))


@pytest.mark.parametrize("delegate", ["xnnpack", "portable"])
def test_executorch(tiny, delegate):
    exir = pytest.importorskip("executorch.exir", reason="pip install executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    program = torch.export.export(tiny, (torch.randn(1, 3, 64, 64),))
    partitioner = [XnnpackPartitioner()] if delegate == "xnnpack" else []
    lowered = exir.to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    for _ in range(2):
        x = torch.randn(1, 3, 64, 64)
        close(method.execute([x])[0], tiny(x))

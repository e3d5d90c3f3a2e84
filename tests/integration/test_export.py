"""What a trained model goes through on its way out of eager float32: exporters, compilers, dtypes, memory formats.

The model is halonet_h0 with one block a stage, strided and not, and batch norms that let the attention through: timm's
initialisation sets the last one of a block to zero, and any attention would pass. What holds for every family is in
tests/families/test_every_family.py.
"""

import copy
import inspect

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

from timm_halonet.layers import HaloAttention
from timm_halonet.models.halonet import HaloBottleneck

SIZES = [(2, 3, 64, 96), (3, 3, 75, 50)]
LARGE = [(2, 3, 160, 192), (1, 3, 203, 330)]
EVERY_DIM = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def build(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("halonet_h0", depths=(1, 1, 1, 1), num_classes=10, zero_init_last=False, **kwargs)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(model):
    """Exported at the first of the large sizes, sides above 128 pixels."""
    return torch.export.export(model, (torch.randn(LARGE[0]),), dynamic_shapes=(EVERY_DIM,))


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < tolerance, f"relative error {error:.2e}"


def attentions(model):
    return [m for m in model.modules() if isinstance(m, HaloAttention)]


def test_the_model_under_test_depends_on_its_attention(model):
    x = torch.randn(SIZES[0])
    other = copy.deepcopy(model)
    nn.init.zeros_(attentions(other)[-1].pos_embed.height_rel)
    with pytest.raises(AssertionError, match="relative error"):
        close(other(x), model(x))


# ---- exporters ----


@pytest.mark.parametrize("size", [LARGE[0], (1, 3, 203, 331), LARGE[1], (5, 3, 131, 132), (5, 3, 129, 129)])
def test_torch_export_with_dynamic_batch_height_and_width(model, exported, pooling_takes_any_size, size):
    if not pooling_takes_any_size and any(-(-x // 2) % 2 for x in size[2:]):
        pytest.skip("this PyTorch exports max pooling for the example's parity only: a stem map of even size")
    x = torch.randn(size)
    close(exported.module()(x), model(x))


def test_torch_export_is_plain_pytorch(exported):
    assert not [node for node in exported.graph.nodes if "timm_halonet" in str(node.target)]


def test_torch_export_of_a_small_map_with_dynamic_batch(model):
    # below 129 pixels some map is a single block, and that becomes part of the graph: height and width stay fixed
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    x = torch.randn(5, *SIZES[0][1:])
    close(program(x), model(x))
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.randn(SIZES[1]))


def onnx_run(path, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_export_with_dynamic_batch_height_and_width(model, tmp_path, dynamo):
    """Both exporters as timm's onnx_export.py calls them (with --dynamic-size), down to single-block maps."""
    pytest.importorskip("onnxscript")
    export = pytest.importorskip("timm.utils.onnx").onnx_export
    if dynamo and "external_data" not in inspect.signature(export).parameters:
        pytest.skip("this timm's onnx_export calls a function that PyTorch no longer has")
    path = tmp_path / "model.onnx"
    export(model, str(path), torch.randn(SIZES[0]), dynamic_size=True, use_dynamo=dynamo, check=True)
    for size in [*SIZES, LARGE[1]]:
        x = torch.randn(size)
        close(onnx_run(path, x), model(x), 1e-4)


def test_traced_at_another_size(model):
    traced = torch.jit.trace(model, torch.randn(SIZES[0]), check_trace=False)
    x = torch.randn(SIZES[1])
    close(traced(x), model(x))


# ---- compilers ----


def gradients(run, model, x):
    model.zero_grad()
    out = run(x)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def compiled(backend, model):
    """The compiled model, and what counts the graphs that it was compiled to."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


def graphs_of_training(backend, sizes, model):
    """How many graphs there are after each size, once outputs and gradients are found to be those of eager."""
    run, counter = compiled(backend, model)
    counts = []
    for size in sizes:  # PyTorch's own convolution has other graphs for batches of 1, and of 16 and more
        x = torch.randn(size)
        out, grad = gradients(run, model, x)
        expected_out, expected_grad = gradients(model, model, x)
        close(out, expected_out, 1e-4)
        close(grad, expected_grad, 1e-4)
        counts.append(counter.frame_count)
    return counts


def of_one_graph(pooling_takes_any_size):
    return SIZES if pooling_takes_any_size else [SIZES[0], (3, 3, 75, 51)]


def test_compile_dynamic(pooling_takes_any_size):
    # eval: batch statistics of few pixels would amplify rounding
    counts = graphs_of_training("aot_eager", [*of_one_graph(pooling_takes_any_size), LARGE[0]], build())
    assert len(set(counts)) == 1, "compiled again for another size"


@pytest.mark.slow
def test_inductor_infers_other_sizes_by_one_graph(pooling_takes_any_size):
    model = build().requires_grad_(False)
    run, counter = compiled("inductor", model)
    counts = []
    for size in [*of_one_graph(pooling_takes_any_size), LARGE[0]]:
        x = torch.randn(size)
        close(run(x), model(x), 1e-4)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, "compiled again for another size"


@pytest.mark.slow
def test_inductor_trains_other_sizes_by_as_few_graphs_as_a_resnet(pooling_takes_any_size):
    """Its backward is compiled for the strides that a forward's convolutions happened to have, whatever the model."""
    sizes = of_one_graph(pooling_takes_any_size)  # its kernels for sums over more than 4096 pixels are others
    counts = graphs_of_training("inductor", sizes, build())
    resnet = graphs_of_training("inductor", sizes, timm.create_model("resnet10t", num_classes=10).eval())
    assert counts[-1] - counts[0] <= resnet[-1] - resnet[0]


def test_compile_static_training_step():
    torch._dynamo.reset()
    model = build().train()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    _, grad = gradients(compiled, model, torch.randn(SIZES[0]))
    assert torch.isfinite(grad).all() and grad.norm() > 0


# ---- devices, dtypes, memory formats ----


def test_meta_device(model):
    for meta in (build(device="meta"), build().to("meta")):
        assert all(x.is_meta for x in [*meta.parameters(), *meta.buffers()])
        assert meta(torch.randn(SIZES[1], device="meta")).shape == (3, 10)
        meta.to_empty(device="cpu").load_state_dict(model.state_dict())  # nothing outside the state dict to restore
        x = torch.randn(SIZES[1])
        close(meta(x), model(x))


def test_dtype_argument():
    model = build(dtype=torch.bfloat16)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(SIZES[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_attention_has_no_buffers(model):
    assert len(attentions(model)) == 4
    assert not [name for attention in attentions(model) for name, _ in attention.named_buffers()]


@pytest.mark.parametrize("training", [False, True])
def test_channels_last_is_kept_from_stem_to_head(training):
    model = build().to(memory_format=torch.channels_last).train(training)
    watched = [model.stem, model.stages] + [m for m in model.modules() if isinstance(m, HaloAttention | HaloBottleneck)]
    strides = []
    for module in watched:
        module.register_forward_hook(
            lambda m, args, out: strides.append(
                (type(m).__name__, out.is_contiguous(memory_format=torch.channels_last), tuple(out.shape))
            )
        )
    x = torch.randn(SIZES[0]).to(memory_format=torch.channels_last).requires_grad_()
    model(x).sum().backward()
    assert len(strides) == len(watched) == 10
    assert all(kept for _, kept, _ in strides), strides
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


# ---- training machinery ----


def test_sync_batchnorm_conversion(model):
    synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    x = torch.randn(SIZES[0])
    close(synced(x), model(x))


def test_ddp_without_unused_parameters():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build().train()
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # the second forward raises where the first left a parameter out
            _, grad = gradients(ddp, model, torch.randn(SIZES[0]))
        assert torch.isfinite(grad).all()
    finally:
        dist.destroy_process_group()

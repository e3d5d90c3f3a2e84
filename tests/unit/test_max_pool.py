"""The stem's pooling: torch's own, whatever compiles, exports or scripts it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from timm_halonet.layers.max_pool import MaxPool2d


def image(size=(7, 10), dtype=torch.float32):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def ops(graph):
    return [str(node.target) for node in graph.nodes if "timm_halonet.max_pool2d" in str(node.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_equals_eager(dtype):
    graphs = []

    def note(module, inputs):
        graphs.append(module.graph)
        return module.forward

    pool = torch.compile(MaxPool2d(3, 2, 1), backend=aot_autograd(fw_compiler=note))
    for size in [(7, 10), (8, 8)]:
        x, y = image(size, dtype).requires_grad_(), image(size, dtype).requires_grad_()
        actual, expected = pool(x), F.max_pool2d(y, 3, 2, 1)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()
        weight = torch.arange(float(actual.numel())).reshape(actual.shape).to(dtype)
        for out in (actual, expected):
            (out * weight).sum().backward()
        assert torch.equal(x.grad, y.grad) and x.grad.stride() == y.grad.stride()
    names = {op for graph in graphs for op in ops(graph)}
    assert names == {"timm_halonet.max_pool2d.default", "timm_halonet.max_pool2d_backward.default"}


def test_without_gradients_it_is_torchs():
    seen = []

    def note(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = image()
    torch.testing.assert_close(torch.compile(MaxPool2d(3, 2, 1), backend=note)(x), F.max_pool2d(x, 3, 2, 1))
    assert seen and not [name for name in seen if "timm_halonet" in name]


def test_exported_scripted_and_traced_it_is_torchs():
    pool, x = MaxPool2d(3, 2, 1), image().requires_grad_()
    for strict in (False, True):
        program = torch.export.export(pool, (x,), strict=strict)
        assert not ops(program.graph)
        assert torch.equal(program.module()(x), F.max_pool2d(x, 3, 2, 1))
    for module in (torch.jit.script(pool), torch.jit.trace(pool, x)):
        assert torch.equal(module(image((5, 5))), F.max_pool2d(image((5, 5)), 3, 2, 1))


def test_the_ops_keep_their_promises():
    x = image().requires_grad_()
    torch.library.opcheck(torch.ops.timm_halonet.max_pool2d, (x, 3, 2, 1))
    out, index = torch.ops.timm_halonet.max_pool2d(x.detach(), 3, 2, 1)
    torch.library.opcheck(torch.ops.timm_halonet.max_pool2d_backward, (out, x.detach(), index, 3, 2, 1))


@pytest.mark.parametrize("name", ["halonet_h0", "halonet_h4"])
def test_models_have_it(name):
    pool = timm.create_model(name).stem.pool
    assert isinstance(pool, MaxPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)

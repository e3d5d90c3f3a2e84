"""What a layer launches in training next to its convolutions; gradients as slices of one tensor."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_halonet.layers import HaloAttention
from timm_halonet.ops import custom_op, halo_attention, packed, triton
from timm_halonet.ops.packed import split_keys_and_values, split_queries_keys_and_values
from timm_halonet.ops.triton import triton_backward, triton_backward_packed, triton_forward, triton_forward_keeping

from .test_native import _inputs, _options
from .test_triton import DEVICE, interpreter  # noqa: F401

pytest.importorskip("triton")
# what launches nothing: views, and memory that nobody fills
NOTHING = {
    *("alias", "as_strided", "detach", "empty", "empty_strided", "expand", "new_empty", "permute", "select", "slice"),
    *("split", "split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
}


class _Launched(TorchDispatchMode):
    """The operators that launch kernels, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def __getattr__(self, kernel):
        """In place of the module of the Triton kernels."""
        if kernel.startswith("_") or not kernel.endswith("_kernel"):
            raise AttributeError(kernel)
        launched = self

        class Launcher:
            def __getitem__(self, grid):
                def launch(*args, **meta):
                    launched.names[kernel] += 1

                return launch

        return Launcher()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_that_a_layer_launches(stride, autocast, monkeypatch):
    """Five next to the convolutions and, under autocast, the casts of their weights: no cat but of these, no casts of
    the tables, no copies of the maps."""
    launched = _Launched()
    monkeypatch.setattr(triton, "_kernels", lambda: launched)
    monkeypatch.setattr(custom_op, "_plain", lambda tensors: True)  # as without the mode that counts
    layer = HaloAttention(32, 48, stride=stride, num_heads=2, dim_head=16, block_size=8, backend="triton")
    x = torch.randn(2, 32, 16, 16).to(memory_format=torch.channels_last)
    x = (x.bfloat16() if autocast else x).requires_grad_()
    grad = torch.ones(2, 48, 16 // stride, 16 // stride, dtype=x.dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), launched:
        out = layer(x)
    with launched:
        out.backward(grad)
    one = stride == 1  # convolution, of weights put together; for two the input's gradients are added
    number = 1 if one else 2
    convolutions = dict(convolution=number, convolution_backward=number, _to_copy=2 * number if autocast else 0)
    assert {name: n for name, n in launched.names.items() if name not in convolutions} == {
        "forward_kernel": 1,
        "backward_kernel": 1,
        "fold_kernel": 1,
        "table_kernel": 1,
        "cat" if one else "add": 1,
    }
    assert {name: launched.names[name] for name in convolutions} == convolutions
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("together", "dims"), [(3, (16, 16)), (3, (36, 44)), (2, (4, 12)), (0, (16, 16))], ids=str)
def test_packed_gradients_are_the_others_bits(together, dims):
    options = _options((4, 1, 1), dims, (True, False, True))
    inputs, grad = _inputs((6, 5), (4, 1, 1), dims)
    q, k, v, *tables = [x.to(DEVICE) for x in inputs]
    grad = grad.to(DEVICE)
    kv = torch.cat([k, v], -1).flatten(3)
    if together == 3:
        q, k, v = split_queries_keys_and_values(torch.cat([q.flatten(3), kv], -1), 2, dims[0])
    elif together == 2:
        k, v = split_keys_and_values(kv, 2, dims[0])
    else:
        k, v = k.contiguous(), v.contiguous()
    inputs = [q, k, v, *tables]
    out, saved = triton_forward(*inputs, options)
    expected = triton_backward(grad, *inputs, out, saved, options)
    found = triton_backward_packed(grad, *inputs, out, saved, options)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and torch.equal(x, y)
    assert all(x._base is None for x in expected)
    dq, dk, dv, *_ = found
    assert (dk._base is not None and dk._base is dv._base) == (together > 0)
    assert (dq._base is not None and dq._base is dk._base) == (together == 3)
    if together:
        assert dk._base.shape[-1] == 2 * (sum(dims) + (dims[0] if together == 3 else 0))


@pytest.mark.parametrize("keep", [False, True])
def test_the_copy_for_the_backward(keep):
    options = _options((4, 1, 1), (16, 16), (True, False, True))
    inputs = [x.to(DEVICE) for x in _inputs((6, 5), (4, 1, 1), (16, 16))[0]]
    out, kept, _ = triton_forward_keeping(*inputs, options, keep)
    expected, _ = triton_forward(*inputs, options)
    assert torch.equal(out, expected)
    if keep:
        assert torch.equal(kept, out) and kept.data_ptr() != out.data_ptr()
    else:
        assert kept.numel() == 0


def test_a_layer_has_the_references_gradients(monkeypatch):
    joined = []
    whole_of = packed.whole_of
    monkeypatch.setattr(packed, "whole_of", lambda *parts: joined.append((parts, whole_of(*parts))) or joined[-1][1])
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, dim_head=4, block_size=4, halo_size=1).to(DEVICE)
    x = torch.randn(2, 16, 6, 5, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        leaves = [x, *layer.parameters()]
        found.append(torch.autograd.grad(layer(x).sin().sum(), leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    (parts, whole), (_, copied) = joined
    assert all(x._base is whole for x in parts) and copied._base is None  # the reference's are put together


def test_an_output_may_be_changed_in_place():
    inputs, grad = _inputs((5, 4), (4, 1, 1), (8, 8))
    found = []
    for change in (False, True):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
        out = halo_attention(*leaves, block_size=4, halo_size=1, backend="triton")
        out = out.mul_(2) if change else out * 2
        found.append(torch.autograd.grad(out, leaves, grad.to(DEVICE)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))

"""What counters and profilers of PyTorch see of the op."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from timm_halonet import HaloAttention, use_backend
from timm_halonet.ops import BACKENDS

FAST = ["native", "blocked"]


def counted(backend, layer, x, training):
    if BACKENDS[backend][1](x) is not None:
        pytest.skip(BACKENDS[backend][1](x))
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        y = layer(x)
        if training:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((16, 16), {}),
        ((9, 13), dict(block_size=4, halo_size=1)),
        ((11, 8), dict(block_size=8, halo_size=3, stride=2)),
        ((8, 8), dict(block_size=4, halo_size=2, qk_ratio=0.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", FAST)
def test_operations_are_those_of_the_reference(backend, size, kwargs, training):
    layer = HaloAttention(32, num_heads=2, **kwargs)
    x = torch.randn(2, 32, *size, requires_grad=training)
    assert counted(backend, layer, x, training) == counted("reference", layer, x, training) > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_a_profiler_has_a_row_of_the_op(backend, training):
    layer, x = HaloAttention(32, num_heads=2), torch.randn(1, 32, 9, 9)
    with use_backend(backend), torch.set_grad_enabled(training), profile(activities=[ProfilerActivity.CPU]) as p:
        y = layer(x)
        if training:
            y.sum().backward()
    rows = {event.key for event in p.key_averages()}
    wanted = {f"timm_halonet::halo_attention_{backend}"} | (
        {f"timm_halonet::halo_attention_{backend}_backward"} if training else set()
    )
    assert wanted <= rows

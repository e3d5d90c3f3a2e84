"""Small batches on a GPU, whose time is that of the launches: a whole forward in one launch. Skipped without a GPU."""

import pytest
import timm
import torch

from timm_halonet.benchmark.timing import cuda_graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def h1():
    torch.manual_seed(0)
    return timm.create_model("halonet_h1", zero_init_last=False).eval().cuda().to(memory_format=torch.channels_last)


def _images():
    return torch.randn(2, 3, 128, 128, device="cuda").to(memory_format=torch.channels_last)


@torch.no_grad()
def test_forward_in_a_cuda_graph(h1):
    """As torch.cuda.CUDAGraph captures it; the graph computes on what its input holds when it is replayed."""
    images, others = _images(), _images()
    replay = cuda_graph(lambda: (h1(images),))
    for new in (others, images.clone()):
        images.copy_(new)
        torch.testing.assert_close(replay()[0], h1(new), atol=1e-4, rtol=1e-4)


@pytest.mark.integration
@torch.no_grad()
def test_forward_under_reduce_overhead(h1):
    """The line that docs/backends/kernels.md has."""
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(h1, mode="reduce-overhead")
    for _ in range(3):  # the third call replays
        images = _images()
        torch.testing.assert_close(fast(images).clone(), h1(images), atol=1e-3, rtol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0

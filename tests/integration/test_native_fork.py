"""The native backend in a forked process: data workers, gunicorn's preload and multiprocessing's pools fork.

OpenMP's threads are gone there. PyTorch's own operators wait for theirs if they are large enough to use more than
one, so the maps here are small: what must not hang is the kernel.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from timm_halonet import HaloAttention
from timm_halonet.ops.native import _threads, can_run_native, native_backward, native_forward
from timm_halonet.ops.options import Options

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or can_run_native(torch.zeros(1)) is not None, reason="needs fork and the kernel"
)


def run(dtype=torch.float32):
    """Forward and backward of a map of several groups of blocks: enough for two threads to share."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 12, 12, 2, 8, generator=g).to(dtype) for _ in range(4))
    tables = [torch.randn(7, 8, generator=g) for _ in range(2)]
    options = Options(2, 1, 1, 8**-0.5, False, True, 1)
    out, lse = native_forward(q, k, v, *tables, options)
    return [out, lse, *native_backward(grad, q, k, v, *tables, out, lse, options)]


@pytest.fixture
def expected():
    """What the parent computes, on two threads that have run by then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads: that is the subject
        yield run()
    torch.set_num_threads(threads)


def same(expected):
    return all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))


def in_fork(function, seconds=60):
    """The exit status of a fork that runs the function: 0 where it returned True, -9 where it took too long."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if function() else 2
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_after_use_with_two_threads(expected):
    assert _threads() == 2
    assert in_fork(lambda: _threads() == 1 and same(expected)) == 0
    assert same(expected) and _threads() == 2, "the parent goes on with its threads"


def test_fork_of_a_fork(expected):
    assert in_fork(lambda: same(expected) and in_fork(lambda: same(expected)) == 0) == 0


def test_threads_asked_for_in_the_child(expected):
    def child():
        torch.set_num_threads(2)
        return same(expected)

    assert in_fork(child) == 0


def layer_in_the_child():
    """The exit status of a fork that compares a layer's gradients with its parent's."""
    layer, x = HaloAttention(16, num_heads=2, block_size=4, halo_size=1), torch.randn(1, 16, 8, 8)

    def gradients():
        torch.set_num_threads(1)
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    wanted = gradients()
    torch.set_num_threads(2)
    layer(x).square().sum().backward()
    return in_fork(lambda: all(map(torch.allclose, gradients(), wanted)))


def test_layer_in_the_child():
    """With gradients, as a user calls it. PyTorch's convolutions need to be told, as the docs say.

    In an interpreter of its own: autograd refuses to fork where another test has started its threads.
    """
    code = "import sys; from tests.integration.test_native_fork import layer_in_the_child as f; sys.exit(f())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _sums(dtype):
    return [x.double().sum().item() for x in run(dtype)]


@pytest.mark.integration
def test_pool_of_forks(expected):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        dtypes = [torch.float32, torch.bfloat16] * 2
        assert pool.map_async(_sums, dtypes).get(timeout=120) == [_sums(dtype) for dtype in dtypes]


class _Maps(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return run()[0]


@pytest.mark.integration
def test_data_workers_by_fork(expected):
    loader = torch.utils.data.DataLoader(
        _Maps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    assert all(torch.equal(x, expected[0]) for x in loader)

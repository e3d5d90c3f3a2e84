"""The compiled CPU kernel against the reference in float64, and what happens where it cannot be compiled."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from timm_halonet.ops import native
from timm_halonet.ops.native import can_run_native, native_backward, native_forward
from timm_halonet.ops.options import Options
from timm_halonet.ops.reference import halo_attention_reference

REASON = can_run_native(torch.zeros(1))
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = [(1, 1), (3, 5), (7, 7), (19, 38), (40, 23)]
BLOCKS = [(8, 3, 1), (8, 3, 2), (10, 3, 1), (12, 2, 2), (14, 2, 2), (8, 4, 1), (4, 5, 2), (7, 3, 1)]
DIMS = [(16, 16), (32, 32), (64, 64), (4, 12), (36, 44)]
NAMES = ("out", "dq", "dk", "dv", "drel_height", "drel_width")


def _sample():
    """Every block shape on every size; dims and flags go round so that each value, and most pairs, occur."""
    cases = []
    for i, size in enumerate(SIZES):
        for j, blocks in enumerate(BLOCKS):
            n = i * len(BLOCKS) + j
            flags = (n % 2 == 0, n // 2 % 2 == 0, (n + n // 3) % 2 == 0)
            cases.append((size, blocks, DIMS[(i + j) % len(DIMS)], flags))
    return cases


def _inputs(size, blocks, dims, dtype=torch.float32, batch=2, heads=2):
    """Inputs, with k and v interleaved slices of one tensor as the layer's are, and the gradient of the output."""
    (height, width), (block, halo, stride), (dim, dim_v) = size, blocks, dims
    g = torch.Generator().manual_seed(sum(map(sum, (size, blocks, dims))))

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(dtype)

    q = randn(batch, -(-height // stride), -(-width // stride), heads, dim)
    k, v = randn(batch, height, width, heads, dim + dim_v).split([dim, dim_v], -1)
    tables = (randn(2 * (block + 2 * halo) - 1, dim) * dim**-0.5 for _ in range(2))
    return [q, k, v, *tables], randn(*q.shape[:4], dim_v)


def _options(blocks, dims, flags):
    mask_border, scale_rel, true_step = flags
    return Options(*blocks, dims[0] ** -0.5, scale_rel, mask_border, blocks[2] if true_step else 1)


def _reference(inputs, grad, options, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = halo_attention_reference(*inputs, options)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


def _native(inputs, grad, options):
    out, lse = native_forward(*inputs, options)
    return [out, *native_backward(grad, *inputs, out, lse, options)]


def _check(inputs, grad, options, run=_native):
    dtype = inputs[0].dtype
    exact = _reference(inputs, grad, options, torch.float64)
    plain = _reference(inputs, grad, options, dtype)
    for name, x, y, z in zip(NAMES, run(inputs, grad, options), plain, exact, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        error, allowed = (x - z).abs().max().item(), 2 * (y - z).abs().max().item()
        # where a softmax has one term the reference makes no error at all; in bfloat16 one rounding of the result
        tiny = (5e-6 if dtype == torch.float32 else 2**-8) * max(1.0, z.abs().max().item())
        assert error <= allowed + tiny, f"{name}: {error=:.2e}, {allowed=:.2e}, {tiny=:.2e}"


@needs_native
@pytest.mark.parametrize(("size", "blocks", "dims", "flags"), _sample())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_reference(size, blocks, dims, flags, dtype):
    inputs, grad = _inputs(size, blocks, dims, dtype)
    _check(inputs, grad, _options(blocks, dims, flags))


@needs_native
@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("scale_rel", [True, False])
@pytest.mark.parametrize("true_step", [True, False])
def test_every_flag(mask_border, scale_rel, true_step):
    inputs, grad = _inputs((19, 11), (8, 3, 2), (16, 16))
    _check(inputs, grad, _options((8, 3, 2), (16, 16), (mask_border, scale_rel, true_step)))


@needs_native
def test_any_strides():
    """Memory layout does not count: no two of these have the same, and none has a dense last dimension."""
    inputs, grad = _inputs((9, 13), (8, 3, 1), (8, 8))
    options = _options((8, 3, 1), (8, 8), (True, False, True))
    q, k, v, *tables = inputs
    q = q.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    k = torch.stack([k, k], -1)[..., 0]
    v = v.transpose(1, 4).contiguous().transpose(1, 4)
    tables = [x.t().contiguous().t() for x in tables]
    grad = grad[:, :1].expand_as(grad)
    expected = _native([x.contiguous() for x in inputs], grad.contiguous(), options)
    for x, y in zip(_native([q, k, v, *tables], grad, options), expected, strict=True):
        assert torch.equal(x, y)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(dtype):
    inputs, grad = _inputs((19, 38), (8, 3, 1), (16, 16), dtype, batch=3)
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2, 1):
            torch.set_num_threads(n)
            results.append(_native(inputs, grad, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_native
def test_large_logits_and_nan():
    inputs, grad = _inputs((9, 9), (8, 3, 1), (16, 16), torch.bfloat16)
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    inputs[0] *= 1e4
    assert all(x.isfinite().all() for x in _native(inputs, grad, options))
    inputs[1][0, 0, 0, 0, 0] = float("nan")
    out, _ = native_forward(*inputs, options)
    assert out[0, :8, :8, 0].isnan().all() and out[1].isfinite().all() and out[0, :, :, 1].isfinite().all()


@pytest.fixture
def compiled_for(monkeypatch):
    """A function that has the kernel compiled for another kind of CPU, until the test ends."""

    def compiled(arch):
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("flags are for x86-64")
        if arch == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            pytest.skip("the CPU has no AVX2")
        monkeypatch.setenv("TIMM_HALONET_CXXFLAGS", f"-march={arch}")
        native._library.cache_clear()
        assert can_run_native(torch.zeros(1)) is None

    yield compiled
    monkeypatch.undo()
    native._library.cache_clear()


@pytest.mark.integration
@needs_native
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64"])
def test_vectors_of_any_length(arch, compiled_for):
    """What runs here without flags has the longest vectors of this CPU; others have 8 or 4 floats in theirs."""
    compiled_for(arch)
    for dtype in (torch.float32, torch.bfloat16):
        for size, blocks, dims, flags in _sample()[::5]:
            inputs, grad = _inputs(size, blocks, dims, dtype)
            _check(inputs, grad, _options(blocks, dims, flags))


def test_says_why_not(monkeypatch):
    assert "float64" in can_run_native(torch.zeros(1, dtype=torch.float64))
    assert "meta" in can_run_native(torch.zeros(1, device="meta"))
    monkeypatch.setenv("TIMM_HALONET_NATIVE", "0")
    assert "TIMM_HALONET_NATIVE" in can_run_native(torch.zeros(1))


@pytest.mark.integration
def test_no_compiler_is_a_reason(tmp_path):
    code = """if True:
        import os, torch
        from timm_halonet.ops import native
        for compiler in ("/bin/false", "/nonexistent/compiler", "true", '"unclosed'):
            os.environ["CXX"] = compiler
            native._library.cache_clear()
            assert native.can_run_native(torch.zeros(1)), compiler
    """
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    env.pop("TIMM_HALONET_NATIVE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp"))

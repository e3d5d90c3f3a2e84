"""The compiled kernel on NaN and infinity, large logits, views and types it does not know, and out of memory."""

import ctypes
import subprocess
import sys

import pytest
import torch

from timm_halonet.ops import native
from timm_halonet.ops.native import can_run_native, native_backward, native_forward
from timm_halonet.ops.options import Options
from timm_halonet.ops.reference import halo_attention_reference

REASON = can_run_native(torch.zeros(1))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NAMES = ("out", "dq", "dk", "dv", "drel_height", "drel_width")
INPUTS = ("q", "k", "v", "rel_height", "rel_width", "grad")
QUIET, LOW, ALL, NEGATIVE, SIGNALLING = 0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001
# the first three fill whole pairs and vectors or none; an odd number of queries leaves half a pair
CASES = [((5, 7), (4, 1, 1)), ((4, 4), (4, 2, 2)), ((3, 5), (3, 0, 1)), ((9, 2), (8, 3, 1))]


def _float(bits, dtype):
    signed = bits - (1 << 32) if bits >> 31 else bits
    if dtype == torch.bfloat16:
        return torch.tensor(signed >> 16, dtype=torch.int16).view(dtype)
    return torch.tensor(signed, dtype=torch.int32).view(dtype)


def _inputs(size, blocks, dtype, dims=(5, 6)):
    """q, k, v, the tables and the gradient of the output, with two heads."""
    (height, width), (block, halo, stride), (dim, dim_v) = size, blocks, dims
    g = torch.Generator().manual_seed(sum(size) + sum(blocks))
    grid, rows = (-(-height // stride), -(-width // stride)), 2 * (block + 2 * halo) - 1
    shapes = [(1, *grid, 2, dim), (1, height, width, 2, dim), (1, height, width, 2, dim_v)]
    q, k, v, grad = (torch.randn(x, generator=g).to(dtype) for x in (*shapes, (1, *grid, 2, dim_v)))
    return [q, k, v, *(torch.randn(rows, dim, generator=g) * dim**-0.5 for _ in range(2)), grad]


def _native(inputs, options):
    *inputs, grad = inputs
    out, saved = native_forward(*inputs, options)
    return [out, *native_backward(grad, *inputs, out, saved, options)]


def _reference(inputs, options, dtype):
    *inputs, grad = (x.detach().to(dtype) for x in inputs)
    inputs = [x.requires_grad_() for x in inputs]
    out = halo_attention_reference(*inputs, options)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def _pairs(inputs, options):
    """By lists of the pairs that exist, in float64: a query sees its window's keys inside the image, and their rows."""
    *inputs, grad = (x.detach().double() for x in inputs)
    q, k, v, rel_height, rel_width = inputs = [x.requires_grad_() for x in inputs]
    block, halo, stride = options.block_size, options.halo_size, options.query_stride
    ring = 0 if options.mask_border else halo
    height, width = k.shape[1:3]
    window = block + 2 * halo
    rel = options.scale if options.scale_rel else 1.0
    outs = torch.empty_like(grad)
    total = torch.zeros((), dtype=torch.float64)
    for y in range(q.shape[1]):
        for x in range(q.shape[2]):
            top, left = (y * stride // block * block - halo, x * stride // block * block - halo)
            in_block = (y % (block // stride), x % (block // stride))
            keys = [
                (u, w)
                for u in range(max(0, -ring - top), min(window, height + ring - top))
                for w in range(max(0, -ring - left), min(window, width + ring - left))
            ]
            rows = [u - in_block[0] * options.rel_step + window - 1 for u, _ in keys]
            cols = [w - in_block[1] * options.rel_step + window - 1 for _, w in keys]
            inside = [(0 <= top + u < height) and (0 <= left + w < width) for u, w in keys]
            places = [(top + u, left + w) if ok else (0, 0) for (u, w), ok in zip(keys, inside, strict=True)]
            ys, xs = (list(p) for p in zip(*places, strict=True))
            ok, zero = torch.tensor(inside)[:, None, None], torch.zeros((), dtype=torch.float64)
            key, value = (torch.where(ok, t[0, ys, xs], zero) for t in (k, v))  # keys, heads, dim
            query = q[0, y, x]
            logits = options.scale * (key * query).sum(-1)
            for table, places in ((rel_height, rows), (rel_width, cols)):
                logits = logits + rel * (table[places][:, None] * query).sum(-1)
            out = (logits.softmax(0)[..., None] * value).sum(0)
            outs[0, y, x] = out.detach()
            total = total + (out * grad[0, y, x]).sum()
    return [outs, *torch.autograd.grad(total, inputs)]


def _options(blocks, mask_border=True, scale_rel=False, scale=0.4):
    return Options(*blocks, scale, scale_rel, mask_border, blocks[2])


def _assert_same_places(inputs, options):
    """What is not finite is so in exactly the right places, and the rest is right."""
    low = inputs[0].dtype == torch.bfloat16
    for name, x, y in zip(NAMES, _native(inputs, options), _pairs(inputs, options), strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), name
        x, y = x.double()[y.isfinite()], y[y.isfinite()]
        if y.numel():
            assert (x - y).abs().max() <= (2**-6 if low else 1e-5) * max(1.0, y.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", [QUIET, LOW, ALL, NEGATIVE, SIGNALLING, 0x7FFF0000, 0xFF810000])
def test_any_nan_reaches_what_sees_it(bits, name, dtype):
    size, blocks = CASES[0]
    inputs = _inputs(size, blocks, dtype)
    x = inputs[INPUTS.index(name)]
    if x.dtype == torch.bfloat16 and not bits & 0x7F0000:
        pytest.skip("not a NaN in bfloat16")
    x.view(-1)[x.numel() // 2 + 1] = _float(bits, x.dtype)
    assert x.isnan().sum() == 1
    _assert_same_places(inputs, _options(blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "mask_border"),
    [(float("nan"), True), (float("nan"), False), (float("inf"), True), (float("-inf"), False)],
)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("size", "blocks"), CASES)
def test_not_finite_stays_where_it_is_seen(size, blocks, name, value, mask_border, dtype):
    inputs = _inputs(size, blocks, dtype)
    x = inputs[INPUTS.index(name)]
    for place in (0, x.numel() // 2, x.numel() - 1):  # tables: rows that few or no queries use
        other = [t.clone() if t is x else t for t in inputs]
        other[INPUTS.index(name)].view(-1)[place] = value
        _assert_same_places(other, _options(blocks, mask_border, scale_rel=not mask_border))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_of_no_weight_and_an_odd_number_of_queries(dtype):
    inputs = _inputs((1, 3), (3, 0, 1), dtype)
    inputs[0].abs_()
    inputs[1][0, 0, 1, :, 2] = float("-inf")
    options = _options((3, 0, 1))
    _assert_same_places(inputs, options)
    out, _, dk, dv, *_ = _native(inputs, options)
    assert out.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-float("inf")] * 2, [float("nan")] * 2),
        ([-2e30, -1e32], [1.0, 1.0]),
        ([-3e38, -3e38], [2.0, 2.0]),
        ([-float("inf"), -3e38], [3.0, 3.0]),
        ([3e38, -3e38], [1.0, 1.0]),
    ],
)
def test_logits_at_the_end_of_the_numbers(logits, expected):
    q, v = torch.ones(1, 1, 2, 1, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
    k, table = torch.tensor(logits).view(1, 1, 2, 1, 1), torch.zeros(3, 1)
    out, _ = native_forward(q, k, v, table, table, _options((2, 0, 1), scale=1.0))
    assert torch.equal(out.flatten().nan_to_num(-1), torch.tensor(expected).nan_to_num(-1))


def test_nan_with_a_scale_of_zero():
    inputs = _inputs((4, 4), (4, 0, 1), torch.float32)
    inputs[1][0, 1, 1, 0, 0] = float("nan")
    _assert_same_places(inputs, _options((4, 0, 1), scale=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["integers", "shifted", "tiny", "equal", "one key"])
def test_errors_are_those_of_the_reference(mode, dtype):
    """The worst of ten maps against the worst of the reference, because one map's rounding may be lucky."""
    options = _options((8, 3, 1), scale=0.25)
    errors, allowed = torch.zeros(6), torch.zeros(6)
    for seed in range(10):
        inputs = _inputs((10, 12 + seed), (8, 3, 1), dtype, (8, 8))
        q, k, v, rel_height, rel_width, _ = inputs
        if mode == "integers":  # logits of some thousands, exact in float32
            for x in (q, k):
                x.mul_(60).round_()
            for x in (rel_height, rel_width):
                x.mul_(40).round_()
        elif mode == "shifted":
            q[..., 0] = 1
            rel_height[:, 0] = -4096
        elif mode == "tiny":
            for x in (q, k, rel_height, rel_width):
                x.mul_(2**-30)
        elif mode == "equal":
            for x in (k, rel_height, rel_width):
                x.zero_()
        else:  # far ahead of all others, and a value whose products with the gradient do not cancel
            q.fill_(1)
            k[0, 5, 5] = 400
            v.add_(3)
        exact = _reference(inputs, options, torch.float64)
        low = [x.to(dtype) for x in inputs]
        for i, (x, y, z) in enumerate(
            zip(_native(inputs, options), _reference(low, options, dtype), exact, strict=True)
        ):
            size = max(z.abs().max().item(), 1e-30)
            one = size * (2**-22 if dtype == torch.float32 else 2**-8)
            errors[i] = max(errors[i], (x - z).abs().max() / size)
            allowed[i] = max(allowed[i], max(2 * (y - z).abs().max(), one) / size)
    assert (errors <= allowed).all(), dict(zip(NAMES, zip(errors.tolist(), allowed.tolist(), strict=True), strict=True))


def test_one_key_gets_no_gradient_at_all():
    inputs = _inputs((1, 5), (1, 0, 1), torch.float32)
    _, dq, dk, dv, *tables = _native(inputs, _options((1, 0, 1)))
    assert not any(x.any() for x in (dq, dk, *tables)) and torch.equal(dv, inputs[-1])


def test_weights_of_a_huge_block_are_computed_twice():
    """More scores than are kept: the second pass must find the weights of the first."""
    blocks = (24, 0, 1)
    inputs = _inputs((24, 24), blocks, torch.float32)  # 576 keys for 576 queries
    for x, y in zip(
        _native(inputs, _options(blocks)), _reference(inputs, _options(blocks), torch.float64), strict=True
    ):
        assert (x - y).abs().max() <= 5e-6 * max(1.0, y.abs().max())


# ---- what the kernel does not know -----------------------------------------------------------------------------------


def test_negative_views():
    inputs = _inputs((5, 7), (4, 1, 1), torch.float32)
    options = _options((4, 1, 1))
    views = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in inputs]
    dense = [torch._neg_view(-x) for x in inputs]
    assert all(x.is_neg() for x in (*views, *dense)) and dense[0].is_contiguous()
    expected = _native(inputs, options)
    for other in (views, dense):
        assert all(torch.equal(x, y) for x, y in zip(_native(other, options), expected, strict=True))


@pytest.mark.parametrize("place", range(6))
def test_tensors_elsewhere_are_refused(place):
    inputs = _inputs((5, 7), (4, 1, 1), torch.float32)
    *tensors, grad = inputs
    out, saved = native_forward(*tensors, _options((4, 1, 1)))
    inputs[place] = inputs[place].to("meta")
    *tensors, grad = inputs
    if place < 5:
        with pytest.raises(ValueError, match=r"on the CPU.*cpu, meta"):
            native_forward(*tensors, _options((4, 1, 1)))
    with pytest.raises(ValueError, match=r"on the CPU.*cpu, meta"):
        native_backward(grad, *tensors, out, saved, _options((4, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64, torch.float16, torch.complex64])
def test_other_types_are_refused(dtype):
    q, k, v, *tables = _inputs((5, 7), (4, 1, 1), torch.float32)[:5]
    with pytest.raises(ValueError, match=str(dtype)):
        native_forward(q.to(dtype), k.to(dtype), v.to(dtype), *tables, _options((4, 1, 1)))


# the kernel trusts what the op has checked; a compiled graph calls the op by its name
_op = torch.ops.timm_halonet.halo_attention_native


def test_no_channels_are_refused():
    q, k, v, *tables = _inputs((5, 7), (4, 1, 1), torch.float32)[:5]
    with pytest.raises(ValueError, match="empty input"):
        _op(q, k, v[..., :0], *tables, *_options((4, 1, 1)))
    with pytest.raises(ValueError, match="empty input"):
        _op(q[..., :0], k[..., :0], v, *(x[:, :0] for x in tables), *_options((4, 1, 1)))


@pytest.mark.parametrize("place", range(5))
def test_other_shapes_are_refused(place):
    for axis in (0, -2) if place == 2 else (0, -1):  # v may have channels of its own number
        *tensors, _ = _inputs((5, 7), (4, 1, 1), torch.float32)
        x = tensors[place]
        tensors[place] = x.narrow(axis, 0, x.shape[axis] - 1)
        with pytest.raises(ValueError, match=r"must|empty input"):
            _op(*tensors, *_options((4, 1, 1)))


@pytest.mark.parametrize("step", [-1, 0, 2, 100])
def test_steps_outside_the_tables_are_refused(step):
    *tensors, _ = _inputs((5, 7), (4, 1, 1), torch.float32)
    with pytest.raises(ValueError, match="rel_step"):
        _op(*tensors, *Options(4, 1, 1, 0.4, False, True, step))


def test_shapes_of_the_backward():
    *tensors, grad = _inputs((5, 7), (4, 1, 1), torch.float32)
    options = _options((4, 1, 1))
    out, saved = native_forward(*tensors, options)
    assert saved.shape == native.saved_like(tensors[0]).shape
    for bad in ((grad[..., :3], saved), (grad[:, :2], saved), (grad, saved[..., 0])):
        with pytest.raises(ValueError, match="gradient"):
            native_backward(bad[0], *tensors, out, bad[1], options)


def test_default_device_does_not_count():
    inputs = _inputs((5, 7), (4, 1, 1), torch.float32)
    expected = _native(inputs, _options((4, 1, 1)))
    with torch.device("meta"):
        results = _native(inputs, _options((4, 1, 1)))
    assert all(x.device.type == "cpu" and torch.equal(x, y) for x, y in zip(results, expected, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_no_memory_is_an_error_with_the_bytes(monkeypatch):
    class Library:
        @ctypes.CFUNCTYPE(ctypes.c_int64)
        def halo_forward_float32(*_):
            return 123456789

    *tensors, _ = _inputs((5, 7), (4, 1, 1), torch.float32)
    monkeypatch.setattr(native, "_library", lambda: Library)
    with pytest.raises(RuntimeError, match=r"not enough memory.* 123456789 bytes.*blocked"):
        native_forward(*tensors, _options((4, 1, 1)))


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="limits and reads memory as Linux does")
def test_no_memory_does_not_end_the_process():
    """Gradients of the tables are kept for each image and head: 113 MB here, for tensors of 2 MB."""
    assert "bytes" in _run("""if True:
        import resource, torch
        from timm_halonet.ops import halo_attention
        torch.set_num_threads(1)
        q = torch.zeros(32768, 1, 1, 1, 16, requires_grad=True)
        table = torch.zeros(27, 16)
        out = halo_attention(q, q, q, table, table, block_size=8, halo_size=3, backend="native")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
        try:
            out.sum().backward()
        except RuntimeError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        out = halo_attention(q, q, q, table, table, block_size=8, halo_size=3, backend="native")
        out.sum().backward()
    """)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux does")
def test_memory_of_a_large_call_is_given_back():
    kept = _run("""if True:
        import ctypes, gc, resource, torch
        from timm_halonet.ops import halo_attention

        def memory():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def call(size, block):
            q = torch.randn(1, size, size, 1, 16, requires_grad=True)
            table = torch.zeros(2 * (block + 6) - 1, 16)
            halo_attention(q, q, q, table, table, block_size=block, halo_size=3, backend="native").sum().backward()

        torch.set_num_threads(1)
        call(16, 8)
        before = memory()
        call(512, 8)
        call(64, 64)
        print(memory() - before)
    """)
    assert int(kept) < 6 << 20

"""The op: reference against a loop over pixels and against timm, backends against the reference, properties, errors."""

import itertools
import os
import threading

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

import timm_halonet
from timm_halonet.layers import HaloAttention
from timm_halonet.ops import BACKENDS, backend_for, halo_attention, halo_attention_weights, use_backend

SIZES = [(1, 1), (3, 5), (7, 7), (19, 38), (40, 23)]
FAMILY = [(8, 3, 1), (8, 3, 2), (10, 3, 1), (10, 3, 2), (12, 2, 2), (14, 2, 1), (8, 4, 2), (7, 3, 1), (32, 3, 1)]
ON_CPU = [name for name in BACKENDS if BACKENDS[name][1](torch.zeros(1, 1)) is None]
FAST_FLOAT64 = [x for x in BACKENDS if x != "reference" and BACKENDS[x][1](torch.zeros(1, dtype=torch.float64)) is None]


def make(size, b, h, s, heads=2, d_qk=8, d_v=8, batch=2, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    height, width = size
    return (
        randn(batch, -(-height // s), -(-width // s), heads, d_qk),
        randn(batch, height, width, heads, d_qk),
        randn(batch, height, width, heads, d_v),
        randn(2 * (b + 2 * h) - 1, d_qk),
        randn(2 * (b + 2 * h) - 1, d_qk),
    )


def brute_force(q, k, v, rel_height, rel_width, *, block_size, halo_size, query_stride, scale_rel, mask_border, rel):
    """Pixel by pixel, straight from the paper's text and the specification of the tables."""
    b, h, s = block_size, halo_size, query_stride
    batch, height, width, heads, d = k.shape
    ring = 0 if mask_border else h
    out = torch.zeros(*q.shape[:4], v.shape[4], dtype=q.dtype)
    for n, yq, xq, a in itertools.product(range(batch), range(q.shape[1]), range(q.shape[2]), range(heads)):
        y, x = yq * s, xq * s
        top, left = y // b * b, x // b * b
        # where the relative position sees the query: its pixel, or its place in the block's query grid
        y_rel, x_rel = (y, x) if rel == "true" else (top + (y - top) // s, left + (x - left) // s)
        logits, values = [], []
        for u in range(top - h, top + b + h):
            for w in range(left - h, left + b + h):
                if not (-ring <= u < height + ring and -ring <= w < width + ring):
                    continue
                inside = 0 <= u < height and 0 <= w < width
                key = k[n, u, w, a] if inside else torch.zeros(d, dtype=q.dtype)
                qq = q[n, yq, xq, a]
                row_h = rel_height[u - y_rel + h + (b + 2 * h) - 1]
                row_w = rel_width[w - x_rel + h + (b + 2 * h) - 1]
                bias = qq @ row_h + qq @ row_w
                logits.append((qq @ key) * d**-0.5 + bias * (d**-0.5 if scale_rel else 1))
                values.append(v[n, u, w, a] if inside else torch.zeros(v.shape[4], dtype=q.dtype))
        out[n, yq, xq, a] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("rel", ["true", "grid"])
@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize(("b", "h", "s"), [(4, 1, 1), (4, 2, 2), (3, 1, 1), (2, 3, 2)])
def test_reference_is_the_brute_force_loop(b, h, s, mask_border, rel):
    args = make((5, 7), b, h, s, d_qk=3, d_v=2, batch=1)
    kw = dict(block_size=b, halo_size=h, query_stride=s, mask_border=mask_border, scale_rel=b == 3)
    expected = brute_force(*args, rel=rel, **kw)
    out = halo_attention(*args, strided_rel=rel, backend="reference", **kw)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale_pos_embed", [False, True])
@pytest.mark.parametrize(
    ("stride", "b", "h", "heads", "dim", "dim_out", "kw"),
    [
        (1, 8, 3, 4, 64, 64, {}),
        (2, 8, 3, 8, 64, 128, {}),
        (1, 4, 1, 2, 32, 48, {}),
        (2, 8, 2, 4, 32, 64, {"qkv_bias": True}),
        (1, 8, 2, 2, 16, 80, {"dim_head": 16}),
        (2, 7, 3, 4, 32, 64, {}),  # stride does not divide the block: attends and pools
        (2, 8, 3, 4, 32, 64, {"avg_down": True}),
        (1, 8, 3, 4, 64, 64, {"qk_ratio": 0.5}),
    ],
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_timm_options_are_timm(backend, stride, b, h, heads, dim, dim_out, kw, scale_pos_embed, monkeypatch):
    monkeypatch.setenv("TIMM_HALONET_BACKEND", backend)
    torch.manual_seed(0)
    common = dict(stride=stride, num_heads=heads, block_size=b, halo_size=h, scale_pos_embed=scale_pos_embed, **kw)
    theirs = HaloAttn(dim, dim_out, **common)
    ours = HaloAttention(dim, dim_out, mask_border=False, strided_rel="grid", **common)
    ours.load_state_dict(theirs.state_dict())
    size = (2 * b, 4 * b) if b % stride == 0 else (4 * b, 2 * b)
    x = torch.randn(2, dim, *size)
    grad = torch.randn_like(theirs(x))
    results = []
    for layer in (theirs, ours):
        xx = x.clone().requires_grad_()
        out = layer(xx)
        results.append((out, *torch.autograd.grad(out, [xx, *layer.parameters()], grad)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-6, rtol=1e-6)
    for a, e in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(a, e, atol=2e-5 * float(e.abs().max().clamp_min(1)), rtol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("b", "h", "s"), FAMILY)
@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("backend", FAST_FLOAT64)
def test_backend_against_reference_in_float64(backend, size, b, h, s, mask_border):
    args = make(size, b, h, s, d_qk=4, d_v=12, grad=True)
    for rel, scale_rel in (("true", False), ("grid", True)):
        kw = dict(block_size=b, halo_size=h, query_stride=s, mask_border=mask_border, scale_rel=scale_rel)
        results = []
        for name in ("reference", backend):
            out = halo_attention(*args, strided_rel=rel, backend=name, **kw)
            results.append((out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(1))))
        for a, e in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(a, e, atol=1e-10 * float(e.abs().max().clamp_min(1)), rtol=1e-9)


def backend_refuses(backend, q):
    return BACKENDS[backend][1](q)


def run(backend, args, grad, **kw):
    args = [x.detach().requires_grad_() for x in args]
    out = halo_attention(*args, backend=backend, **kw)
    return [out.detach(), *torch.autograd.grad(out, args, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "b", "h", "s"), [((19, 38), 8, 3, 1), ((17, 24), 8, 3, 2), ((7, 7), 10, 3, 1)])
@pytest.mark.parametrize("backend", [x for x in ON_CPU if x != "reference"])
def test_error_is_at_most_twice_the_references(backend, size, b, h, s, dtype):
    """The tolerance rule: error against float64 <= 2x the reference's in the same dtype, plus a tiny absolute term."""
    args = make(size, b, h, s, d_qk=16, d_v=16, dtype=dtype)
    if backend_refuses(backend, args[0]):
        pytest.skip(backend_refuses(backend, args[0]))
    kw = dict(block_size=b, halo_size=h, query_stride=s)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    exact = run("reference", [x.double() for x in args], grad, **kw)
    same = run("reference", args, grad, **kw)
    ours = run(backend, args, grad, **kw)
    for name, e, r, o in zip(["out", "q", "k", "v", "rel_height", "rel_width"], exact, same, ours, strict=True):
        assert o.dtype == dtype
        error, allowed = (o - e).abs().max(), (r - e).abs().max()
        assert error <= 2 * allowed + 1e-6 * e.abs().max(), f"{name}: {error:.2e} against {allowed:.2e}"


def test_gradcheck():
    args = make((5, 6), 4, 1, 2, heads=1, d_qk=2, d_v=3, batch=1, grad=True)
    for backend in BACKENDS:
        if backend_refuses(backend, args[0]):
            continue
        assert torch.autograd.gradcheck(
            lambda *x, backend=backend: halo_attention(*x, block_size=4, halo_size=1, query_stride=2, backend=backend),
            args,
        )


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_pixel_changes_only_what_sees_it(backend):
    b, h, height, width = 4, 1, 10, 13
    q, k, v, rh, rw = make((height, width), b, h, 1, batch=1, dtype=torch.float32)
    y, x = 4, 9  # row 4 is in the halo of the block rows 0..3
    before = halo_attention(q, k, v, rh, rw, block_size=b, halo_size=h, backend=backend)
    k[0, y, x] += 1
    v[0, y, x] += 1
    after = halo_attention(q, k, v, rh, rw, block_size=b, halo_size=h, backend=backend)
    changed = (before != after).flatten(3).any(-1)[0]
    expected = torch.zeros_like(changed)
    for i, j in itertools.product(range(height), range(width)):
        top, left = i // b * b, j // b * b
        expected[i, j] = top - h <= y < top + b + h and left - h <= x < left + b + h
    assert expected.sum() < expected.numel()
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_huge_logits_stay_finite(backend, dtype):
    q, k, v, rh, rw = make((9, 9), 8, 3, 1, d_qk=16, dtype=dtype)
    q = (q.float() / q.float().abs().amax() * 100).to(dtype)
    k = (k.float() / k.float().abs().amax() * 25).to(dtype)  # up to 100 * 25 * 16 / 4 = 1e4
    if backend_refuses(backend, q):
        pytest.skip(backend_refuses(backend, q))
    results = run(backend, (q, k, v, rh, rw), torch.ones_like(v), block_size=8, halo_size=3)
    assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize("backend", ON_CPU)
def test_constant_input_masked_border_does_not_shrink(backend):
    """Masked keys carry no weight: the mean of a constant is the constant, in the corner as in the centre."""
    q, k, v, rh, rw = make((16, 16), 8, 3, 1, dtype=torch.float32)
    ones = torch.ones_like(v)
    masked = halo_attention(q, k, ones, rh, rw, block_size=8, halo_size=3, backend=backend)
    torch.testing.assert_close(masked, ones)
    ring = halo_attention(q, k, ones, rh, rw, block_size=8, halo_size=3, mask_border=False, backend=backend)
    assert ring.min() < 0.9  # the ring of zeros takes weight


def test_weights_are_the_ops_own():
    q, k, v, rh, rw = make((9, 14), 8, 3, 1)
    probs = halo_attention_weights(q, k, rh, rw, block_size=8, halo_size=3)
    assert probs.shape == (2, 2, 2, 2, 8, 8, 14, 14)
    torch.testing.assert_close(probs.sum((-1, -2)), torch.ones(probs.shape[:-2], dtype=probs.dtype))
    out = halo_attention(q, k, v, rh, rw, block_size=8, halo_size=3)
    # query (8, 3): block (1, 0), first row of it; window rows 5..18, columns -3..10
    expected = torch.einsum("buw,buwd->bd", probs[:, 1, 0, 1, 0, 3, :4, 3:], v[:, 5:9, :11, 1])
    torch.testing.assert_close(out[:, 8, 3, 1], expected)


def test_views_and_autocast():
    """Interleaved, non-contiguous keys and values as the layer makes them; autocast decides the dtype."""
    q, k, v, rh, rw = make((12, 9), 8, 3, 1, dtype=torch.float32)
    kv = torch.cat([k, v], -1).permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    k2, v2 = kv.split([8, 8], -1)
    expected = halo_attention(q, k, v, rh, rw, block_size=8, halo_size=3)
    torch.testing.assert_close(halo_attention(q, k2, v2, rh, rw, block_size=8, halo_size=3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = halo_attention(q, k, v, rh, rw, block_size=8, halo_size=3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_size=0), "block_size=0"),
        (dict(halo_size=-1), "halo_size=-1"),
        (dict(block_size=7, query_stride=2), "block_size=7, query_stride=2"),
        (dict(strided_rel="odd"), "'odd'"),
        (dict(backend="nope"), "'nope'.*blocked"),
        (dict(q=torch.zeros(2, 9, 9, 16)), r"q must be .*\(2, 9, 9, 16\)"),
        (dict(q=torch.zeros(2, 8, 9, 2, 8)), r"\(2, 9, 9, 2\).*\(2, 8, 9, 2, 8\)"),
        (dict(k=torch.zeros(2, 9, 9, 2, 4)), r"\(2, 9, 9, 2, 4\)"),
        (dict(v=torch.zeros(2, 9, 9, 2, 8, dtype=torch.bfloat16)), "bfloat16"),
        (dict(rel_height=torch.zeros(26, 8)), r"rel_height must be \(27, 8\).*\(26, 8\)"),
        (dict(q=torch.zeros(0, 9, 9, 2, 8), k=torch.zeros(0, 9, 9, 2, 8), v=torch.zeros(0, 9, 9, 2, 8)), "empty"),
        (dict(block_size=8.0), "block_size must be an integer, got block_size=8.0"),
        (dict(block_size=True), "block_size=True"),
        (dict(halo_size=3.0), r"halo_size=3\.0"),
        (dict(query_stride="1"), "query_stride='1'"),
        (dict(query_stride=True), "query_stride=True"),
        (dict(scale=float("nan")), "scale must be a finite number, got nan"),
        (dict(scale=-float("inf")), "scale must be a finite number, got -inf"),
        (dict(scale="0.5"), "scale must be a finite number, got '0.5'"),
        (dict(scale=True), "scale must be a finite number, got True"),
        (dict(scale=1j), "scale must be a finite number, got 1j"),
        (dict(rel_height=torch.zeros(27, 8, device="meta")), "q on cpu and rel_height on meta"),
        (dict(rel_width=torch.zeros(27, 8, device="meta")), "q on cpu and rel_width on meta"),
        (dict(k=torch.zeros(2, 9, 9, 2, 8, device="meta")), "q on cpu and k on meta"),
        (dict(rel_width=torch.zeros(27, 8, dtype=torch.int32)), "rel_width must be .*float32.*, got torch.int32"),
        (dict(rel_width=torch.zeros(27, 8, dtype=torch.bool)), "rel_width must be .*float32.*, got torch.bool"),
        (dict(rel_height=torch.zeros(27, 8, dtype=torch.complex64)), "rel_height must be .*, got torch.complex64"),
        (dict(rel_height=[[0.0] * 8] * 27), "rel_height must be a tensor, got list"),
        (dict(v=torch.zeros(2, 9, 9, 2, 8).to_sparse()), "v must be a dense tensor, got torch.sparse_coo"),
        (dict(v=torch.zeros(2, 9, 9, 2, 0)), r"empty input.*\(2, 9, 9, 2, 0\)"),
        (
            dict(
                q=torch.zeros(2, 9, 9, 2, 0),
                k=torch.zeros(2, 9, 9, 2, 0),
                rel_height=torch.zeros(27, 0),
                rel_width=torch.zeros(27, 0),
            ),
            r"empty input.*\(2, 9, 9, 2, 0\)",
        ),
    ],
)
def test_wrong_input_is_refused_with_the_numbers(change, message):
    q, k, v, rel_height, rel_width = make((9, 9), 8, 3, 1, dtype=torch.float32)
    kw = dict(q=q, k=k, v=v, rel_height=rel_height, rel_width=rel_width, block_size=8, halo_size=3)
    halo_attention(**kw)
    with pytest.raises(ValueError, match=message):
        halo_attention(**{**kw, **change})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_types_that_the_op_has_not_are_refused_by_name(backend, dtype):
    q = torch.zeros(1, 3, 3, 1, 4).to(dtype)
    tables = [torch.zeros(5, 4)] * 2
    with pytest.raises(ValueError, match=f"q must be .*float32.*, got {dtype}"):
        halo_attention(q, q, q, *tables, block_size=3, halo_size=0, backend=backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_tables_of_another_floating_dtype(backend):
    q, k, v, rh, rw = make((9, 9), 8, 3, 1, dtype=torch.bfloat16)
    kw = dict(block_size=8, halo_size=3, backend=backend)
    out, *_, dh, dw = run(backend, (q, k, v, rh.float(), rw.double()), torch.ones_like(v), block_size=8, halo_size=3)
    assert (out.dtype, dh.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    torch.testing.assert_close(out, halo_attention(q, k, v, rh, rw, **kw))


@pytest.mark.parametrize("backend", ON_CPU)
def test_negative_views_are_read_as_what_they_are(backend):
    """The imaginary part of a conjugate is a view whose numbers stand in memory with the other sign."""
    kw = dict(block_size=4, halo_size=1)
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randn(1, 5, 6, 2, 4, generator=g, dtype=torch.complex64) for _ in range(3)]
    numbers += [torch.randn(11, 4, generator=g, dtype=torch.complex64) for _ in range(2)]
    lazy = [x.conj().imag for x in numbers]
    plain = [-x.imag for x in numbers]
    assert all(x.is_neg() for x in lazy)
    assert not any(x.is_neg() for x in plain)
    # `grad` of the output is one, as autograd makes it for complex numbers, and lazy zeros
    for grad in (lazy[0], torch._efficientzerotensor(lazy[0].shape)):
        for a, e in zip(run(backend, lazy, grad, **kw), run(backend, plain, grad + 0, **kw), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_backend_can_be_forced(monkeypatch):
    q = torch.zeros(1, 4, 4, 1, 4)
    default = backend_for(q)
    assert backend_for(q, "reference") == "reference" != default
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "reference")
    assert backend_for(q) == "reference"
    assert backend_for(q, default) == default  # the argument outranks the environment
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        backend_for(q)


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_shapes_and_buffers(stride):
    layer = HaloAttention(32, 48, stride=stride, num_heads=4, block_size=7 if stride == 2 else 8)
    assert not list(layer.buffers())
    for size in [(1, 1), (5, 9), (14, 14), (15, 15)]:
        out = layer(torch.randn(2, 32, *size))
        assert out.shape == (2, 48, *(-(-x // stride) for x in size))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(block_size=0), "block_size=0"),
        (dict(num_heads=3), "64 channels.*num_heads=3"),
        (dict(stride=3), "stride=3"),
        (dict(strided_rel="x"), "'x'"),
        (dict(qk_ratio=0.01, num_heads=32), "qk_ratio=0.01"),
        (dict(block_size=8.0), r"block_size=8\.0"),
        (dict(halo_size=True), "halo_size=True"),
        (dict(num_heads=4.0), r"num_heads=4\.0"),
        (dict(dim_head=16.0), r"dim_head=16\.0"),
    ],
)
def test_layer_refuses_with_the_numbers(kw, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention(64, **kw)


def test_use_backend_is_between_argument_and_environment(monkeypatch):
    q = torch.zeros(1, 4, 4, 1, 4)
    default = backend_for(q)
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "blocked")
    with use_backend("reference"):
        assert backend_for(q) == "reference"
        assert backend_for(q, "blocked") == "blocked"
        with use_backend("blocked"):
            assert backend_for(q) == "blocked"
            with use_backend(None):
                assert backend_for(q) == "blocked"
        with pytest.raises(KeyError), use_backend("blocked"):
            raise KeyError
        assert backend_for(q) == "reference"
    assert backend_for(q) == "blocked"
    monkeypatch.delenv("TIMM_HALONET_BACKEND")
    assert backend_for(q) == default
    assert "TIMM_HALONET_BACKEND" not in os.environ


def test_use_backend_refuses_an_unknown_name_at_once():
    with pytest.raises(ValueError, match=r"'fast'.*blocked"):
        use_backend("fast")


def test_use_backend_holds_for_its_thread_only():
    q = torch.zeros(1, 4, 4, 1, 4)
    default, found, entered, ready = backend_for(q), [], threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            entered.set()
            ready.wait(10)
            found.append(backend_for(q))

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    assert backend_for(q) == default != "reference"
    ready.set()
    thread.join()
    assert found == ["reference"]


def test_use_backend_is_public():
    assert timm_halonet.use_backend is use_backend
    assert "use_backend" in dir(timm_halonet)

"""The Triton kernels at their edges: values that are no numbers, large logits, far strides, small GPUs, settings."""

import itertools
import logging
import types

import pytest
import torch

from timm_halonet.ops import triton
from timm_halonet.ops.options import Options
from timm_halonet.ops.triton import triton_backward, triton_forward

from .test_native import NAMES, _inputs, _options, _reference
from .test_triton import DEVICE, _check, _run, interpreter  # noqa: F401

pytest.importorskip("triton")
NAN, INF = float("nan"), float("inf")


def _pairs(inputs, grad, options):
    """Output and gradients by autograd over each query's own list of the keys that it sees, in float64."""
    block, halo = options.block_size, options.halo_size
    window, ring = block + 2 * halo, 0 if options.mask_border else halo
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, rel_h, rel_w = inputs
    height, width = k.shape[1:3]
    side = block // options.query_stride
    out = []
    for n, y, x, head in itertools.product(*map(range, q.shape[:4])):
        i, j = y // side, x // side
        query, logits, values = q[n, y, x, head], [], []
        for u, w in itertools.product(range(window), repeat=2):
            row, column = i * block - halo + u, j * block - halo + w
            if not (-ring <= row < height + ring and -ring <= column < width + ring):
                continue
            there = 0 <= row < height and 0 <= column < width
            key = k[n, row, column, head] if there else torch.zeros_like(query)
            row_h, row_w = u - (y - i * side) * options.rel_step, w - (x - j * side) * options.rel_step
            relative = query @ rel_h[row_h + window - 1] + query @ rel_w[row_w + window - 1]
            logits.append(query @ key * options.scale + relative * (options.scale if options.scale_rel else 1))
            values.append(v[n, row, column, head] if there else torch.zeros(v.shape[4], dtype=torch.float64))
        out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    out = torch.stack(out).reshape(grad.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


# which of q, k, v, rel_height, rel_width and the output's gradient, and where
POKES = [
    (0, (0, 1, 1, 0, 2)),
    (1, (0, 2, 3, 0, 1)),
    (2, (0, 0, 1, 0, 1)),
    (3, (2, 1)),  # used by masked keys only
    (3, (6, 1)),
    (4, (2, 1)),
    (4, (5, 0)),
    (5, (0, 0, 1, 0, 1)),
]


@pytest.mark.parametrize("mask_border", [True, False])
@pytest.mark.parametrize("poke", POKES, ids=str)
def test_a_nan_reaches_those_who_see_it(poke, mask_border):
    inputs, grad = _inputs((3, 4), (2, 1, 1), (4, 4), batch=1, heads=1)
    options = Options(2, 1, 1, 0.5, False, mask_border, 1)
    which, where = poke
    [*inputs, grad][which][where] = NAN
    for name, found, expected in zip(NAMES, _run(inputs, grad, options), _pairs(inputs, grad, options), strict=True):
        assert torch.equal(found.isnan(), expected.isnan()), name
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_an_infinite_key_without_weight():
    inputs, grad = _inputs((3, 4), (2, 1, 1), (4, 4), batch=1, heads=1)
    options = Options(2, 1, 1, 0.5, False, True, 1)
    inputs[0][..., 1] = inputs[0][..., 1].abs()
    inputs[1][0, 0, 0, 0, 1] = -INF
    for name, found, expected in zip(NAMES, _run(inputs, grad, options), _pairs(inputs, grad, options), strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite()), name


@pytest.mark.parametrize("logits", [(-INF, -INF), (-2e30, -1e32), (-INF, 3.0), (-2e30, -2e30), (INF, 0.0)], ids=str)
def test_all_logits_tiny(logits):
    """Every logit -inf: NaN as in a softmax. Below -1e30: weights as any other."""
    q, tables = torch.ones(1, 1, 2, 1, 1), [torch.zeros(3, 1)] * 2
    k, v = torch.tensor(logits).view(1, 1, 2, 1, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
    options, grad = Options(2, 0, 1, 1.0, False, True, 1), torch.ones(1, 1, 2, 1, 1)
    expected = _pairs([q, k, v, *tables], grad, options)
    for dtype in (torch.float32, torch.bfloat16):
        found = _run([x.to(dtype) for x in (q, k, v, *tables)], grad, options)
        for i in (0, 3):  # output, and what the weights alone decide
            torch.testing.assert_close(found[i].double(), expected[i], equal_nan=True, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [1e3, 1e4])
def test_gradients_of_logits_shifted_by_a_constant(shift, dtype):
    """The softmax does not see it, and the gradients are no worse than twice the reference's."""
    inputs, grad = _inputs((7, 6), (4, 2, 1), (16, 16), dtype, batch=1, heads=1)
    inputs[0][..., 0], inputs[1][..., 0], inputs[3][:, 0], inputs[4][:, 0] = 1, 0, -shift, 0
    _check(inputs, grad, _options((4, 2, 1), (16, 16), (True, False, True)))


@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_gradients_of_large_logits(scale):
    """Whole numbers, so that the logits, of 10^3 to 10^4, are exact: the weights are what may go wrong."""
    inputs, grad = _inputs((5, 6), (4, 1, 1), (16, 16), batch=1, heads=1)
    inputs[:2] = [(x * 2).round() for x in inputs[:2]]
    inputs[3:] = [(x * 64).round() for x in inputs[3:]]
    _check(inputs, grad, Options(4, 1, 1, scale / 64, False, True, 1))


@pytest.mark.parametrize("rows", [slice(None), 6], ids=["all rows", "one row"])
def test_large_relative_logits_in_float16(rows):
    """q.r of 51,200, which times log2(e) is more than float16 holds."""
    inputs, grad = _inputs((5, 6), (4, 1, 1), (16, 16), torch.float16, batch=1, heads=1)
    inputs[0][..., 0], inputs[1][..., 0], inputs[3][:, 0] = 1, 0, 0
    inputs[3][rows, 0] = 51200
    options = _options((4, 1, 1), (16, 16), (True, False, True))
    found = _run(inputs, grad, options)
    assert all(x.isfinite().all() for x in found)
    if rows == 6:  # q's gradient is the difference of numbers 51,200 times as large, the reference's too
        exact, plain = (_reference(inputs, grad, options, dtype) for dtype in (torch.float64, torch.float16))
        assert (found[0] - exact[0]).abs().max() <= 2 * (plain[0] - exact[0]).abs().max()
    else:
        _check(inputs, grad, options)


@pytest.mark.parametrize("scale_rel", [True, False])
@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-30])
def test_unusual_scales(scale, scale_rel):
    inputs, grad = _inputs((5, 3), (4, 1, 1), (16, 16), batch=1, heads=1)
    options = Options(4, 1, 1, scale, scale_rel, True, 1)
    _check(inputs, grad, options)
    inputs[1][0, 0, 0, 0, 0] = NAN
    assert _run(inputs, grad, options)[0][0, :4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(dtype):
    """As under autocast, which leaves the tables alone; their gradients have the tables' dtype."""
    inputs, grad = _inputs((5, 6), (4, 1, 1), (16, 16), dtype, batch=1, heads=1)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    expected = _run(inputs, grad, options := _options((4, 1, 1), (16, 16), (True, False, True)))
    found = _run([*inputs[:3], *(x.to(dtype).to(other) for x in inputs[3:])], grad, options)
    assert [x.dtype for x in found] == [dtype] * 4 + [other] * 2
    if other == torch.float32:
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found[:4], expected[:4], strict=True))


@pytest.mark.parametrize(("axis", "tensor"), itertools.product(["row", "head"], [0, 1, 2]))
def test_strides_of_a_billion_elements(axis, tensor):
    """Offsets of 2^31 elements inside one image. The memory is virtual, only a few pages are touched."""
    far = 2**30
    shape, strides = {
        "row": ((1, 3, 1, 1, 16), (1, far, 16, 16, 1)),
        "head": ((1, 2, 2, 3, 16), (1, 32, 16, far, 1)),
    }[axis]
    size, heads = shape[1:3], shape[3]
    inputs, grad = _inputs(size, (4, 1, 1), (16, 16), torch.bfloat16, batch=1, heads=heads)
    options = _options((4, 1, 1), (16, 16), (True, False, True))
    expected = _run(inputs, grad, options)
    inputs = [x.to(DEVICE) for x in inputs]
    distant = torch.empty(2 * far + 4096, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
    inputs[tensor] = distant.copy_(inputs[tensor])
    out, saved = triton_forward(*inputs, options)
    found = [out, *triton_backward(grad.to(DEVICE), *inputs, out, saved, options)]
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


def _prepared(shape, strides=None, options=None, **kwargs):
    x = torch.empty(shape, device="meta", dtype=kwargs.get("dtype", torch.bfloat16))
    strides = strides or x.stride()
    options = options or Options(8, 3, 1, 0.25, False, True, 1)
    return triton.prepare((x.shape,) * 3, (strides,) * 3, x.dtype, options, False, "ieee", 0, "warpgroup")


def test_offsets_are_wide_only_where_they_must_be():
    assert not _prepared((128, 512, 512, 8, 16)).meta["WIDE"]
    assert _prepared((1, 16, 16, 1, 16), (0, 2**28, 16, 16, 1)).meta["WIDE"]
    assert not _prepared((1, 4096, 4096, 8, 64)).meta["WIDE"]  # rows of 2^21: a window has 14 of them
    assert _prepared((1, 16, 2**22, 8, 64)).meta["WIDE"]
    large = Options(128, 64, 1, 0.25, False, True, 1)  # gradients of 256 * 256 keys, of all heads, are one window
    assert not _prepared((1, 16, 16, 100, 128), options=large).meta["WIDE"]
    assert _prepared((1, 16, 16, 200, 128), options=large).meta["WIDE"]


@pytest.mark.parametrize(
    ("strides", "dtype", "align"),
    [
        ((64 * 320, 8 * 320, 320, 40, 1), torch.bfloat16, 8),  # 40 channels a head: eight at a time
        ((64 * 320, 8 * 320, 320, 40, 1), torch.float32, 4),
        ((64 * 320, 8 * 320, 320, 36, 1), torch.bfloat16, 4),
        ((64 * 320, 8 * 320, 320, 13, 1), torch.bfloat16, 1),
    ],
)
def test_alignment_is_told(strides, dtype, align):
    x = _prepared((2, 8, 8, 8, 13), strides, dtype=dtype)
    assert x.meta["ALIGN"] == align and x.strides[:4] == tuple(n // align for n in strides[:4])
    assert x.meta["enable_fp_fusion"] is True


class _Small:
    """Kernels on a GPU that holds tiles of at most `numbers` logits."""

    def __init__(self, numbers):
        self.kernels, self.numbers, self.tried = triton._kernels(), numbers, []

    def __getattr__(self, name):
        from triton.runtime.errors import OutOfResources

        kernel = getattr(self.kernels, name)

        class Launcher:
            def __getitem__(_, grid):
                def launch(*args, **meta):
                    if "R" in meta:
                        self.tried.append(meta["M"] * meta["R"] * meta["C"])
                        if self.tried[-1] > self.numbers:
                            raise OutOfResources(self.tried[-1], self.numbers, "shared memory")
                    kernel[grid](*args, **meta)

                return launch

        return Launcher()


@pytest.mark.parametrize("numbers", [512, 0])
def test_a_gpu_that_cannot_hold_the_tiles(numbers, monkeypatch, caplog):
    """Smaller tiles, then `blocked`; never OutOfResources, and one line that says why."""
    inputs, grad = _inputs((9, 7), (8, 3, 1), (16, 16), torch.bfloat16, batch=1, heads=1)
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    small = _Small(numbers)
    monkeypatch.setattr(triton, "_kernels", lambda: small)
    monkeypatch.setattr(triton, "REFUSED", {})
    with caplog.at_level(logging.WARNING):
        _check(inputs, grad, options)
        tries = len(small.tried)
        first = [x.message for x in caplog.records]
        _check(inputs, grad, options)
    assert [x.message for x in caplog.records] == first and len(first) == (2 if numbers else 4)
    assert all("shared memory" in x for x in first) and any("'blocked'" in x for x in first) == (numbers == 0)
    assert len(small.tried) - tries == (2 if numbers else 0)  # what fits is remembered
    assert {name for name, *_ in triton.REFUSED} == {"forward", "backward"}
    assert all("Hardware limit" in reason for _, reason in triton.REFUSED.values())


@pytest.mark.parametrize("message", ["PassManager::run failed", "CUDA error: an illegal memory access"])
def test_a_kernel_that_does_not_compile(message, monkeypatch, caplog):
    """`blocked` computes, and a line says so; but a fault of the GPU is not hidden."""
    inputs, grad = _inputs((9, 7), (8, 3, 1), (16, 16), batch=1, heads=1)
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    kernels = triton._kernels()

    def launch(*args, **meta):
        raise RuntimeError(message)

    broken = dict(forward_kernel=kernels.forward_kernel, backward_kernel=_Everywhere(launch))
    monkeypatch.setattr(triton, "_kernels", lambda: types.SimpleNamespace(**broken))
    monkeypatch.setattr(triton, "REFUSED", {})
    if message.startswith("CUDA"):
        with pytest.raises(RuntimeError, match="CUDA error"):
            _run(inputs, grad, options)
        assert not triton.REFUSED
        return
    with caplog.at_level(logging.WARNING):
        _check(inputs, grad, options)
        _check(inputs, grad, options)
    assert len(caplog.records) == 1 and "'blocked' computes instead (PassManager" in caplog.records[0].message
    assert [(name, *found) for (name, *_), found in triton.REFUSED.items()] == [("backward", 9, message)]


class _Everywhere:
    """A kernel whose launch is this function, on any grid."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


def test_tables_elsewhere_are_refused():
    """A kernel would take any pointer. Compiled graphs come past the checks of `halo_attention`."""
    inputs, grad = _inputs((3, 3), (2, 1, 1), (4, 4), batch=1, heads=1)
    options = Options(2, 1, 1, 0.5, False, True, 1)
    inputs = [x.to(DEVICE) for x in inputs]
    out, saved = triton_forward(*inputs, options)
    for position, wrong, words in [
        (3, inputs[3].to("meta"), "rel_height is torch.float32 on meta"),
        (4, inputs[4].to("meta"), "rel_width is torch.float32 on meta"),
        (4, inputs[4].int(), "rel_width is torch.int32"),
        (3, inputs[3][1:], "rel_height must be"),
        (1, inputs[1].to("meta"), "k is torch.float32 on meta"),
        (2, inputs[2].half(), "v is torch.float16"),
    ]:
        bad = [*inputs[:position], wrong, *inputs[position + 1 :]]
        with pytest.raises(ValueError, match=words):
            triton_forward(*bad, options)
        with pytest.raises(ValueError, match=words):
            triton_backward(grad.to(DEVICE), *bad, out, saved, options)


@pytest.fixture
def precision():
    """Puts every setting of float32 products back."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    yield matmul
    torch.backends.fp32_precision = "none"
    matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


def test_tf32_by_every_setting(precision):
    cuda = torch.device("cuda")
    assert not triton._tf32_allowed(cuda)
    torch.set_float32_matmul_precision("high")
    assert triton._tf32_allowed(cuda) and not triton._tf32_allowed(torch.device("xpu"))
    torch.set_float32_matmul_precision("highest")
    assert not triton._tf32_allowed(cuda)
    precision.allow_tf32 = True
    assert triton._tf32_allowed(cuda)
    precision.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"  # from here on the older getter raises
    assert triton._tf32_allowed(cuda)
    precision.fp32_precision = "ieee"
    assert not triton._tf32_allowed(cuda)
    precision.fp32_precision = "tf32"
    assert triton._tf32_allowed(cuda)


def test_float32_on_a_gpu_asks_the_newer_setting(precision, monkeypatch):
    """The precision that a launch on a GPU gets; only the device is another."""
    precision.fp32_precision = "tf32"
    torch.backends.fp32_precision = "tf32"
    asked = {}
    monkeypatch.setattr(triton, "prepare", lambda *args: asked.update(precision=args[5]))
    monkeypatch.setattr(triton, "_products", lambda device: "warpgroup")
    x = types.SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=torch.float32,
        shape=torch.Size([1, 1, 1, 1, 16]),
        stride=lambda: (16,) * 5,
    )
    triton._prepared(x, x, x, Options(8, 3, 1, 0.25, False, True, 1), False, 0)
    assert asked == {"precision": "tf32"}


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0020*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0030*/              @P0  BRA `(.L_x_2) ;
        /*0040*/                   FENCE.VIEW.ASYNC ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
        /*0080*/                   NOP;
"""


def test_instructions_are_counted_by_loop():
    table = pytest.importorskip("tests.support.kernel_table")
    counts = table.count(LISTING)
    assert counts.instructions == [3, 3, 2]  # LDC, EXIT and the last BRA; BAR, FENCE, BRA; LDG, BRA
    assert (counts.barriers, counts.fences, counts.loads16) == ([0, 1, 0], [0, 1, 0], [0, 0, 1])

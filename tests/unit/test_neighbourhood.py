"""blocked_attention against a loop over queries, in float64."""

import pytest
import torch

from timm_halonet.ops import blocked_attention, halo_attention


def naive(q, k, v, block, halo, padding="masked", scale=None, bias=None, extra=None, extra_mask=None, key_mask=None):
    """One query at a time: collects the keys it may see, with their places in the bias, then softmax."""
    batch, heads, height, width, dim = q.shape
    top, bottom, left, right = halo
    across = -(-width // block[1])
    blocks = -(-height // block[0]) * across
    window = (block[0] + top + bottom, block[1] + left + right)
    keys = window[0] * window[1]
    n = 0 if extra is None else extra[0].shape[3]
    zeros_k, zeros_v = q.new_zeros(dim), v.new_zeros(v.shape[4])
    full = (batch, heads, blocks, block[0] * block[1], keys + n)
    bias = q.new_zeros(full) if bias is None else bias.expand(full)
    extra_mask = torch.ones(batch, heads, blocks, n) if extra_mask is None else extra_mask.expand(full[:3] + (n,))
    out = v.new_zeros(*q.shape[:4], v.shape[4])
    for b, h, y, x in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:4])).tolist():
        i, j = y // block[0], x // block[1]
        number, query = i * across + j, (y % block[0]) * block[1] + x % block[1]
        ks, vs, places = [], [], []
        for place in range(keys):
            row = i * block[0] - top + place // window[1]
            col = j * block[1] - left + place % window[1]
            if padding == "circular":
                row, col = row % height, col % width
            if 0 <= row < height and 0 <= col < width:
                if key_mask is None or key_mask[b, row, col]:
                    ks.append(k[b, h, row, col])
                    vs.append(v[b, h, row, col])
                    places.append(place)
            elif padding == "zeros" and -top <= row < height + bottom and -left <= col < width + right:
                ks.append(zeros_k)
                vs.append(zeros_v)
                places.append(place)
        for place in range(n):
            if extra_mask[b, h, number, place]:
                ks.append(extra[0][b, h, number, place])
                vs.append(extra[1][b, h, number, place])
                places.append(keys + place)
        if places:
            logits = torch.stack(ks) @ q[b, h, y, x] * (dim**-0.5 if scale is None else scale)
            out[b, h, y, x] = (logits + bias[b, h, number, query, places]).softmax(0) @ torch.stack(vs)
    return out


def maps(*shape, dim=3, dim_v=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (dim, dim, dim_v)
    return [torch.randn(*shape, d, generator=generator, dtype=torch.float64).requires_grad_() for d in sizes]


def assert_same(inputs, ours, theirs):
    """Outputs and the gradients of every input agree."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("padding", ["masked", "zeros", "circular"])
@pytest.mark.parametrize(
    ("size", "block", "halo"),
    [
        ((5, 7), (2, 3), (1, 1, 1, 1)),
        ((4, 6), (2, 3), (0, 0, 0, 0)),
        ((5, 4), (3, 3), (0, 2, 0, 2)),  # one-sided
        ((4, 5), (4, 2), (2, 0, 1, 3)),
        ((1, 3), (2, 2), (3, 3, 3, 3)),  # window larger than the map
        ((3, 5), (1, 5), (0, 0, 0, 0)),  # rows
    ],
)
def test_every_query_sees_its_window(size, block, halo, padding):
    inputs = maps(2, 2, *size)
    ours = blocked_attention(*inputs, block, halo, padding=padding)
    assert_same(inputs, ours, naive(*inputs, block, halo, padding))


def test_numbers_stand_for_all_sides():
    inputs = maps(1, 2, 5, 6)
    ours = blocked_attention(*inputs, 3, 1, scale=1.0)
    assert_same(inputs, ours, naive(*inputs, (3, 3), (1, 1, 1, 1), scale=1.0))


@pytest.mark.parametrize("padding", ["masked", "circular"])
@pytest.mark.parametrize("lead", [(2, 1), (2, 4), (2, 2, 1), (2, 2, 4)], ids=str)
def test_bias_broadcasts_over_batch_and_blocks(lead, padding):
    *inputs, bias = *maps(2, 2, 3, 5), torch.randn(*lead, 6, 20, dtype=torch.float64, requires_grad=True)
    ours = blocked_attention(*inputs, (2, 3), (1, 1, 1, 1), bias=bias, padding=padding)
    assert_same([*inputs, bias], ours, naive(*inputs, (2, 3), (1, 1, 1, 1), padding, bias=bias))


@pytest.mark.parametrize("padding", ["masked", "circular"])
@pytest.mark.parametrize("mask_shape", [None, (4, 3), (2, 1, 4, 3), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_extra_keys(mask_shape, padding, with_bias):
    generator = torch.Generator().manual_seed(2)
    inputs = [*maps(2, 2, 3, 5), *maps(2, 2, 4, 3, seed=3)[1:]]  # four blocks, three further keys each
    bias = torch.randn(2, 1, 6, 23, generator=generator, dtype=torch.float64) if with_bias else None
    mask = torch.rand(mask_shape, generator=generator) < 0.5 if mask_shape else None
    ours = blocked_attention(
        *inputs[:3],
        (2, 3),
        1,
        bias=bias,
        extra_keys=inputs[3],
        extra_values=inputs[4],
        extra_mask=mask,
        padding=padding,
    )
    theirs = naive(*inputs[:3], (2, 3), (1,) * 4, padding, bias=bias, extra=inputs[3:], extra_mask=mask)
    assert_same(inputs, ours, theirs)


@pytest.mark.parametrize("padding", ["masked", "zeros", "circular"])
def test_key_mask(padding):
    inputs = maps(3, 2, 4, 5)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1] = True
    mask[2] = False  # no key at all but zeros around the map
    ours = blocked_attention(*inputs, (2, 2), (1, 0, 0, 1), key_mask=mask, padding=padding)
    assert_same(inputs, ours, naive(*inputs, (2, 2), (1, 0, 0, 1), padding, key_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_queries_without_keys_get_zeros_and_no_nan(dtype, with_bias):
    inputs = [x.detach().to(dtype).requires_grad_() for x in maps(2, 2, 6, 6, dim=16, dim_v=16)]
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0] = False
    mask[1, :, :4] = False
    bias = torch.randn(2, 1, 9, 25, requires_grad=True) if with_bias else None
    out = blocked_attention(*inputs, 3, 1, key_mask=mask, bias=bias)
    assert not out[0].any() and not out[1, :, :, :3].any() and out[1, :, :, 3:].all()
    out.float().square().sum().backward()
    for x in (*inputs, *([bias] if with_bias else [])):
        assert x.grad.isfinite().all()
    assert not inputs[1].grad[0].any() and inputs[1].grad[1, :, :, 4:].any()


@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_equals_the_fused_op_without_positions(size, padding):
    q, k, v = (x.detach().float().requires_grad_() for x in maps(2, 3, *size, dim=8, dim_v=4))
    tables = [torch.zeros(2 * 10 - 1, 8)] * 2
    ours = blocked_attention(q, k, v, 4, 3, padding=padding)
    theirs = halo_attention(
        *(x.permute(0, 2, 3, 1, 4) for x in (q, k, v)),
        *tables,
        block_size=4,
        halo_size=3,
        mask_border=padding == "masked",
    ).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_takes_bias_and_mask():
    q, k, v = (x.detach().float() for x in maps(1, 2, 5, 7, dim=8, dim_v=8))
    bias, mask = torch.randn(2, 1, 9, 25), torch.rand(1, 5, 7) < 0.7
    exact = blocked_attention(q, k, v, 3, 1, bias=bias, key_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = blocked_attention(q, k, v, 3, 1, bias=bias, key_mask=mask)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_compiles_with_dynamic_sizes_without_graph_breaks():
    def rows(q, k, v):
        return blocked_attention(q, k, v, (1, q.shape[3]))

    compiled = torch.compile(rows, backend="eager", fullgraph=True, dynamic=True)
    for size in ((3, 5), (4, 7)):
        inputs = maps(1, 1, *size)
        torch.testing.assert_close(compiled(*inputs), rows(*inputs))


def _wrong(**changes):
    q, k, v = (x.detach() for x in maps(2, 2, 4, 5))
    return {**dict(q=q, k=k, v=v, block_size=2, halo=1), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block_size=0), r"block_size must be .* >= 1, got 0"),
        (dict(block_size=(2, 2, 2)), r"block_size must be an integer or 2"),
        (dict(block_size=2.0), r"block_size"),
        (dict(block_size=True), r"block_size must be .*, got True"),
        (dict(halo=(1, True, 1, 1)), r"halo must be .*True"),
        (dict(scale=float("nan")), r"scale must be a finite number, got nan"),
        (dict(scale="1"), r"scale must be a finite number, got '1'"),
        (dict(q=torch.zeros(2, 2, 4, 5, 3, dtype=torch.int64)), r"q must be .*float32.*, got torch.int64"),
        (dict(q=torch.zeros(2, 2, 4, 5, 3, dtype=torch.complex64)), r"q must be .*, got torch.complex64"),
        (dict(v=torch.zeros(2, 2, 4, 5, 3, dtype=torch.float64, device="meta")), r"v is torch.float64 on meta"),
        (dict(bias=torch.zeros(4, 16, dtype=torch.int64)), r"bias must be .*, got torch.int64"),
        (dict(bias=torch.zeros(4, 16, device="meta")), r"q on cpu and bias on meta"),
        (dict(key_mask=torch.ones(2, 4, 5, dtype=torch.bool, device="meta")), r"q on cpu and key_mask on meta"),
        (dict(halo=-1), r"halo must be .* >= 0, got -1"),
        (dict(halo=(1, 1)), r"halo must be an integer or 4"),
        (dict(q=torch.zeros(2, 4, 5, 3)), r"q must be \(batch, heads, height, width, dim\)"),
        (dict(k=torch.zeros(2, 2, 4, 6, 3, dtype=torch.float64)), r"\(2, 2, 4, 6, 3\)"),
        (dict(v=torch.zeros(2, 2, 4, 5, 2)), r"q is torch.float64 .* v is torch.float32"),
        (dict(q=torch.zeros(0, 2, 4, 5, 3), k=torch.zeros(0, 2, 4, 5, 3), v=torch.zeros(0, 2, 4, 5, 3)), "empty"),
        (dict(padding="reflect"), r"'masked', 'zeros', 'circular', got 'reflect'"),
        (dict(bias=torch.zeros(2, 1, 4, 15)), r"bias must broadcast to .*\(2, 2, 6, 4, 16\), got \(2, 1, 4, 15\)"),
        (dict(bias=torch.zeros(1, 2, 2, 6, 4, 16)), r"bias must broadcast"),
        (dict(extra_keys=torch.zeros(2, 2, 6, 1, 3)), r"extra_keys and extra_values come together"),
        (dict(extra_mask=torch.ones(6, 1, dtype=torch.bool)), r"extra_mask without extra_keys"),
        (dict(key_mask=torch.ones(2, 4, 5)), r"key_mask must be boolean \(2, 4, 5\)"),
        (dict(key_mask=torch.ones(2, 5, 4, dtype=torch.bool)), r"key_mask must be .* \(2, 5, 4\)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        blocked_attention(**_wrong(**changes))


@pytest.mark.parametrize(
    ("keys", "values", "mask", "message"),
    [
        ((2, 2, 5, 1, 3), (2, 2, 6, 1, 2), (6, 1), r"extra_keys must be \(2, 2, 6, 1, 3\), got \(2, 2, 5, 1, 3\)"),
        ((2, 2, 6, 0, 3), (2, 2, 6, 0, 2), (6, 1), r"extra_keys must be"),
        ((2, 2, 6, 2, 3), (2, 2, 6, 1, 2), (6, 2), r"extra_values must be \(2, 2, 6, 2, 2\)"),
        ((2, 2, 6, 2, 3), (2, 2, 6, 2, 2), (5, 2), r"extra_mask must be boolean and broadcast"),
    ],
)
def test_wrong_extra_keys_are_refused(keys, values, mask, message):
    extra = dict(
        extra_keys=torch.zeros(keys, dtype=torch.float64),
        extra_values=torch.zeros(values, dtype=torch.float64),
        extra_mask=torch.ones(mask, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match=message):
        blocked_attention(**_wrong(**extra))


class Exported(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, **masks):
        return blocked_attention(q, k, v, 2, (1, 1, 0, 2), **self.options, **masks)


@pytest.mark.parametrize("padding", ["masked", "zeros", "circular"])
@pytest.mark.parametrize("masks", [(), ("key_mask",), ("bias",), ("key_mask", "bias")], ids=str)
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_exported_it_has_no_infinite_or_large_constants(padding, masks, how):
    """They ruin the scale of an int8 model. Masked keys may have the largest logits, and rows no key at all."""
    q, k, v = (x.detach().float() for x in maps(1, 2, 3, 5))
    given = {}
    if "key_mask" in masks:
        given["key_mask"] = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.5
        given["key_mask"][:, :, 3:] = False  # whole windows
        k = torch.where(given["key_mask"][:, None, :, :, None], k, 50 * k)
    if "bias" in masks:
        given["bias"] = torch.randn(2, 1, 4, 16, generator=torch.Generator().manual_seed(2))
    model = Exported(padding=padding).eval()
    expected = model(q, k, v, **given)
    if how == "exported":
        program = torch.export.export(model, (q, k, v), given).run_decompositions()
        actual = program.module()(q, k, v, **given)
        constants = [x for node in program.graph.nodes for x in node.args if isinstance(x, float)]
        constants += [float(x.abs().max()) for x in program.constants.values() if x.is_floating_point()]
        assert "scaled_dot_product" not in str(program.graph)
        assert all(abs(x) < 10 for x in constants)
    else:
        traced = torch.jit.trace(
            lambda *args: model(*args[:3], **dict(zip(given, args[3:], strict=True))), (q, k, v, *given.values())
        )
        actual = traced(q, k, v, *given.values())
        assert "scaled_dot_product" not in str(traced.graph) and "-inf" not in str(traced.graph)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

"""The differential fuzz of the op: its cases pass, and it can fail."""

import dataclasses

import pytest
import torch

from timm_halonet.ops import BACKENDS, halo_attention

from ..support import fuzz_op


@pytest.mark.parametrize("backend", fuzz_op.runnable())
def test_random_cases(backend):
    tally = fuzz_op.fuzz(18, seed=0, backends=[backend])
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(tally.cases.values()) == 18
    assert {mode for mode, _ in tally.cases} == set(fuzz_op.MODES)


@pytest.mark.integration
def test_three_hundred_cases():
    tally = fuzz_op.fuzz(300, seed=1)
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(tally.cases.values()) == 300 * len(fuzz_op.runnable())


def broken(change):
    """A backend that answers as the reference after `change` of its options."""

    def attend(q, k, v, rel_height, rel_width, options):
        return BACKENDS["reference"][0](q, k, v, rel_height, rel_width, change(options))

    return attend, lambda q: None


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o._replace(scale=o.scale * 1.01),
        lambda o: o._replace(scale_rel=not o.scale_rel),
        lambda o: o._replace(mask_border=not o.mask_border),
    ],
    ids=["scale", "scale_rel", "mask_border"],
)
def test_a_wrong_function_is_found(change, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "broken", broken(change))
    assert fuzz_op.main(["--cases", "6", "--backends", "broken", "--show", "1"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED broken: out: error" in printed and "Case(index=" in printed and "seed 0" in printed


def test_a_wrong_gradient_is_found(monkeypatch):
    """Of one table alone."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, rel_height, rel_width, options):
            ctx.save_for_backward(q, k, v, rel_height, rel_width)
            ctx.options = options
            return BACKENDS["reference"][0](q, k, v, rel_height, rel_width, options)

        @staticmethod
        def backward(ctx, grad):
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                out = BACKENDS["reference"][0](*leaves, ctx.options)
            *grads, last = torch.autograd.grad(out, leaves, grad)
            return *grads, last * 1.001, None

    monkeypatch.setitem(BACKENDS, "broken", (Wrong.apply, lambda q: None))
    tally = fuzz_op.fuzz(6, seed=0, backends=["broken"])
    assert tally.failures
    assert all("d rel_width: error" in x and "d rel_height" not in x.split("Case")[0] for x in tally.failures)


def test_a_lost_nan_is_found(monkeypatch):
    def attend(q, k, v, rel_height, rel_width, options):
        return BACKENDS["reference"][0](q.nan_to_num(0, 0, 0), k, v, rel_height, rel_width, options)

    monkeypatch.setitem(BACKENDS, "broken", (attend, lambda q: None))
    tally = fuzz_op.fuzz(24, seed=0, backends=["broken"])
    assert tally.failures
    assert all("mode='non-finite'" in x and "finite that must not be" in x for x in tally.failures)


def test_the_oracle_is_autograd_over_one_query_at_a_time():
    """Each query of a small case against all keys of its window, by hand and by autograd."""
    case = dataclasses.replace(
        fuzz_op.make_case(0, 0), batch=1, heads=1, height=4, width=3, dim=2, dim_v=3, block_size=2, halo_size=1,
        query_stride=1, scale=0.5, scale_rel=False, mask_border=True, strided_rel="true", dtype="float32",
        table_dtype="float32", layout="contiguous", grad_layout="contiguous",
    )  # fmt: skip
    *tensors, grad = fuzz_op.make_inputs(case)
    q, k, v, th, tw = leaves = [x.double().requires_grad_() for x in tensors]
    rows = []
    for y in range(4):
        for x in range(3):
            keys = [
                (u, w)
                for u in range(max(0, y // 2 * 2 - 1), min(4, y // 2 * 2 + 3))
                for w in range(max(0, x // 2 * 2 - 1), min(3, x // 2 * 2 + 3))
            ]
            query = q[0, y, x, 0]
            logits = [query @ (0.5 * k[0, u, w, 0] + th[u - y + 4] + tw[w - x + 4]) for u, w in keys]
            rows.append(torch.stack(logits).softmax(0) @ torch.stack([v[0, u, w, 0] for u, w in keys]))
    out = torch.stack(rows).view(1, 4, 3, 1, 3)
    expected = [out, *torch.autograd.grad(out, leaves, grad.double())]
    results, _ = fuzz_op.oracle(case, [*tensors, grad])
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e.detach(), atol=1e-12, rtol=0)


def test_interrupted_it_shows_what_it_has(monkeypatch, capsys):
    tried = []

    def stop(case, backends, tally):
        tried.append(case.index)
        tally.cases[case.mode, "blocked"] += 1
        if len(tried) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fuzz_op, "try_case", stop)
    assert fuzz_op.main(["--cases", "100"]) == 0
    assert tried == [0, 1, 2]
    assert "results so far" in capsys.readouterr().out


# ---- siblings of what the fuzz found, by themselves ----


def gradients(backend, tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = halo_attention(*leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


ROW = dict(block_size=4, halo_size=0)  # one row of four pixels in one block: a query in column x and a key in column w
# use row w - x + 3 of rel_width


def row_of_four():
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 1, 4, 1, 8)] * 3 + [(7, 8)] * 2
    return [torch.randn(*shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_bad_row_of_a_table_stays_with_the_queries_that_use_it(backend, value):
    tensors = row_of_four()
    tensors[4][0, 2] = value  # the last query's with the first key
    out, dq, *_ = gradients(backend, tensors, **ROW)
    bad = [not row.isfinite().all() for row in dq.flatten(0, 1)[0]]
    assert bad == [False, False, False, True]
    assert out[0, 0, :3].isfinite().all()


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_row_of_a_table_that_no_key_uses_may_be_anything(backend):
    tensors = row_of_four()
    tensors[3][[0, 1, 2, 4, 5, 6]] = float("nan")  # one row of pixels uses row 3 of rel_height alone
    assert all(x.isfinite().all() for x in gradients(backend, tensors, **ROW))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_bad_query_stays_out_of_rows_that_it_does_not_use(backend):
    tensors = row_of_four()
    tensors[0][0, 0, 1, 0, 0] = float("nan")  # column 1: rows 2 to 5
    drel = gradients(backend, tensors, **ROW)[5]
    assert [not row.isfinite().all() for row in drel] == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_queries_beyond_the_map_have_no_gradient(backend):
    """A NaN value makes the weight gradients of its block NaN; pixels beyond the map are not in the block."""
    tensors = [x[:, :, :3] if x.ndim == 5 else x for x in row_of_four()]
    tensors[2][0, 0, 1, 0, 0] = float("nan")
    drel = gradients(backend, tensors, **ROW)[5]
    assert [not row.isfinite().all() for row in drel] == [False, True, True, True, True, True, False]


@pytest.mark.parametrize(("keys", "expected"), [([-2e30, -1e32], 1.0), ([-1e38, -3e38], 1.0), ([-2e30, -2e30], 2.0)])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_very_negative_logits(backend, keys, expected):
    q, k, v = torch.ones(1, 1, 2, 1, 1), torch.tensor(keys).view(1, 1, 2, 1, 1), torch.tensor([1.0, 3.0])
    zeros = torch.zeros(3, 1)
    out = halo_attention(q, k, v.view(k.shape), zeros, zeros, block_size=2, halo_size=0, scale=1.0, backend=backend)
    assert out.flatten().tolist() == [expected, expected]


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_nothing_but_minus_infinity_is_nan(backend):
    q, k = torch.ones(1, 1, 2, 1, 1), torch.full((1, 1, 2, 1, 1), -float("inf"))
    zeros = torch.zeros(3, 1)
    results = gradients(backend, [q, k, torch.ones_like(k), zeros, zeros], block_size=2, halo_size=0, scale=1.0)
    assert all(results[i].isnan().all() for i in (0, 1, 2, 3))


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_scale_of_zero_and_a_single_key_keep_a_nan(backend, where):
    for options in (dict(ROW, scale=0.0, scale_rel=True), dict(block_size=1, halo_size=0)):
        tensors = row_of_four() if options["block_size"] == 4 else [x[:, :, :1] for x in row_of_four()[:3]]
        tensors[where][0, 0, 0, 0, 3] = float("nan")
        tables = [torch.zeros(2 * options["block_size"] - 1, 8)] * 2
        assert halo_attention(*tensors[:3], *tables, **options, backend=backend)[0, 0, 0].isnan().any()


def test_blocked_keeps_large_logits_exact():
    """Logits of 1e4 that float32 has exactly: gradients as exact as those of small ones."""
    case = dataclasses.replace(fuzz_op.make_case(0, 1), dtype="float32", table_dtype="float32")
    assert case.mode == "large"
    tensors = fuzz_op.make_inputs(case)
    expected, sizes = fuzz_op.oracle(case, tensors)
    found = fuzz_op.errors(fuzz_op.run_backend("blocked", case, tensors), expected)
    assert all(error <= 1e-6 * size for error, size in zip(found, sizes, strict=True)), (found, sizes)

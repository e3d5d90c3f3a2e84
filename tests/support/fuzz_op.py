"""Differential fuzz of halo attention: random cases, each backend judged by lists of (query, key) pairs in float64.

    python tests/support/fuzz_op.py --cases 20000 --seed 1
    python tests/support/fuzz_op.py --seed 1 --only 4711          # one case again

Every backend that runs on this machine takes part (TRITON_INTERPRET=1 adds Triton's), with its output and its five
gradients. Two things must hold:

- What is not finite is not finite in exactly those places where a pair has it, and nowhere else.
- The error is at most twice that of the reference in the same dtype. Where the reference is exact by luck, as it is in
  small problems, the error may be four units in the last place of the terms that are summed up. And since the
  reference's error is a random number, it is measured on four more draws of the numbers before a case fails.

The reference itself is judged in float64, where nothing but an error of its own can show.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from timm_halonet.ops import BACKENDS, halo_attention

EXACT = ("large", "shifted")  # whose logits float32 has exactly, so that the scale must be a power of two
MODES = ("normal", "large", "shifted", "tiny", "equal", "non-finite")
NAMES = ("out", "dq", "dk", "dv", "d rel_height", "d rel_width")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# NaN with low, high and all bits of the payload set, either sign, quiet and signalling; the infinities
BITS = {
    torch.float32: (0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, -0x3FFF80, 0x7F800000, -0x800000),
    torch.bfloat16: (0x7FC0, 0x7FC1, 0x7F81, 0x7FFF, -1, -0x3F, 0x7F80, -0x80),
}


@dataclass(frozen=True)
class Case:
    """All that decides a case, with the seed of its numbers."""

    index: int
    mode: str
    dtype: str
    table_dtype: str
    batch: int
    height: int
    width: int
    heads: int
    dim: int
    dim_v: int
    block_size: int
    halo_size: int
    query_stride: int
    scale: float | None
    scale_rel: bool
    mask_border: bool
    strided_rel: str
    layout: str
    grad_layout: str
    numbers: int  # seed

    @property
    def options(self) -> dict:
        keys = ("block_size", "halo_size", "query_stride", "scale", "scale_rel", "mask_border", "strided_rel")
        return {key: getattr(self, key) for key in keys}


def make_case(seed: int, index: int) -> Case:
    r = random.Random(f"{seed}/{index}")
    mode = MODES[index % len(MODES)]
    block = r.choice([1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 8, 10, 12, 14])
    halo = r.choice([0, 1, 1, 2, 3, 3, 4])
    sizes = dict(
        batch=r.choice([1, 1, 2, 3]),
        heads=r.choice([1, 1, 2, 3]),
        dim=r.choice([1, 2, 3, 4, 7, 8, 13, 16, 16, 24, 36, 64]),
        dim_v=r.choice([1, 2, 3, 4, 7, 8, 13, 16, 16, 24, 36, 64]),
        height=round(math.exp(r.uniform(0, math.log(40)))),
        width=round(math.exp(r.uniform(0, math.log(40)))),
    )
    stride = r.choice([1, 1, 1, *(s for s in (2, 3, 4) if block % s == 0)])

    def work():  # numbers in the oracle's lists of pairs
        keys = min(block + 2 * halo, sizes["height"] + 2 * halo) * min(block + 2 * halo, sizes["width"] + 2 * halo)
        queries = sizes["batch"] * sizes["heads"] * sizes["height"] * sizes["width"] / stride**2
        return queries * keys * (sizes["dim"] + sizes["dim_v"])

    limit = r.choice([1e5, 2e5, 4e5, 4e5, 2e6])
    while work() > limit:
        name = r.choice([name for name in sizes if sizes[name] > 1])
        sizes[name] = (sizes[name] + 1) // 2
    return Case(
        index=index,
        mode=mode,
        dtype=r.choice(["float32", "float32", "bfloat16"]),
        table_dtype=r.choice(["float32", "same"]),
        block_size=block,
        halo_size=halo,
        query_stride=stride,
        scale=r.choice([1.0, 0.5, 0.25]) if mode in EXACT else r.choice([None, None, 1.0, 0.3, -0.7, 0.0]),
        scale_rel=r.random() < 0.5,
        mask_border=r.random() < 0.5,
        strided_rel=r.choice(["true", "grid"]),
        layout=r.choice(["contiguous", "interleaved", "channels first", "gaps"]),
        grad_layout=r.choice(["contiguous", "channels first", "gaps"]),
        numbers=r.getrandbits(48),
        **sizes,
    )


def make_inputs(case: Case, draw: int = 0) -> list[torch.Tensor]:
    """q, k, v, the two tables, and the gradient of the output, as the op gets them.

    Another draw has other numbers of the same size, and what is not finite in the same places.
    """
    g = torch.Generator().manual_seed(case.numbers + draw)
    r = random.Random(case.numbers)
    dtype = DTYPES[case.dtype]
    table_dtype = dtype if case.table_dtype == "same" else torch.float32
    grid = tuple(-(-length // case.query_stride) for length in (case.height, case.width))
    rows = 2 * (case.block_size + 2 * case.halo_size) - 1

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q = randn(case.batch, *grid, case.heads, case.dim)
    k = randn(case.batch, case.height, case.width, case.heads, case.dim)
    v = randn(case.batch, case.height, case.width, case.heads, case.dim_v)
    tables = [randn(rows, case.dim) * r.choice([0.1, 1.0]) for _ in range(2)]
    grad = randn(*q.shape[:4], case.dim_v)
    if case.mode == "large":  # multiples of 1/4, whose products and sums float32 has exactly
        size = math.sqrt(r.choice([1e3, 3e3, 1e4]) / math.sqrt(case.dim))
        q, k = ((x * size * 4).round() / 4 for x in (q, k))
        tables = [(x * r.choice([1, size]) * 4).round() / 4 for x in tables]
    elif case.mode == "shifted":
        q, k, *tables = ((x * 4).round() / 4 for x in (q, k, *tables))
        q[..., 0] = 1  # a constant in one channel of a table is one in all logits
        r.choice(tables)[:, 0] = r.choice([-1, 1]) * r.choice([10.0, 100.0, 1e3, 1e4])
    elif case.mode == "tiny":
        size = 10.0 ** -r.randint(2, 8)
        q, k, *tables = (x * size for x in (q, k, *tables))
    elif case.mode == "equal":
        k = k[:, :1, :1].expand(k.shape)
        tables = [x[:1].expand(x.shape) for x in tables]
    tensors = [x.to(dtype).contiguous() for x in (q, k, v)]
    tensors += [x.to(table_dtype).contiguous() for x in tables] + [grad.to(dtype)]
    if case.mode == "non-finite":
        for _ in range(r.randint(1, 3)):
            x = r.choice(tensors)
            bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
            bits.view(-1)[r.randrange(x.numel())] = r.choice(BITS[x.dtype])
    q, k, v, *tables, grad = tensors
    if case.layout == "interleaved":  # as the layer makes them
        k, v = torch.cat([k, v], -1).split([case.dim, case.dim_v], -1)
    else:
        q, k, v = (_laid_out(x, case.layout) for x in (q, k, v))
    return [q, k, v, *tables, _laid_out(grad, case.grad_layout)]


def _laid_out(x, layout):
    if layout == "channels first":
        return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    if layout == "gaps":
        big = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3], x.shape[4] + 3)
        big[:, 1:, 1:-1, :, 2:-1] = x
        return big[:, 1:, 1:-1, :, 2:-1]
    return x


# ---- the oracle: every pair of a query and a key, one by one ----


def _pairs(case: Case, length: int) -> torch.Tensor:
    """Along one dimension of the map, (query, pixel of the key, row of the table) of all pairs, (pairs, 3)."""
    block, halo, stride = case.block_size, case.halo_size, case.query_stride
    ring = 0 if case.mask_border else halo
    found = []
    for query in range(-(-length // stride)):
        pixel = query * stride
        start = pixel // block * block
        seen_at = pixel if case.strided_rel == "true" else start + (pixel - start) // stride
        for key in range(start - halo, start + block + halo):
            if -ring <= key < length + ring:
                found.append((query, key, key - seen_at + block + 3 * halo - 1))
    return torch.tensor(found)


def oracle(case: Case, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """The output and five gradients in float64, and for each the largest sum of its terms' absolute values.

    Where logits are rounded, a weight counts as much more as rounding its logit's terms, half a unit each, changes it.
    """
    q, k, v, th, tw, g = (x.double() for x in tensors)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    rel_scale = scale if case.scale_rel else 1.0
    rows, cols = _pairs(case, case.height), _pairs(case, case.width)
    rows, cols = (x.flatten(0, 1) for x in (rows[:, None].expand(-1, len(cols), 3), cols.expand(len(rows), -1, 3)))
    query = rows[:, 0] * q.shape[2] + cols[:, 0]
    inside = (rows[:, 1] >= 0) & (rows[:, 1] < case.height) & (cols[:, 1] >= 0) & (cols[:, 1] < case.width)
    key = torch.where(inside, rows[:, 1] * case.width + cols[:, 1], case.height * case.width)  # the last one is zeros

    def listed(x):  # (batch, height, width, heads, d) -> (pixels, batch * heads, d)
        return x.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)

    def total(terms, index, count):
        return terms.new_zeros(count, *terms.shape[1:]).index_add_(0, index, terms)

    qs, ks, vs, gs = (listed(x) for x in (q, k, v, g))
    ks, vs = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (ks, vs))
    count_q, count_k, count_t = len(qs), len(ks), len(th)
    qp, kp, vp, gp = qs[query], ks[key], vs[key], gs[query]
    hp, wp = th[rows[:, 2]][:, None], tw[cols[:, 2]][:, None]
    logits = (scale * (qp * kp).sum(-1)) + rel_scale * ((qp * hp).sum(-1) + (qp * wp).sum(-1))
    top = logits.new_full((count_q, logits.shape[1]), -math.inf)
    top.scatter_reduce_(0, query[:, None].expand_as(logits), logits.nan_to_num(-math.inf, math.inf, -math.inf), "amax")
    weights = (logits - top[query]).exp()
    weights = weights / total(weights, query, count_q)[query]
    blurred = weights
    if case.mode not in EXACT:
        rounded = (scale * qp * kp).square() + (rel_scale * qp * hp).square() + (rel_scale * qp * wp).square()
        blurred = weights * (1 + rounded.sum(-1).sqrt().where(logits.isfinite(), 0.0) / 2)
    products = gp * vp
    dweights = products.sum(-1)
    mean = total(weights * dweights, query, count_q)
    mean_size = total(blurred * products.abs().sum(-1), query, count_q)
    dlogits = weights * (dweights - mean[query])
    dlogits_size = (blurred * (products.abs().sum(-1) + mean_size[query]))[..., None]  # of the terms that make them up

    def table(index):
        sums = total((dlogits[..., None] * rel_scale * qp).sum(1), index, count_t)
        return sums, total((dlogits_size * abs(rel_scale) * qp.abs()).sum(1), index, count_t)

    def gradient(vectors, index, count):
        sums = total(dlogits[..., None] * vectors, index, count)
        return sums, total(dlogits_size * vectors.abs(), index, count)

    def mapped(x, like):  # the inverse of `listed`
        return x.unflatten(1, (like.shape[0], like.shape[3])).unflatten(0, like.shape[1:3]).permute(2, 0, 1, 3, 4)

    def weighted(vectors, index, count):
        sums = total(weights[..., None] * vectors, index, count)
        return sums, total(blurred[..., None] * vectors.abs(), index, count)

    out, dq, dk, dv = (
        weighted(vp, query, count_q),
        gradient(scale * kp + rel_scale * (hp + wp), query, count_q),
        gradient(scale * qp, key, count_k),
        weighted(gp, key, count_k),
    )
    dk, dv = ([x[:-1] for x in pair] for pair in (dk, dv))
    results = [mapped(out[0], g), mapped(dq[0], q), mapped(dk[0], k), mapped(dv[0], v), table(rows[:, 2])[0]]
    results.append(table(cols[:, 2])[0])
    sizes = [out[1], dq[1], dk[1], dv[1], table(rows[:, 2])[1], table(cols[:, 2])[1]]
    return results, [_largest(x) for x in sizes]


def _largest(x: torch.Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


# ---- running and judging ----


def run_backend(backend: str, case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:5]]
    out = halo_attention(*leaves, backend=backend, **case.options)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[5])]


def errors(results: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """The largest error of each, over what is finite in both."""
    return [_largest(a.double() - e) for a, e in zip(results, expected, strict=True)]


def other_draws(case: Case) -> list[float]:
    """The reference's largest errors on other draws of the numbers, each as a share of its terms."""
    found = []
    for draw in range(1, 5):
        tensors = make_inputs(case, draw)
        expected, sizes = oracle(case, tensors)
        results = run_backend("reference", case, tensors)
        found.append([e / size if size else 0.0 for e, size in zip(errors(results, expected), sizes, strict=True)])
    return [max(draws) for draws in zip(*found, strict=True)]


@dataclass
class Tally:
    cases: dict = field(default_factory=lambda: defaultdict(int))  # (mode, backend) -> number
    worst: dict = field(default_factory=lambda: defaultdict(float))  # (mode, backend) -> error / the reference's
    failures: list[str] = field(default_factory=list)


def try_case(case: Case, backends: list[str], tally: Tally) -> None:
    tensors = make_inputs(case)
    expected, sizes = oracle(case, tensors)
    reference = run_backend("reference", case, tensors)
    reference_errors = errors(reference, expected)
    others = None
    for backend in backends:
        if BACKENDS[backend][1](tensors[0]) is not None:
            continue
        key = (case.mode, backend)
        tally.cases[key] += 1
        try:
            results = reference if backend == "reference" else run_backend(backend, case, tensors)
        except Exception as e:
            tally.failures.append(f"{backend}: {type(e).__name__}: {e}\n    {case}")
            continue
        problems = []
        for name, a, e in zip(NAMES, results, expected, strict=True):
            wrong = a.isfinite() != e.isfinite()
            if wrong.any():
                lost = int((a.isfinite() & wrong).sum())
                problems.append(
                    f"{name}: {lost} finite that must not be, {int(wrong.sum()) - lost} the other way round"
                )
        if backend == "reference":
            exact = run_backend(backend, case, [x.double() for x in tensors])
            found, allowed = errors(exact, expected), [0.0] * 6
            unit = 1e-10  # of the exponential's argument, which may be 1e4
        else:
            found, allowed = errors(results, expected), reference_errors
            unit = 2 * torch.finfo(tensors[0].dtype).eps
        for i, name in enumerate(NAMES):
            limit = max(allowed[i], unit * sizes[i], torch.finfo(torch.float32).tiny)
            if found[i] > 2 * limit and backend != "reference":
                others = others or other_draws(case)
                limit = max(limit, others[i] * sizes[i])
            tally.worst[key] = max(tally.worst[key], found[i] / limit)
            if found[i] > 2 * limit:
                problems.append(
                    f"{name}: error {found[i]:.2e}, {found[i] / limit:.1f} times the {limit:.2e} of the rule"
                )
        if problems:
            tally.failures.append(f"{backend}: {'; '.join(problems)}\n    {case}")


def runnable() -> list[str]:
    """The backends that run on this machine's CPU in one of the dtypes."""
    return [name for name, (_, can_run) in BACKENDS.items() if can_run(torch.zeros(1, 1)) is None]


def fuzz(cases: int, seed: int, backends: list[str] | None = None, first: int = 0, progress: bool = False) -> Tally:
    """Tries the cases `first` to `first + cases` of a seed. Ctrl-C ends it early."""
    tally = Tally()
    try:
        for index in tqdm(range(first, first + cases), disable=not progress, unit="case"):
            try_case(make_case(seed, index), backends or runnable(), tally)
    except KeyboardInterrupt:
        print("Interrupted; results so far:")
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), help="default: all that run here")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this case alone")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="failures to print")
    args = parser.parse_args(arguments)
    only = args.only is not None
    first, cases = (args.only, 1) if only else (0, args.cases)
    tally = fuzz(cases, args.seed, args.backends, first, sys.stderr.isatty() and not only)
    print(f"seed {args.seed}; error as a multiple of the reference's: at most 2 is right")
    print(f"{'mode':<12} {'backend':<10} {'cases':>6} {'worst':>8}")
    for (mode, backend), count in sorted(tally.cases.items()):
        print(f"{mode:<12} {backend:<10} {count:>6} {tally.worst[mode, backend]:>8.2f}")
    for failure in tally.failures[: args.show]:
        print(f"FAILED {failure}")
    print(f"{len(tally.failures)} failures")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())

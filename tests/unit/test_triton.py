"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter; and compiled for chips not at hand."""

import functools
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from timm_halonet.ops import BACKENDS, backend_for, halo_attention, triton, triton_plan
from timm_halonet.ops.options import Options
from timm_halonet.ops.packed import split_keys_and_values, split_queries_keys_and_values
from timm_halonet.ops.triton import can_run_triton, plan, triton_backward, triton_backward_packed, triton_forward

from .test_native import BLOCKS, _inputs, _options, _reference
from .test_native import _check as against_reference

pytest.importorskip("triton")
from timm_halonet.ops import triton_kernels, triton_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1), (3, 5), (7, 7), (19, 38)]
DIMS = [(16, 16), (32, 32), (36, 44), (4, 12), (64, 64), (128, 128)]
# warp-instructions and barriers a tile of 64 queries, on sm_90 in bfloat16; see docs/backends/kernels.md
# instructions of a warp, barriers and warps of a program, at most; and programs on a multiprocessor, at least
COUNTED = {
    ("H1 stage 1", "forward", 90): (1700, 22, 4, 3),
    ("H1 stage 1", "backward", 90): (2300, 32, 4, 2),
    ("H1 stage 3", "forward", 90): (1900, 23, 4, 3),  # 19 barriers with twice the keys a step, but 2 programs
    ("H1 stage 3", "backward", 90): (2800, 60, 4, 2),
    ("H5 stage 1", "forward", 90): (5100, 44, 4, 2),
    ("H5 stage 1", "backward", 90): (9200, 140, 4, 2),
    ("H1 stage 1", "forward", 100): (1800, 42, 2, 6),  # of 32 queries, as all on that chip
    ("H1 stage 1", "backward", 100): (2950, 48, 2, 4),
    ("H1 stage 3", "backward", 100): (3950, 100, 2, 4),
    ("H5 stage 1", "backward", 80): (13300, 420, 2, 4),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request):
    if DEVICE == "cpu":
        versions = [tuple(map(int, version(x).split(".")[:2])) for x in ("triton", "numpy")]
        if versions[0] < (3, 7) and versions[1] >= (2, 4) and "compiled" not in request.node.name:
            pytest.skip("the interpreter of Triton 3.6 fails with NumPy 2.4 (loops of a computed length)")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # and see conftest.py
    refused, before = triton.REFUSED, dict(triton.REFUSED)  # some tests have one of their own
    yield
    assert refused == before  # or another backend has computed


def _sample():
    """Every block shape on every size; dims, dtypes and flags go round."""
    cases = []
    for i, size in enumerate(SIZES):
        for j, blocks in enumerate(BLOCKS):
            n = i * len(BLOCKS) + j
            if (size == (19, 38) and n % 5) or (
                size == (1, 1) and n % 2
            ):  # slow in the interpreter; nothing to see twice
                continue
            flags = (n % 2 == 0, n // 2 % 2 == 0, (n + n // 3) % 2 == 0)
            cases.append((size, blocks, DIMS[n % len(DIMS)], flags, DTYPES[(n + i) % 3]))
    cases.append(((9, 33), (32, 3, 1), (16, 16), (True, False, True), torch.bfloat16))
    return cases


def _run(inputs, grad, options):
    inputs, grad = [x.to(DEVICE) for x in inputs], grad.to(DEVICE)
    out, lse = triton_forward(*inputs, options)
    return [x.cpu() for x in (out, *triton_backward(grad, *inputs, out, lse, options))]


_check = functools.partial(against_reference, run=_run)


@pytest.mark.parametrize(("size", "blocks", "dims", "flags", "dtype"), _sample(), ids=str)
def test_matches_reference(size, blocks, dims, flags, dtype):
    batch, heads = (1, 1) if size == (19, 38) else (2, 2) if size == (3, 5) else (1, 2)
    _check(*_inputs(size, blocks, dims, dtype, batch=batch, heads=heads), _options(blocks, dims, flags))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("dims", "dtype", "packed"),
    [
        ((16, 16), torch.bfloat16, False),
        ((16, 16), torch.float32, True),
        ((32, 32), torch.float16, True),
        ((16, 40), torch.bfloat16, True),
        ((8, 8), torch.float16, False),
    ],
    ids=str,
)
def test_tiles_of_64_queries(dims, dtype, packed):
    """The backward is cut in other ways there: four steps over keys, or two products as their transposes."""
    options = _options((8, 3, 1), dims, (True, False, True))
    meta = plan(dtype, *dims, (14, 9), options, True, "interpreted").meta
    assert meta["M"] == 64 if dtype != torch.float32 else meta["M"] >= 32
    inputs, grad = _inputs((14, 9), (8, 3, 1), dims, dtype, batch=1, heads=2)

    def run(inputs, grad, options):
        if not packed:
            return _run(inputs, grad, options)
        q, k, v, *tables = (x.to(DEVICE) for x in inputs)
        k, v = torch.cat([k, v], -1).split(dims, -1)
        out, saved = triton_forward(q, k, v, *tables, options)
        found = triton.triton_backward_packed(grad.to(DEVICE), q, k, v, *tables, out, saved, options)
        assert found[1].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
        return [x.cpu() for x in (out, *found)]

    against_reference(inputs, grad, options, run=run)


@pytest.mark.integration
@pytest.mark.parametrize("products", ["warp", "tensor memory"])
@pytest.mark.parametrize(
    ("blocks", "dims", "dtype"),
    [
        ((8, 3, 1), (16, 16), torch.bfloat16),
        ((8, 3, 1), (32, 32), torch.float16),
        ((8, 3, 2), (16, 16), torch.bfloat16),
        ((8, 4, 1), (16, 48), torch.bfloat16),  # eight steps over keys in the backward
        ((14, 2, 1), (16, 40), torch.bfloat16),
        ((8, 3, 1), (16, 16), torch.float32),
        ((10, 3, 1), (32, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_tiles_of_other_chips(products, blocks, dims, dtype, monkeypatch):
    monkeypatch.setattr(triton, "_products", lambda device: products)
    monkeypatch.setattr(triton, "_CALLS", {})
    options = _options(blocks, dims, (True, False, True))
    inputs, grad = _inputs((20, 14), blocks, dims, dtype, batch=1, heads=2)
    _check(inputs, grad, options)
    _, launch, *_ = triton._call(*(x.to(DEVICE) for x in inputs), options, True)
    two = products == "tensor memory" or max(dims) > 32
    assert launch.meta["num_warps"] == (1 if launch.meta["M"] == 16 else 2 if two else 4)


@pytest.mark.parametrize(
    ("capability", "products"),
    [
        ((8, 0), "warp"),
        ((8, 9), "warp"),
        ((9, 0), "warpgroup"),
        ((10, 0), "tensor memory"),
        ((10, 3), "tensor memory"),
        ((11, 0), "tensor memory"),
        ((12, 0), "warp"),
    ],
)
def test_the_tiles_of_a_chip(capability, products, monkeypatch):
    """By what computes its products: two warps a program where those of four go through tensor memory."""
    device = torch.device("cuda", capability[0] * 10 + capability[1])  # cached by device
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton._products(device) == products
    options = Options(8, 3, 1, 0.25, False, True, 1)
    for backward in (False, True):
        tiles = plan(torch.bfloat16, 16, 16, (64, 64), options, backward, products=products)
        assert (tiles.meta["M"], tiles.num_warps) == ((32, 2) if products == "tensor memory" else (64, 4))
        exact = plan(torch.float32, 16, 16, (64, 64), options, backward, products=products)
        assert exact == plan(torch.float32, 16, 16, (64, 64), options, backward)  # no tensor cores for these
    wide = plan(torch.bfloat16, 64, 64, (64, 64), options, True, products=products)
    assert wide.num_warps == (4 if products == "warpgroup" else 2)
    wider = plan(torch.bfloat16, 64, 64, (64, 64), options._replace(block_size=32), True, products=products)
    assert wider.num_warps == (2 if products == "tensor memory" else 4)


@pytest.mark.parametrize(
    ("heads", "dims", "packed", "tile"),
    [
        (4, (16, 64), True, (16, 128, 3)),  # 320 channels a pixel
        (8, (16, 40), False, (16, 128, 4)),  # 128 and 320
        (4, (16, 16), True, (16, 128, 1)),
        (4, (16, 16), False, (32, 64, 2)),
        (1, (4, 12), False, (128, 16, 2)),
    ],
)
def test_programs_that_add_up_windows(heads, dims, packed, tile):
    """Pixels, channels, and how many programs have the channels of a pixel."""
    assert triton.fold_tile(heads, *dims, packed) == tile


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [*BLOCKS, (32, 3, 1), (32, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [(40, 23), (75, 75)], ids=str)
def test_matches_reference_on_large_maps(size, blocks, dtype):
    _check(*_inputs(size, blocks, (16, 16), dtype, batch=1, heads=1), _options(blocks, (16, 16), (True, False, True)))


def test_a_check_that_can_fail():
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    inputs, grad = _inputs((7, 7), (8, 3, 1), (16, 16))
    wrong = options._replace(scale=options.scale * 1.01)
    exact, found = _reference(inputs, grad, options, torch.float64), _run(inputs, grad, wrong)
    assert all((x - y).abs().max() > 1e-4 for x, y in zip(found, exact, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_of_one_image_and_few_programs(dtype, monkeypatch):
    """However the work is cut into launches and programs, the results are the reference's, and the maps' bits equal."""
    options = _options((4, 1, 1), (16, 16), (False, False, True))
    inputs, grad = _inputs((5, 4), (4, 1, 1), (16, 16), dtype, batch=3)
    whole = _run(inputs, grad, options)
    monkeypatch.setattr(triton, "_CALLS", {})
    monkeypatch.setattr(triton, "WINDOW_BYTES", 1)
    monkeypatch.setattr(triton, "_programs_per_multiprocessor", lambda num_warps: 1)
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 5)
    parts = _run(inputs, grad, options)
    for x, y in zip(whole[:4], parts[:4], strict=True):
        assert torch.equal(x, y)
    _check(inputs, grad, options)


@pytest.mark.integration
def test_equal_inputs_give_equal_bits():
    options = _options((8, 3, 1), (16, 16), (True, False, True))
    inputs, grad = _inputs((11, 9), (8, 3, 1), (16, 16), torch.bfloat16)
    first, second = _run(inputs, grad, options), _run(inputs, grad, options)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.integration
def test_strided_inputs():
    """q, k and v as slices of one tensor, channels not even dense: nothing is assumed about strides."""
    options = _options((4, 1, 1), (16, 16), (True, False, True))
    inputs, grad = _inputs((6, 5), (4, 1, 1), (16, 16))
    expected = _run(inputs, grad, options)
    transposed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs[:2]]
    scattered = inputs[2].transpose(3, 4).contiguous().transpose(3, 4)
    assert scattered.stride(-1) != 1
    found = _run([*transposed, scattered, *inputs[3:]], grad.transpose(1, 3).contiguous().transpose(1, 3), options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_through_the_op():
    """Choice by name, autograd through the custom op, second derivatives refused."""
    inputs, grad = _inputs((5, 6), (4, 1, 2), (16, 16))
    results = []
    for backend in ("reference", "triton"):
        x = [t.to(DEVICE).requires_grad_() for t in inputs]
        out = halo_attention(*x, block_size=4, halo_size=1, query_stride=2, backend=backend)
        results.append((out, *torch.autograd.grad(out, x, grad.to(DEVICE))))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_huge_logits_stay_finite(dtype):
    inputs, grad = _inputs((9, 9), (8, 3, 1), (16, 16), dtype, batch=1, heads=1)
    q, k = (x.float() / x.float().abs().amax() for x in inputs[:2])
    inputs[:2] = (q * 100).to(dtype), (k * 25).to(dtype)  # up to 100 * 25 * 16 / 4 = 1e4
    assert all(torch.isfinite(x).all() for x in _run(inputs, grad, _options((8, 3, 1), (16, 16), (True, False, True))))


def test_what_it_refuses(monkeypatch):
    assert "float64" in can_run_triton(torch.zeros(1, 16, dtype=torch.float64))
    assert "256 channels" in can_run_triton(torch.zeros(1, 257))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPU" in can_run_triton(torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*GPU"):
        backend_for(torch.zeros(1, 16), "triton")
    assert backend_for(torch.zeros(1, 16)) != "triton"
    with pytest.raises(ValueError, match="windows of at most 256"):
        inputs, _ = _inputs((3, 3), (8, 125, 1), (4, 4))
        triton_forward(*inputs, Options(8, 125, 1, 0.5, False, True, 1))


def test_values_too_wide_choose_another_backend(monkeypatch):
    monkeypatch.setitem(BACKENDS, "native", (BACKENDS["native"][0], lambda q: "no"))
    q = torch.zeros(1, 1, 1, 1, 16, device=DEVICE)
    assert backend_for(q) == "triton"
    assert backend_for(q, dim_v=512) == "blocked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 30), (64, 64)], ids=str)
def test_gathers_take_a_number_a_thread(size, dtype):
    """Triton 3.6 does not compile the backward's gather of gradients of rows, (M, STEPS * R), from fewer."""
    for block, halo, stride in BLOCKS:
        for dim in (16, 32, 64, 128):
            tiles = plan(dtype, dim, dim, size, Options(block, halo, stride, 0.25, False, True, stride), True)
            assert tiles.meta["M"] * tiles.meta["STEPS"] * tiles.meta["R"] >= 32 * tiles.num_warps >= 32


def test_small_maps_get_small_tiles():
    options = Options(8, 3, 1, 0.25, False, True, 1)
    small = plan(torch.bfloat16, 16, 16, (4, 4), options, True).meta
    assert (small["M"], small["R"] * small["C"], small["STEPS"]) == (16, 32, 1)
    eight = plan(torch.bfloat16, 16, 16, (8, 8), options, False)
    assert (eight.meta["M"], eight.meta["R"] * eight.meta["C"], eight.meta["STEPS"]) == (64, 64, 1)
    assert plan(torch.bfloat16, 16, 16, (4, 3), options, False) == eight  # in inference one kernel for both
    assert plan(torch.bfloat16, 16, 16, (64, 64), options, False).meta["M"] == 64
    parts = plan(torch.bfloat16, 16, 16, (64, 64), options._replace(block_size=32), True)
    assert parts.meta["M"] * parts.meta["PARTS"] == 32 * 32


@pytest.mark.parametrize(("block", "halo"), [(8, 3), (10, 3), (12, 2), (14, 2), (7, 3), (32, 3)])
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_hold_few_queries_that_are_none(block, halo, backward):
    meta = plan(torch.bfloat16, 16, 16, (128, 128), Options(block, halo, 1, 0.25, False, True, 1), backward).meta
    assert block**2 / (meta["M"] * meta["PARTS"]) >= 0.75


class _Recorder:
    """In place of the kernels: which of them would be compiled, by what Triton specialises on."""

    def __init__(self):
        self.compiled = set()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        class Launcher:
            def __getitem__(_, grid):
                def launch(*args, **meta):
                    types = tuple(x.dtype if torch.is_tensor(x) else type(x) for x in args)
                    self.compiled.add((name, types, tuple(sorted(meta.items()))))

                return launch

        return Launcher()


def _layers_of_h1(size, training):
    """The attention of halonet_h1's layers, each kind once, on images of `size` pixels."""
    side = -(-size // 4)
    for channels, heads, first in [(64, 4, 1), (128, 8, 2), (256, 8, 2), (512, 8, 2)]:
        for stride in dict.fromkeys((first, 1)):
            dim, grid = channels // heads, -(-side // stride)
            if stride == 1:
                qkv = torch.empty(1, side, side, 3 * channels, dtype=torch.bfloat16)
                q, k, v = split_queries_keys_and_values(qkv, heads, dim)
            else:
                q = torch.empty(1, grid, grid, heads, dim, dtype=torch.bfloat16)
                kv = torch.empty(1, side, side, 2 * channels, dtype=torch.bfloat16)
                k, v = split_keys_and_values(kv, heads, dim)
            inputs = q, k, v, *(torch.empty(27, dim) for _ in range(2))
            options = Options(8, 3, stride, dim**-0.5, False, True, stride)
            out, saved = triton_forward(*inputs, options)
            if training:
                triton_backward_packed(out, *inputs, out, saved, options)
            side = grid


@pytest.mark.parametrize(
    ("sizes", "training", "most"),
    [([256], True, 18), (range(128, 513, 32), True, 25), (range(128, 513, 6), False, 9)],
    ids=["one size", "training", "inference"],
)
def test_few_sizes_are_compiled_for(sizes, training, most, monkeypatch):
    recorder = _Recorder()
    monkeypatch.setattr(triton, "_kernels", lambda: recorder)
    for size in sizes:
        _layers_of_h1(size, training)
    assert 0 < len(recorder.compiled) <= most
    names = triton_tiles.SIZES
    for kernel in ("forward_kernel", "backward_kernel", "fold_kernel", "table_kernel"):
        parameters = inspect.signature(getattr(triton_kernels, kernel).fn).parameters
        plain = [x for x, y in parameters.items() if y.annotation is inspect.Parameter.empty]
        pointers = {"q", "k", "v", "rel_h", "rel_w", "out", "kept", "saved"}
        pointers |= {"grad", "dq", "dk", "dv", "partial", "scale"}
        assert {x for x in plain if "window_" not in x and "d_rel_" not in x} - pointers <= set(names)


@pytest.mark.integration
def test_tuning_walks_its_variants(monkeypatch, capsys):
    from tests.support import tune_kernels

    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--dry-run"])
    before = triton._prepared, triton_plan.limits_of, triton.WINDOW_BYTES
    tune_kernels.main()
    assert (triton._prepared, triton_plan.limits_of, triton.WINDOW_BYTES) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(float(line.split()[-1]) < 0.02 for line in lines)


@pytest.mark.integration
def test_compiled_for_chips_that_are_not_here():
    """Forward, backward and fold of four shapes for sm_80, sm_90, sm_100: shared memory fits, nothing spills much."""
    script = Path(__file__).parents[1] / "support" / "kernel_table.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), "--quick", "--json"], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["chip"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} == {"forward", "backward", "fold"}
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert 0 < row["registers"] <= 255, row
        assert row["stack"] <= 704, row  # bytes a thread, where spilled registers go
        assert row["stack"] == 0 or (row["shape"], row["chip"]) != ("H1 stage 1", 90), row
        assert row["loop_loads16"] == 0, row  # 40 channels a head are loaded eight at a time
    counted = {(x["shape"], x["kernel"], x["chip"]): x for x in rows}
    for case, (*most, programs) in COUNTED.items():
        row = counted[case]
        assert all(row[x] <= y for x, y in zip(("instructions", "barriers", "warps"), most, strict=True)), row
        assert row["programs"] >= programs, row

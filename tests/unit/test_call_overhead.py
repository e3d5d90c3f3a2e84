"""What is worked out once for each kind of call and not at every call; and that it is never taken for another kind."""

import json
import os
import subprocess
import sys

import pytest
import torch

from timm_halonet.ops import functional, halo_attention, triton
from timm_halonet.ops.options import Options
from timm_halonet.ops.triton import triton_backward, triton_forward


def _inputs(height=6, dtype=torch.float32, dim=4):
    q = torch.randn(1, height, 5, 2, dim, dtype=dtype)
    return [q, *torch.randn(1, height, 5, 2, 2 * dim, dtype=dtype).split(dim, -1), *torch.randn(2, 11, dim)]


def _attend(inputs, **options):
    return halo_attention(*inputs, **{"block_size": 4, "halo_size": 1, "backend": "reference", **options})


@pytest.fixture
def checks(monkeypatch):
    """The calls of the checks."""
    made, check = [], functional.check_shapes

    def counted(*args):
        made.append(args)
        return check(*args)

    monkeypatch.setattr(functional, "check_shapes", counted)
    monkeypatch.setattr(functional, "_PASSED", set())
    return made


def test_equal_calls_are_checked_once(checks):
    for _ in range(3):
        _attend(_inputs())
    assert len(checks) == 1
    _attend(_inputs(7))
    _attend(_inputs(dtype=torch.float64)[:3] + [x.double() for x in _inputs()[3:]])
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x[:, 1:], "q must be"),
        (1, lambda x: x[..., 1:], "k and v must agree"),
        (1, lambda x: x.double(), "one dtype"),
        (2, lambda x: x.to("meta"), "one device"),
        (2, lambda x: x.int(), "v must be float64"),
        (2, lambda x: x.to_sparse(), "dense tensor"),
        (3, lambda x: x[1:], "rel_height must be"),
        (4, lambda x: x.tolist(), "rel_width must be a tensor"),
        (4, lambda x: x.numpy(), "rel_width must be a tensor"),
    ],
)
def test_wrong_calls_are_refused_each_time(position, change, message, checks):
    _attend(_inputs())
    wrong = _inputs()
    wrong[position] = change(wrong[position])
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            _attend(wrong)
    with pytest.raises(ValueError, match="rel_height must be"):
        _attend(_inputs(), halo_size=2)
    assert len(checks) == 4


def test_what_is_remembered_does_not_grow_without_end(checks, monkeypatch):
    monkeypatch.setattr(functional, "_MOST_PASSED", 3)
    for height in range(1, 9):
        _attend(_inputs(height))
    assert len(functional._PASSED) <= 3


class _Recorder:
    """In place of the kernels: what they are launched with."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        recorder = self

        class Launcher:
            def __getitem__(self, grid):
                def launch(*args, **meta):
                    numbers = tuple(x for x in args if not torch.is_tensor(x))
                    recorder.launches.append((name, grid, numbers, meta))

                return launch

        return Launcher()


def test_triton_works_out_a_launch_once(monkeypatch):
    """Equal calls are launched alike without being prepared again; calls that differ in anything are not equal."""
    made, prepare = [], triton._prepared
    monkeypatch.setattr(triton, "_prepared", lambda *args: made.append(1) or prepare(*args))
    monkeypatch.setattr(triton, "_CALLS", {})
    recorder = _Recorder()
    monkeypatch.setattr(triton, "_kernels", lambda: recorder)
    options = Options(4, 1, 1, 0.5, False, True, 1)

    def call(inputs, options=options):
        recorder.launches = []
        out, saved = triton_forward(*inputs, options)
        triton_backward(out, *inputs, out, saved, options)
        return recorder.launches

    first = call(_inputs())
    assert [name for name, *_ in first] == ["forward_kernel", "backward_kernel", "fold_kernel", "table_kernel"]
    assert call(_inputs()) == first and len(made) == 2
    q, k, v, *tables = _inputs()
    others = [
        call(_inputs(7)),
        call(_inputs(dim=8)),
        call([q, k.contiguous(), v.contiguous(), *tables]),  # other strides
        call([q.half(), k.half(), v.half(), *tables]),
        call(_inputs(), options._replace(mask_border=False)),
        call(_inputs(), options._replace(scale=0.25)),
    ]
    assert len(made) == 2 + 2 * len(others)
    assert all(other != first for other in others)
    scattered = q.transpose(3, 4).contiguous().transpose(3, 4)  # copied at every call, and launched as the first
    for _ in range(2):
        assert call([scattered, k, v, *tables]) == first


@pytest.mark.integration
def test_a_known_launch_gives_the_driver_what_tritons_own_does(tmp_path):
    """All four kernels, arguments in Triton's order; an input that is not aligned to 16 bytes is another kind."""
    script = tmp_path / "script.py"
    script.write_text(_LAUNCHES)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert found.returncode == 0, found.stderr
    first, second, by_triton, elsewhere, again, ways = json.loads(found.stdout)
    assert [name for name, *_ in first] == ["forward_kernel", "backward_kernel", "fold_kernel", "table_kernel"]
    assert first == second == by_triton
    assert len(first[0]) > 40  # compile-time arguments too
    assert elsewhere == again == first
    assert ways == ["triton"] * 4 + ["known"] * 4 + ["triton"] * 2 + ["known"] * 6


_LAUNCHES = """
import json, os
import torch
from tests.support.call_overhead import by_triton, launched_to
from timm_halonet.ops import triton
from timm_halonet.ops.options import make_options

made, ways = [], []
kernels = launched_to(lambda name, *args: made.append([name, *args]))
os.environ["TRITON_INTERPRET"] = "1"  # the backend takes tensors of the CPU
triton._kernels = lambda: kernels
options = make_options(8, 3, 1, 0.25, False, True, "true")
numbers = torch.randn(1 * 16 * 16 * 4 * 16 + 1)
q = numbers[:-1].view(1, 16, 16, 4, 16)
k, v = torch.randn(1, 16, 16, 4, 32).split(16, -1)
tables = [torch.randn(27, 16) for _ in range(2)]
for kernel in (getattr(kernels, name) for name in kernels.__all__):
    def watched(*args, run=kernel.run, **meta):
        ways.append("triton")
        return run(*args, **meta)
    kernel.run = watched

def call(q):
    made.clear()
    out, saved = triton.triton_forward(q, k, v, *tables, options)
    triton.triton_backward(out, q, k, v, *tables, out, saved, options)
    return [[name, *(x for x in args if isinstance(x, (int, float, str, bool)))] for name, *args in made]

def counted(q):
    before = len(ways)
    found = call(q)
    ways.extend(["known"] * (len(found) - (len(ways) - before)))
    return found

first, second = counted(q), counted(q)
launch, triton.launch_kernel = triton.launch_kernel, by_triton
before = len(ways)
own = call(q)
del ways[before:]
triton.launch_kernel = launch
other = numbers[1:].view(q.shape)  # its first byte is four bytes further
elsewhere, again = counted(other), counted(other)
print(json.dumps([first, second, own, elsewhere, again, ways]))
"""

"""What is worked out once for each kind of call and not at every call; and that it is never taken for another kind."""

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

"""Whether the Triton kernels compute on this GPU what the reference does, and what each of them takes."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from ..ops import halo_attention, triton
from .case import Case, Config, Failed, Step, Subject
from .cases import check_backend, create, model_step
from .timing import cuda_graph, difference

PROFILED = 5  # steps
LONGEST = 16  # kernels that are named


class Shape(NamedTuple):
    """One attention that models really have."""

    size: tuple[int, int]  # of the key map
    heads: int
    dim: int
    dim_v: int
    block_size: int = 8
    halo_size: int = 3
    query_stride: int = 1
    mask_border: bool = True
    dtype: torch.dtype = torch.bfloat16


# the most used first: where the time ends early, they were checked
SHAPES = {
    "halonet_h1 stage 1": Shape((64, 64), 4, 16, 16),
    "halonet_h1 stage 3": Shape((16, 16), 8, 32, 32),
    "halonet_h1 stage 2, first": Shape((64, 64), 8, 16, 16, query_stride=2),
    "halonet_h1 stage 4": Shape((8, 8), 8, 64, 64),
    "odd sizes": Shape((37, 21), 2, 16, 16),
    "float16": Shape((37, 21), 2, 16, 16, dtype=torch.float16),
    "float32": Shape((37, 21), 2, 16, 16, dtype=torch.float32),
    "timm halonet_h1": Shape((64, 64), 8, 8, 8, mask_border=False),
    "timm halonet26t": Shape((32, 32), 8, 16, 64, halo_size=2, query_stride=2, mask_border=False),
    "halonet_h5": Shape((28, 45), 4, 16, 40, 14, 2),
    "halonet_h4": Shape((24, 37), 4, 16, 16, 12, 2),
    "halonet_h7 stage 3": Shape((38, 38), 8, 32, 128, 10),
    "haloregnetz_b": Shape((28, 28), 6, 24, 24, 7, mask_border=False),
    "block 32": Shape((64, 64), 2, 64, 64, 32),
}
NAMES = ("output", "dq", "dk", "dv", "height table's gradient", "width table's gradient")


def check_cases(config: Config) -> list[Case]:
    """A case for each shape, and one for a model in a CUDA graph; their quantity is "errors"."""

    def check(shape: Shape) -> Callable[[int], Step]:
        return lambda batch: lambda: (torch.tensor(worst_error(shape, batch, config.device)),)

    def in_a_graph(batch: int) -> Step:
        step = model_step(lambda: create("halonet_h1"), config, torch.float32, False, 64, False, batch)
        wanted = [x.clone() for x in step()]
        replay = cuda_graph(step)
        return lambda: (torch.tensor(difference(replay(), wanted) / 1e-5),)

    cases = []
    for name, shape in SHAPES.items():
        if config.tiny:
            shape = shape._replace(size=(min(9, shape.size[0]), min(7, shape.size[1])), heads=1)
        cases.append(_check_case(name, check(shape), 1 if config.tiny else 2))
    if config.device == "cuda":
        cases.append(_check_case("halonet_h1 in a CUDA graph", in_a_graph, 2))
    return cases


def _check_case(name: str, build: Callable[[int], Step], batch: int) -> Case:
    subjects = (Subject("triton", build),)
    return Case(f"kernels/{name}", subjects, "triton", 0, batch=batch, quantity="errors", setup=8)


def worst_error(shape: Shape, batch: int, device: str) -> float:
    """The Triton kernels' largest error as a part of what is allowed: twice that of the reference in the same dtype,
    both against the reference in float64, and one rounding.

    Raises:
        Skip: the kernels cannot run here.
        Failed: the error is more than what is allowed, or equal inputs do not give equal bits.
    """
    check_backend("triton", device, shape.dtype)
    options: dict[str, Any] = shape._asdict()
    (height, width), heads, dim, dim_v, dtype = (options.pop(x) for x in ("size", "heads", "dim", "dim_v", "dtype"))
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    stride = shape.query_stride
    q = randn(batch, -(-height // stride), -(-width // stride), heads, dim).to(device, dtype)
    k, v = randn(batch, height, width, heads, dim + dim_v).to(device, dtype).split([dim, dim_v], -1)
    rows = 2 * (shape.block_size + 2 * shape.halo_size) - 1
    tables = ((randn(rows, dim) * dim**-0.5).to(device, dtype) for _ in range(2))
    inputs, grad = (q, k, v, *tables), randn(*q.shape[:4], dim_v).to(device, dtype)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = halo_attention(*leaves, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact, plain = run("reference", torch.float64), run("reference", dtype)
    before = len(_given_up())
    found = run("triton", dtype)
    if len(_given_up()) > before:
        raise Failed(f"blocked computed in place of the kernels: {_given_up()[-1]}")
    worst = 0.0
    for name, x, y, z in zip(NAMES, found, plain, exact, strict=True):
        tiny = (5e-6 if dtype == torch.float32 else 2**-8) * max(1.0, z.abs().max().item())
        part = (x - z).abs().max().item() / (2 * (y - z).abs().max().item() + tiny)
        if not part <= 1:  # nan as well
            raise Failed(f"{name}: the error is {part:.2g} times what is allowed")
        worst = max(worst, part)
    for name, x, y in zip(NAMES, found, run("triton", dtype), strict=True):
        if not torch.equal(x, y):
            raise Failed(f"{name}: equal inputs do not give equal bits")
    return worst


def _given_up() -> list[str]:
    """Why the kernels did not compute what they were asked for, so far in this process."""
    return [reason for smaller, reason in triton.REFUSED.values() if smaller > triton.SMALLEST]


def kernel_seconds(step: Step, device: str) -> dict[str, float]:
    """Name -> seconds a step of each kernel that it launches; on the CPU of each operator. The longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
        if gpu:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for row in profiler.key_averages():
        if gpu and row.device_type != DeviceType.CUDA:
            continue
        microseconds = row.self_device_time_total if gpu else row.self_cpu_time_total
        name = row.key.split("<")[0].split("(")[0].removeprefix("void ")[-60:]
        found[name] = found.get(name, 0.0) + microseconds / 1e6 / PROFILED
    return {name: x for name, x in sorted(found.items(), key=lambda item: -item[1]) if x > 0}


def step_seconds(step: Step, device: str) -> dict[str, float]:
    """What a step takes by the clock: until its kernels have ended, and until all of them are asked for.

    Where the second is not much less than the first, the GPU waits for Python. Medians; the GPU is idle before each.
    """
    step()
    whole, asked = [], []
    for _ in range(PROFILED):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        asked.append(time.perf_counter() - start)
        if device == "cuda":
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return {"by the clock": median(whole), "until asked for": median(asked)}

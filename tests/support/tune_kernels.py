"""Times the Triton kernels on this GPU cut and compiled in other ways: what should `triton_plan.py` choose?

    python tests/support/tune_kernels.py [--minutes 3] [--batch 128] [--json FILE] [--dry-run]

For each shape and direction: the launch as it is, then with other limits of registers a thread (Triton's `maxnreg`),
numbers of warps, stages, queries and keys of a tile, and the backward with windows of fewer images a launch, which fit
into the L2 cache. A line is printed for each, with the time (median, CUDA events), what it is of the present one's, and
the largest difference from its result. What does not fit into the minutes is named.
The backward's time has its sums over windows and tables in it. --dry-run walks a few on the CPU, in Triton's
interpreter, with a small map and no times.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from timm_halonet.ops import triton as launcher
from timm_halonet.ops import triton_plan
from timm_halonet.ops.options import Options
from timm_halonet.ops.triton import triton_backward, triton_forward

if __package__:
    from .kernel_table import SHAPES, Shape, options_of
else:
    from kernel_table import SHAPES, Shape, options_of

FIRST = ("H1 stage 1", "H1 stage 3", "H1 stage 2, first", "H3 stage 1", "H5 stage 1", "detection, block 32")
DTYPE = torch.bfloat16


class Variant(NamedTuple):
    """0 is as it is. `programs`: the most of the backward on a multiprocessor, which share its tiles. `windows`: the
    most MiB of a launch."""

    registers: int = 0
    warps: int = 0
    stages: int = 0
    queries: int = 0
    keys: int = 0
    programs: int = 0
    windows: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{x} {name}" for name, x in self._asdict().items() if x) or "as it is"


VARIANTS = {
    "forward": [
        Variant(),
        *(Variant(keys=x) for x in (64, 128)),  # one of them is as it is
        *(Variant(registers=x) for x in (128, 168, 96)),
        Variant(queries=32, keys=64, warps=2),  # as on chips with tensor memory
        Variant(queries=16, keys=128, warps=1),  # of blocks of 100 or 144 queries, 89 or 100 % are used
        Variant(queries=32),
        Variant(queries=32, registers=128),
        Variant(keys=64, registers=128),
        Variant(warps=8),
        Variant(stages=1),
        Variant(stages=3),
    ],
    "backward": [
        Variant(),
        Variant(registers=168, programs=3),
        Variant(windows=24),
        Variant(windows=48),
        Variant(queries=32, warps=2, programs=4),
        Variant(registers=144, programs=3),
        Variant(registers=128, programs=4),
        Variant(queries=32, programs=4),
        Variant(queries=32, registers=168, programs=3),
        Variant(queries=32, registers=128, programs=4),
        Variant(keys=32, registers=168, programs=3),
        Variant(warps=8, programs=2),
        Variant(stages=1),
        Variant(stages=1, registers=128, programs=4),
    ],
}


@contextlib.contextmanager
def changed(variant: Variant, backward: bool) -> Iterator[None]:
    """Launches are made that way."""
    limits, prepared, programs = triton_plan.limits_of, launcher._prepared, launcher._programs_per_multiprocessor
    windows = launcher.WINDOW_BYTES
    own = {name: x for name in ("queries", "keys") if (x := getattr(variant, name))}
    options = dict(num_warps=variant.warps, num_stages=variant.stages, maxnreg=variant.registers)

    def prepare(*args):
        launch = prepared(*args)
        meta = dict(launch.meta, **{name: x for name, x in options.items() if x})
        return launch._replace(meta=meta, plan=launch.plan._replace(num_warps=meta["num_warps"]))

    def forget():
        triton_plan.plan.cache_clear()
        triton_plan.prepare.cache_clear()
        launcher._CALLS.clear()

    try:
        forget()
        triton_plan.limits_of = lambda *args: limits(*args)._replace(**(own if args[3] == backward else {}))
        launcher._prepared = prepare
        launcher._programs_per_multiprocessor = lambda warps: variant.programs or programs(warps)
        launcher.WINDOW_BYTES = variant.windows << 20 or windows
        yield
    finally:
        triton_plan.limits_of = limits
        launcher._prepared, launcher._programs_per_multiprocessor = prepared, programs
        launcher.WINDOW_BYTES = windows
        forget()


def step_of(shape: Shape, backward: bool, batch: int, device: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One forward, or one backward, on random maps."""
    options: Options = options_of(shape)
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, DTYPE)

    grid = -(-shape.side // shape.stride)
    q = randn(batch, grid, grid, shape.heads, shape.dim)
    keys_values = randn(batch, shape.side, shape.side, shape.heads, shape.dim + shape.dim_v)
    k, v = keys_values.split([shape.dim, shape.dim_v], -1)
    tables = [randn(2 * (shape.block + 2 * shape.halo) - 1, shape.dim) * shape.dim**-0.5 for _ in range(2)]
    inputs = (q, k, v, *tables)
    if not backward:
        return lambda: triton_forward(*inputs, options)[:1]
    out, saved = triton_forward(*inputs, options)
    grad = randn(*out.shape)
    return lambda: triton_backward(grad, *inputs, out, saved, options)


def difference(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    """The largest, as a part of each tensor's largest value."""
    return max(
        ((x.float() - y.float()).abs().max() / y.float().abs().max()).item() for x, y in zip(found, wanted, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--shapes", nargs="+", default=FIRST, choices=[x.name for x in SHAPES], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each, as they are printed")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry-run walks a few variants without one")
    end = time.monotonic() + 60 * args.minutes
    shapes = {x.name: x for x in SHAPES}
    left_out = []
    for name in args.shapes[: 1 if args.dry_run else None]:
        for direction, variants in VARIANTS.items():
            backward, shape = direction == "backward", shapes[name]
            if args.dry_run:
                shape, variants = shape._replace(side=9, heads=1), [Variant(), Variant(queries=32), Variant(keys=32)]
            before: tuple | None = None
            for variant in variants:
                if time.monotonic() > end:
                    left_out.append(f"{name}, {direction}: {variant}")
                    continue
                row: dict = dict(shape=name, kernel=direction, variant=variant._asdict())
                step = step_of(shape, backward, 1 if args.dry_run else args.batch, "cpu" if args.dry_run else "cuda")
                try:
                    with changed(variant, backward):
                        found = step()
                        seconds = None if args.dry_run else _median(step)
                except Exception as error:  # what does not compile, or does not fit
                    row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
                    text = row["failed"]
                else:
                    before = before or (found, seconds)
                    row |= dict(seconds=seconds, difference=difference(found, before[0]))
                    text = f"difference {row['difference']:.1e}"
                    if seconds is not None:
                        text = f"{seconds * 1e6:.0f} us, {seconds / before[1]:.2f} of the present, {text}"
                print(f"{name}, {direction}, {variant}: {text}", flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    if left_out:
        print(f"not measured, the time was over: {'; '.join(left_out)}")


def _median(step: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(step, warmup=20, rep=100, return_mode="median") / 1e3


if __name__ == "__main__":
    main()

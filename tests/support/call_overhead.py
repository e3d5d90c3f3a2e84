"""What Python takes of a call of the Triton backend: everything but the launches, which are not made.

    python tests/support/call_overhead.py [--calls 300] [--profile]

Prints microseconds of CPU time of this thread, the least of many calls, so that other programs hardly count; for
halonet_h1's attention of stage 1, as its layer calls it, on the CPU. On a GPU a launch itself comes on top.
"""

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable

import torch


class NoKernels:
    """In place of the kernels: launches that do nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **meta):
        return None


def least(run: Callable[[], object], calls: int) -> float:
    """The least microseconds of CPU time of one call."""
    best = float("inf")
    for _ in range(calls):
        start = time.thread_time_ns()
        run()
        best = min(best, time.thread_time_ns() - start)
    return best / 1e3


def calls() -> dict[str, Callable[[], object]]:
    """Name -> the call that is timed."""
    from timm_halonet.ops import scriptable_halo_attention
    from timm_halonet.ops.options import make_options

    options = make_options(8, 3, 1, 0.25, False, True, "true")
    q = torch.randn(1, 16, 16, 4, 16)
    k, v = torch.randn(1, 16, 16, 4, 32).split(16, -1)
    tables = [torch.randn(27, 16) for _ in range(2)]
    inputs = [q, k, v, *tables]
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward():
        return scriptable_halo_attention(*inputs, options, "triton")

    def without():
        with torch.no_grad():
            return forward()

    def with_autograd():
        return scriptable_halo_attention(*leaves, options, "triton")

    graph, grad = with_autograd(), torch.randn(1, 16, 16, 4, 16)

    def backward():
        return torch.autograd.grad(graph, leaves, grad, retain_graph=True)

    return {"without autograd": without, "with autograd": with_autograd, "backward": backward}


def figures(number: int = 300) -> dict[str, float]:
    """Name -> microseconds, with the launches left out."""
    from timm_halonet.ops import triton

    before, triton._kernels = triton._kernels, NoKernels
    try:
        torch.autograd.set_multithreading_enabled(False)  # the backward in this thread
        return {name: least(run, number) for name, run in calls().items()}
    finally:
        torch.autograd.set_multithreading_enabled(True)
        triton._kernels = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="the functions that take the most, by Python's profiler")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # the backend takes tensors of the CPU
    torch.set_num_threads(1)
    for name, microseconds in figures(args.calls).items():
        print(f"{name}: {microseconds:.0f} us")
    if args.profile:
        from timm_halonet.ops import triton

        triton._kernels = NoKernels
        for name, run in calls().items():
            with cProfile.Profile() as profiler:
                for _ in range(args.calls):
                    run()
            print(name)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()

"""What Python takes of a call of the Triton backend: everything but the driver's launches, which are not made.

    python tests/support/call_overhead.py [--calls 300] [--profile]

Prints microseconds of CPU time of this thread, the least of many calls, so that other programs hardly count; for
halonet_h1's attention of stage 1, as its layer calls it, with tensors on the CPU.
"""

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch


class NoKernels:
    """In place of the kernels: launches that do nothing, and do not even go through Triton's launcher."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **meta):
        return None


def launched_to(run: Callable[..., None]):
    """The kernels, with Triton's launcher up to the call of the driver, which nobody has here: `run` in place of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    from timm_halonet.ops import triton_kernels

    class Compiled(CompiledKernel):
        function = packed_metadata = src = None

        def __init__(self, name: str):
            self.name = name

        def _init_handles(self):
            pass

        def get(self, key, default=None):  # in place of the cache that would have it
            return self

        def run(self, *args):
            run(self.name, *args)

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    for name in triton_kernels.__all__:
        kernel = getattr(triton_kernels, name)
        kernel.device_caches[0] = (Compiled(name), *kernel.device_caches[0][1:])
    return triton_kernels


def by_triton(kernel, grid, args, meta, known, key) -> None:
    """In place of `launch_kernel`: Triton looks at every argument, each time."""
    kernel[grid](*args, **meta)


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

    def forward():  # no leaf asks for a gradient, and `figures` turns them off
        return scriptable_halo_attention(*inputs, options, "triton")

    def with_autograd():
        return scriptable_halo_attention(*leaves, options, "triton")

    graph, grad = with_autograd(), torch.randn(1, 16, 16, 4, 16)

    def backward():
        return torch.autograd.grad(graph, leaves, grad, retain_graph=True)

    return {"without autograd": forward, "with autograd": with_autograd, "backward": backward}


def figures(kernels: object, number: int, launch_kernel: Callable[..., None] | None = None) -> dict[str, float]:
    """Name -> microseconds, with these in place of the kernels, and of the function that launches them."""
    from timm_halonet.ops import triton

    before = triton._kernels, triton.launch_kernel
    triton._kernels, triton.launch_kernel = lambda: kernels, launch_kernel or triton.launch_kernel
    try:
        torch.autograd.set_multithreading_enabled(False)  # the backward in this thread
        found = {}
        for name, run in calls().items():
            with torch.set_grad_enabled(name != "without autograd"):
                found[name] = least(run, number)
        return found
    finally:
        torch.autograd.set_multithreading_enabled(True)
        triton._kernels, triton.launch_kernel = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="the functions that take the most, by Python's profiler")
    args = parser.parse_args()
    kernels = launched_to(lambda *args: None)  # imported to be compiled; but the backend takes tensors of the CPU:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    ours, tritons = figures(kernels, args.calls), figures(kernels, args.calls, by_triton)
    for name, microseconds in ours.items():
        print(f"{name}: {microseconds:.0f} us, launched by Triton every time {tritons[name]:.0f} us")
    if args.profile:
        from timm_halonet.ops import triton

        triton._kernels = NoKernels
        for name, run in calls().items():
            with cProfile.Profile() as profiler, torch.set_grad_enabled(name != "without autograd"):
                for _ in range(args.calls):
                    run()
            print(name)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()

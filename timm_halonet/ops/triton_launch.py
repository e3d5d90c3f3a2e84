"""The launch of a Triton kernel that was launched before, without what Triton works out at every launch."""

from typing import Any

Launched = dict[tuple, tuple[Any, tuple]]  # what is the same of launches -> compiled kernel, compile-time arguments


def launch_kernel(
    kernel: Any, grid: tuple[int, int, int], args: tuple, meta: dict[str, Any], known: Launched, key: tuple
) -> None:
    """`kernel[grid](*args, **meta)`; from the second time on by the compiled kernel that Triton found then.

    Triton looks at every argument each time, since any could ask for another compilation: its dtype, or whether a
    pointer is divisible by 16. That takes longer than all else that Python does for a launch.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs.
        args: of the kernel, those at run time, which come first.
        meta: compile-time arguments, and options of the launch.
        known: of earlier launches; grows.
        key: all that another compilation depends on, of launches that share `known`.
    """
    before = known.get(key)
    if before is not None:
        compiled, constants = before
        compiled[grid](*args, *constants)
        return
    compiled = kernel[grid](*args, **meta)
    if hasattr(compiled, "packed_metadata"):  # Triton's interpreter compiles nothing
        known[key] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])


def alignment_of(*tensors: Any) -> tuple[bool, ...]:
    """Whether the first byte is at a multiple of 16, of every one of `tensors`. Triton compiles for either."""
    return tuple([x.data_ptr() % 16 == 0 for x in tensors])

"""The least time that halo attention can take on a GPU, from its shapes and the chip's peaks. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one GPU, as its vendor states them."""

    bandwidth: float  # bytes a second
    flops: float  # dense 16-bit tensor core FLOP a second
    exponentials: float  # a second


# name as torch.cuda.get_device_name() gives it; 16 exponentials an SM and clock, 132 SMs at 1.98 GHz
PEAKS = {
    "NVIDIA H200": Peaks(4.8e12, 989e12, 16 * 132 * 1.98e9),
    "NVIDIA H100 80GB HBM3": Peaks(3.35e12, 989e12, 16 * 132 * 1.98e9),
}


@dataclass(frozen=True)
class Work:
    """The work for one block and head."""

    product_flops: float  # in q.k and p.v, and backward their gradients
    relative_flops: float  # in q.r
    exponentials: float
    bytes_once: float  # if every key is read from memory once
    bytes_windows: float  # if every window is read from memory


def block_work(*, block_size: int, halo_size: int, dim: int, itemsize: int = 2, query_stride: int = 1) -> Work:
    """The forward's work for one block and head, with as many value channels as query channels."""
    queries, own, window = (block_size // query_stride) ** 2, block_size**2, (block_size + 2 * halo_size) ** 2
    # rows of a table that one block's queries use: window rows, and one more for each further query row
    rows = 2 * (block_size + 2 * halo_size + block_size - 1)
    queries_and_out = 2 * queries * dim * itemsize
    return Work(
        product_flops=2 * 2 * queries * window * dim,
        relative_flops=2 * queries * rows * dim,
        exponentials=queries * window,
        bytes_once=queries_and_out + 2 * own * dim * itemsize,
        bytes_windows=queries_and_out + 2 * window * dim * itemsize,
    )


def backward_work(forward: Work) -> Work:
    """The backward's: scores again, and four products for the gradients; reads all and `grad`, writes three more."""
    return Work(
        product_flops=2.5 * forward.product_flops,
        relative_flops=3 * forward.relative_flops,
        exponentials=forward.exponentials,
        bytes_once=2 * forward.bytes_once,
        bytes_windows=2 * forward.bytes_windows,
    )


def bound(
    device: str,
    *,
    batch: int,
    height: int,
    width: int,
    heads: int,
    dim: int,
    block_size: int,
    halo_size: int,
    training: bool,
) -> float | None:
    """Seconds for 16-bit tensors, each key read once; forward, or forward and backward. None for an unknown device."""
    peaks = PEAKS.get(device)
    if peaks is None:
        return None
    tiles = batch * heads * -(-height // block_size) * -(-width // block_size)
    forward = block_work(block_size=block_size, halo_size=halo_size, dim=dim)
    passes = [forward, backward_work(forward)] if training else [forward]
    return tiles * sum(
        max(
            (work.product_flops + work.relative_flops) / peaks.flops,
            work.exponentials / peaks.exponentials,
            work.bytes_once / peaks.bandwidth,
        )
        for work in passes
    )

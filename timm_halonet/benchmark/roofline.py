"""The least time that halo attention can take on a GPU, from its shapes and the chip's peaks. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one GPU, as its vendor states them."""

    bandwidth: float  # bytes a second
    flops: float  # dense 16-bit tensor core FLOP a second
    exponentials: float  # a second


# name as torch.cuda.get_device_name() gives it; 16 exponentials an SM and clock
PEAKS = {
    "NVIDIA B200": Peaks(8.0e12, 2250e12, 16 * 148 * 1.85e9),
    "NVIDIA H200": Peaks(4.8e12, 989e12, 16 * 132 * 1.98e9),
    "NVIDIA H100 80GB HBM3": Peaks(3.35e12, 989e12, 16 * 132 * 1.98e9),
    "NVIDIA A100-SXM4-80GB": Peaks(2.0e12, 312e12, 16 * 108 * 1.41e9),
}


@dataclass(frozen=True)
class Work:
    """What has to be done for a whole map and batch."""

    product_flops: float  # in q.k and p.v, and backward their gradients
    relative_flops: float  # in q.r
    exponentials: float
    bytes: float  # every number read or written once


def map_work(
    *,
    batch: int,
    height: int,
    width: int,
    heads: int,
    dim: int,
    block_size: int,
    halo_size: int,
    itemsize: int = 2,
    mask_border: bool = True,
) -> Work:
    """The forward's work at stride 1, with as many value channels as query channels. It counts the keys that exist.

    Args:
        mask_border: False: the ring of zeros around the map takes exponentials too, though no products.
    """
    ring = 0 if mask_border else halo_size
    count, pixels = batch * heads, height * width
    seen = _pairs(height, block_size, halo_size, ring) * _pairs(width, block_size, halo_size, ring)
    there = _pairs(height, block_size, halo_size, 0) * _pairs(width, block_size, halo_size, 0)
    # rows of a table that one block's queries use: window rows, and one more for each further query row
    rows = 2 * (2 * block_size + 2 * halo_size - 1)
    return Work(
        product_flops=count * 2 * 2 * there * dim,
        relative_flops=count * 2 * pixels * rows * dim,
        exponentials=count * seen,
        bytes=count * 4 * pixels * dim * itemsize,
    )


def _pairs(length: int, block_size: int, halo_size: int, ring: int) -> int:
    """Pairs of a query and a key that it sees, along one dimension."""
    total = 0
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        keys = min(start + block_size + halo_size, length + ring) - max(start - halo_size, -ring)
        total += (end - start) * keys
    return total


def backward_work(forward: Work) -> Work:
    """The backward's: scores again, and four products for the gradients; reads all and `grad`, writes three more."""
    return Work(
        product_flops=2.5 * forward.product_flops,
        relative_flops=3 * forward.relative_flops,
        exponentials=forward.exponentials,
        bytes=2 * forward.bytes,
    )


def seconds(work: Work, peaks: Peaks) -> float:
    """The slowest of products, exponentials and bytes."""
    return max(
        (work.product_flops + work.relative_flops) / peaks.flops,
        work.exponentials / peaks.exponentials,
        work.bytes / peaks.bandwidth,
    )


def bounds(device: str, **shape) -> tuple[float, float] | None:
    """Seconds of forward and backward for 16-bit tensors; None for an unknown device. `shape` is that of `map_work`."""
    peaks = PEAKS.get(device)
    if peaks is None:
        return None
    forward = map_work(**shape)
    return seconds(forward, peaks), seconds(backward_work(forward), peaks)


def bound(device: str, *, training: bool, **shape) -> float | None:
    """Seconds of the forward, or of forward and backward. See `bounds`."""
    found = bounds(device, **shape)
    return None if found is None else sum(found) if training else found[0]

"""What decides a halo attention beside its tensors."""

from typing import NamedTuple


class Options(NamedTuple):
    """See `timm_halonet.ops.halo_attention` for the first six; sizes in pixels."""

    block_size: int
    halo_size: int
    query_stride: int
    scale: float
    scale_rel: bool
    mask_border: bool
    rel_step: int  # distance in pixels between neighbouring queries as the relative position sees it

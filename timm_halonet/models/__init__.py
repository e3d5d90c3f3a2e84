"""Importing this package registers every model with timm."""

from . import halonet
from .halonet import HaloNet

__all__ = ["HaloNet", "halonet", "listing"]


def listing(macs: bool = False) -> list[dict[str, object]]:
    """A row for every architecture of this package.

    Args:
        macs: count multiply-adds as well, in billions, for one image of the paper's size (seconds, no memory).

    Returns:
        Dicts of model, parameters (1000 classes), image_size (the paper's, pixels), gmacs, weights (tags, or "-").
    """
    import timm

    rows: list[dict[str, object]] = []
    for name, cfg in halonet.cfgs.items():
        model = timm.create_model(name, device="meta").eval()
        row: dict[str, object] = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": cfg.image_size,
        }
        if macs:
            row["gmacs"] = round(_multiply_adds(model, cfg.image_size) / 1e9, 1)
        row["weights"] = " ".join(key.partition(".")[2] for key in timm.list_pretrained(f"{name}.*")) or "-"
        rows.append(row)
    return rows


def _multiply_adds(model, image_size: int) -> int:
    """Of one square image, by PyTorch's counter, which sees the reference backend's plain operators."""
    import os
    from unittest import mock

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with mock.patch.dict(os.environ, TIMM_HALONET_BACKEND="reference"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2

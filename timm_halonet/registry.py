"""Importing this module registers every model of this package with timm; and what there is, by name."""

from .families.eamlp import eamlp
from .families.focal import focal
from .families.lesa import lesa
from .models import halonet, hybrid, uhalonet
from .ops import use_backend


def listing(macs: bool = False) -> list[dict[str, object]]:
    """A row for every architecture of this package.

    Args:
        macs: count multiply-adds as well, in billions, for one image of the paper's size (seconds, no memory).

    Returns:
        Dicts of model, parameters (1000 classes), image_size (the paper's, pixels), gmacs, weights (tags, those
        that have to be fetched with "(download)" behind them; or "-").
    """
    import timm

    rows: list[dict[str, object]] = []
    for name, image_size in image_sizes().items():
        model = timm.create_model(name, device="meta").eval()
        row: dict[str, object] = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": image_size,
        }
        if macs:
            row["gmacs"] = round(multiply_adds(model, image_size) / 1e9, 1)
        row["weights"] = " ".join(_tag(key) for key in timm.list_pretrained(f"{name}.*")) or "-"
        rows.append(row)
    return rows


def image_sizes() -> dict[str, int]:
    """Architectures, in the order of `listing`, and the sizes they were designed for."""
    families = (halonet, hybrid, uhalonet, lesa, focal, eamlp)
    return {name: cfg.image_size for family in families for name, cfg in family.cfgs.items()}


def _tag(name: str) -> str:
    """Of a pretrained model's name, with a remark where the weights do not lie in this package."""
    from timm.models._registry import get_pretrained_cfg

    tag = name.partition(".")[2]
    return tag if get_pretrained_cfg(name).file else f"{tag} (download)"


def multiply_adds(model, image_size: int) -> int:
    """Multiply-adds of one square image, by PyTorch's counter on the reference backend's plain operators."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2

"""Importing this package registers every model with timm."""

from . import halonet
from .halonet import HaloNet

__all__ = ["HaloNet", "halonet", "listing"]


def listing() -> list[dict[str, object]]:
    """A row for every architecture of this package: name, parameters, the paper's image size, tags with weights."""
    import timm

    rows: list[dict[str, object]] = []
    for name in halonet.cfgs:
        model = timm.create_model(name, device="meta")
        tags = [key.partition(".")[2] for key in timm.list_pretrained(f"{name}.*")]
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "image_size": halonet.cfgs[name].image_size,
                "weights": " ".join(tags) or "-",
            }
        )
    return rows

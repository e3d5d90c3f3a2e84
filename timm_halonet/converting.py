"""The former name of `timm_halonet.checkpoints.convert`; to go with version 0.3."""

from .checkpoints.convert import convert, unwrap

__all__ = ["convert", "unwrap"]

"""Modules: parameters and their initialisation, nothing about speed."""

from .block_attention import BlockSelfAttention2d
from .external_attention import ExternalAttention, ExternalAttention2d
from .focal_attention import FocalAttention
from .halo_attention import HaloAttention, RelativePositionTables
from .lesa import LocallyEnhancedSelfAttention
from .map_attention import MapAttentionEncoder

__all__ = [
    "BlockSelfAttention2d",
    "ExternalAttention",
    "ExternalAttention2d",
    "FocalAttention",
    "HaloAttention",
    "LocallyEnhancedSelfAttention",
    "MapAttentionEncoder",
    "RelativePositionTables",
]

"""Modules: parameters and their initialisation, nothing about speed."""

from .halo_attention import HaloAttention, RelativePositionTables

__all__ = ["HaloAttention", "RelativePositionTables"]

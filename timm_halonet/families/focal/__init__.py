"""Focal Transformers, version 1 (arXiv 2107.00641)."""

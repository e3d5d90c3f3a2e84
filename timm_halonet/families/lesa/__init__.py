"""LESA: locally enhanced self-attention (arXiv 2107.05637)."""

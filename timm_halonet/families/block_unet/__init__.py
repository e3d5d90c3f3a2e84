"""A U-Net with block-wise self-attention (arXiv 1909.05054)."""

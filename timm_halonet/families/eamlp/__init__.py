"""EAMLP: external attention (arXiv 2105.02358)."""

"""Checkpoints: verified, published, made from others' files."""

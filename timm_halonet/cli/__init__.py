"""The `timm-halonet` command, a file a sub-command; `detect` and `bench` are next to what they run."""

from .main import main

__all__ = ["main"]

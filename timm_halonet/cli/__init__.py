"""The `timm-halonet` command, a file a sub-command."""

from .main import main

__all__ = ["main"]

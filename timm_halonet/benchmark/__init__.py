"""Speed and memory compared with timm's layers and models and with other attention code: `timm-halonet bench`."""

"""Speed and memory beside timm's layers and models and other ways to attend: `timm-halonet bench`."""

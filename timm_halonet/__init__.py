"""HaloNet backbones and fused halo attention for timm.

Importing this package makes its models known to timm, at once or as soon as timm is imported; it loads neither timm
nor PyTorch. The public names load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_halonet import _autoload

if TYPE_CHECKING:
    from timm_halonet.acceleration import accelerate as accelerate
    from timm_halonet.layers import BlockSelfAttention2d as BlockSelfAttention2d
    from timm_halonet.layers import ExternalAttention2d as ExternalAttention2d
    from timm_halonet.layers import HaloAttention as HaloAttention
    from timm_halonet.layers import MapAttentionEncoder as MapAttentionEncoder
    from timm_halonet.models.halonet import HaloNet as HaloNet
    from timm_halonet.ops import blocked_attention as blocked_attention
    from timm_halonet.ops import halo_attention as halo_attention
    from timm_halonet.segmentation import BlockAttentionUNet as BlockAttentionUNet

__version__ = "0.1.0"

# public name -> the module that has it; type checkers read the imports above
_PUBLIC = {
    "accelerate": "timm_halonet.acceleration",
    "blocked_attention": "timm_halonet.ops",
    "BlockAttentionUNet": "timm_halonet.segmentation",
    "BlockSelfAttention2d": "timm_halonet.layers",
    "ExternalAttention2d": "timm_halonet.layers",
    "halo_attention": "timm_halonet.ops",
    "HaloAttention": "timm_halonet.layers",
    "HaloNet": "timm_halonet.models.halonet",
    "MapAttentionEncoder": "timm_halonet.layers",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_autoload.install()

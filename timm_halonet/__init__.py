"""HaloNet backbones and fused halo attention for timm.

Importing this package makes its models known to timm, at once or as soon as timm is imported; it loads neither timm
nor PyTorch. The public names load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_halonet import _autoload, _former

if TYPE_CHECKING:
    from timm_halonet.acceleration import accelerate as accelerate
    from timm_halonet.families.block_unet.attention import BlockSelfAttention2d as BlockSelfAttention2d
    from timm_halonet.families.block_unet.block_unet import BlockAttentionUNet as BlockAttentionUNet
    from timm_halonet.families.eamlp.attention import ExternalAttention2d as ExternalAttention2d
    from timm_halonet.families.maast import MapAttentionEncoder as MapAttentionEncoder
    from timm_halonet.layers import HaloAttention as HaloAttention
    from timm_halonet.models.halonet import HaloNet as HaloNet
    from timm_halonet.ops import blocked_attention as blocked_attention
    from timm_halonet.ops import halo_attention as halo_attention
    from timm_halonet.ops import use_backend as use_backend

__version__ = "0.2.0"

# public name -> the module that has it; type checkers read the imports above
_PUBLIC = {
    "accelerate": "timm_halonet.acceleration",
    "blocked_attention": "timm_halonet.ops",
    "BlockAttentionUNet": "timm_halonet.families.block_unet.block_unet",
    "BlockSelfAttention2d": "timm_halonet.families.block_unet.attention",
    "ExternalAttention2d": "timm_halonet.families.eamlp.attention",
    "halo_attention": "timm_halonet.ops",
    "HaloAttention": "timm_halonet.layers",
    "HaloNet": "timm_halonet.models.halonet",
    "MapAttentionEncoder": "timm_halonet.families.maast",
    "use_backend": "timm_halonet.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_former.install()
_autoload.install()

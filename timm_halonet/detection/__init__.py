"""Detectors and instance segmenters over halo backbones, and over every backbone that timm can take apart.

    from timm_halonet.detection import mask_rcnn

    model = mask_rcnn("halonet_h0", num_classes=2, pretrained=True)  # background and one class

The models are torchvision's, so they are called as torchvision's are: a list of images (3, H, W) with values from 0 to
1, and in training a list of targets. `timm-halonet detect` trains, evaluates and runs them. Importing this package
loads nothing; its names load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs import PRESETS as PRESETS
    from .data import CocoDataset as CocoDataset
    from .data import MaskDataset as MaskDataset
    from .evaluation import average_precision as average_precision
    from .evaluation import detect as detect
    from .models import PyramidBackbone as PyramidBackbone
    from .models import faster_rcnn as faster_rcnn
    from .models import mask_rcnn as mask_rcnn
    from .models import retinanet as retinanet
    from .storage import load_detector as load_detector
    from .storage import save_detector as save_detector

# public name -> the module that has it; type checkers read the imports above
_PUBLIC = {
    "PRESETS": "configs",
    "CocoDataset": "data",
    "MaskDataset": "data",
    "PyramidBackbone": "models",
    "average_precision": "evaluation",
    "detect": "evaluation",
    "faster_rcnn": "models",
    "load_detector": "storage",
    "mask_rcnn": "models",
    "retinanet": "models",
    "save_detector": "storage",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

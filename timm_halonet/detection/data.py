"""The data sets of `timm-halonet detect`, by their names."""

from .coco import CocoDataset as CocoDataset
from .dataset import DetectionDataset as DetectionDataset
from .dataset import Transform as Transform
from .label_maps import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from .label_maps import LABEL_MODES as LABEL_MODES
from .label_maps import MaskDataset as MaskDataset
from .layouts import open_dataset as open_dataset

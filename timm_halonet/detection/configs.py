"""What makes a detector and its training: dataclasses, a comment a field, and the presets as literals."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from .values import short

Config = TypeVar("Config")
NORMS = ("frozen", "sync", "batch")
LARGEST = 65_536  # of an option: sizes, widths, counts


@dataclass(frozen=True)
class DetectorCfg:
    """The options of every detector; torchvision's defaults unless a comment says otherwise."""

    # backbone
    out_indices: tuple[int, ...] | None = None  # feature maps of the backbone; None: all from min_stride on
    min_stride: int = 4  # stride of the first map that counts, in pixels, where out_indices is None
    trainable_layers: int | str | None = (
        None  # stages that train, from the last, or "all"; None: 3 if pretrained, else all
    )
    norm: str | None = None  # the backbone's batch norms: frozen, sync or batch; None: frozen if pretrained, else batch
    backbone_kwargs: Mapping[str, Any] | None = None  # further arguments of timm.create_model
    fpn_channels: int = 256
    channels_last: bool = True  # memory format of convolutions; the results are the same
    # image size
    min_size: int | tuple[int, ...] | None = 800  # shorter side in pixels, one of them in training; None: as it comes
    max_size: int = 1333  # longest side in pixels; not used where min_size is None
    scale: float = 1.0  # where min_size is None: images are enlarged by it in evaluation, crops in the data pipeline
    image_mean: tuple[float, ...] | None = (
        None  # of red, green and blue in 0..1; None: what the backbone's weights expect
    )
    image_std: tuple[float, ...] | None = None
    # anchors and what is kept of them
    anchor_scales: tuple[float, ...] = (8.0,)  # anchor sides over the stride of their level: 32 pixels at stride 4
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    detections_per_img: int = 100
    score_thresh: float = 0.05
    nms_thresh: float = 0.5


@dataclass(frozen=True)
class RetinaNetCfg(DetectorCfg):
    """RetinaNet: one stage, focal loss."""

    min_stride: int = 8
    anchor_scales: tuple[float, ...] = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))
    detections_per_img: int = 300
    topk_candidates: int = 1000  # a level, before non-maximum suppression
    fg_iou_thresh: float = 0.5
    bg_iou_thresh: float = 0.4


@dataclass(frozen=True)
class FasterRCNNCfg(DetectorCfg):
    """Faster R-CNN: region proposals, then a box head on each."""

    rpn_pre_nms_top_n_train: int = 2000  # a level
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000  # an image
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    box_features: int = 1024  # width of the two linear layers
    box_pool: int = 7  # bins a side
    sampling_ratio: int = 2  # sampling points a bin and direction


@dataclass(frozen=True)
class MaskRCNNCfg(FasterRCNNCfg):
    """Mask R-CNN: Faster R-CNN with a mask head on the positive regions."""

    mask_layers: tuple[int, ...] = (256, 256, 256, 256)  # widths of the 3x3 convolutions
    mask_pool: int = 14  # bins a side; masks have twice that


@dataclass(frozen=True)
class TrainCfg:
    """How to train; the choices are this package's, made for few images and little time."""

    crop: int | None = None  # side of a training image in pixels, after scaling; None: whole images
    jitter: tuple[float, float] = (1.0, 1.0)  # range of the random scale of a crop
    flips: str = "h"  # h: left and right, v: up and down, hv, or none
    color: float = 0.0  # strength of random brightness, contrast, saturation and (a quarter of it) hue
    batch_size: int = 2  # a process
    opt: str = "adamw"  # name in timm
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup_steps: int = 500  # over which the learning rate rises, at most
    warmup: float = 0.05  # the same as a share of the budget: whichever is over first
    clip_grad: float = 1.0  # largest norm of the gradient; 0 for any
    ema: float = 0.0  # decay of the moving average of the weights that is evaluated and saved; 0 for none


DETECTORS: dict[str, type[DetectorCfg]] = {
    "mask_rcnn": MaskRCNNCfg,
    "faster_rcnn": FasterRCNNCfg,
    "retinanet": RetinaNetCfg,
}

# Options by preset; each detector, and the training, takes those that it has.
PRESETS: dict[str, dict[str, Any]] = {
    # photos, objects of all sizes: torchvision's sizes and heads
    "standard": {},
    # cells, particles, far-off things: tens to hundreds of objects of 5 to 100 pixels in an image, crops of it for
    # training, narrow heads that a CPU can train
    "small_objects": dict(
        min_stride=4,
        trainable_layers="all",
        norm="batch",
        fpn_channels=128,
        min_size=None,
        scale=2.0,
        sampling_ratio=1,  # the bins of small boxes are smaller than a pixel of the map
        anchor_scales=(4.0,),
        detections_per_img=500,
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=2000,
        rpn_post_nms_top_n_test=1500,
        box_batch_size_per_image=128,
        box_features=256,
        mask_layers=(128, 128),
        topk_candidates=2000,
        crop=256,
        jitter=(0.7, 1.4),
        flips="hv",
        color=0.3,
        batch_size=4,
        lr=5e-4,
        warmup_steps=100,
        ema=0.999,
    ),
    # photos, minutes on a CPU: narrow heads; the command takes the sides of the data set's images, or smaller ones
    # where the time needs it
    "quick": dict(
        fpn_channels=128,
        anchor_scales=(5.0,),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=128,
        box_features=256,
        mask_layers=(128, 128),
        color=0.2,
        lr=5e-4,
        ema=0.999,
    ),
}


def preset(config: type[Config], name: str, options: Mapping[str, Any] | None = None) -> Config:
    """A config of a preset, with options that override it.

    Raises:
        ValueError: an unknown preset, or an option that is not a field of the config or has a value of another kind.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    options = dict(options or {})
    kinds = {f.name: f.type for f in fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(kinds))
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; {config.__name__} has {', '.join(kinds)}")
    for option, value in options.items():
        if isinstance(value, list):  # as good as a tuple: from JSON, or from the user
            value = options[option] = tuple(value)
        if not isinstance(value, kinds_of := _outer_types(kinds[option])):
            expected = " or ".join(kind.__name__ for kind in kinds_of)
            raise ValueError(f"{option} is {short(value)}, expected {expected}")
        if isinstance(value, tuple):
            _check_items(option, value, kinds[option])
    values = {key: value for key, value in PRESETS[name].items() if key in kinds}
    return replace(config(), **{**values, **options})  # type: ignore[type-var]


def _check_items(option: str, values: tuple[Any, ...], annotation: Any) -> None:
    """Refuses a tuple of another length than its annotation has, or with something else than finite numbers."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    [kinds] = [get_args(part) for part in parts if get_origin(part) is tuple]
    count = None if kinds[-1] is ... else len(kinds)
    allowed = (int, float) if float in kinds else int
    fits = all(isinstance(x, allowed) and not isinstance(x, bool) and abs(x) <= LARGEST for x in values)
    if not fits or len(values) != (count or len(values)) or len(values) > 256:
        what = "numbers" if float in kinds else "whole numbers"
        raise ValueError(
            f"{option} is {short(values)}, expected {count or ''}{' ' if count else ''}{what} up to {LARGEST}"
        )


def check_detector(cfg: DetectorCfg) -> None:
    """Checks the values of a detector's options.

    Raises:
        ValueError: values of a detector's options that do not fit.
    """
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise ValueError(f"{field.name} is {short(value)}, expected numbers up to {LARGEST}")
    for name in ("anchor_scales", "aspect_ratios", "mask_layers"):
        values = getattr(cfg, name, (1,))
        if not values or min(values) <= 0:
            raise ValueError(f"{name} needs one positive number or more, got {values}")
    for name in ("image_mean", "image_std"):
        values = getattr(cfg, name)
        if values is not None and (len(values) not in (1, 3) or (name == "image_std" and min(values) <= 0)):
            raise ValueError(f"{name} is {values}, expected 1 or 3 numbers{' above 0' if name == 'image_std' else ''}")
    sizes = (cfg.min_size,) if isinstance(cfg.min_size, int) else cfg.min_size
    if sizes is not None and (not sizes or min(sizes) < 32 or max(sizes) > cfg.max_size):
        raise ValueError(f"need 32 <= min_size <= max_size, got min_size={cfg.min_size}, max_size={cfg.max_size}")
    if cfg.scale <= 0 or cfg.fpn_channels < 1 or cfg.detections_per_img < 1:
        raise ValueError(
            f"need scale > 0, fpn_channels >= 1 and detections_per_img >= 1, got {cfg.scale}, {cfg.fpn_channels}, "
            f"{cfg.detections_per_img}"
        )
    if cfg.norm is not None and cfg.norm not in NORMS:
        raise ValueError(f"norm is {cfg.norm!r}, expected one of {', '.join(NORMS)} or None")


def _outer_types(annotation: Any) -> tuple[type, ...]:
    """The types of an annotation, without their parameters in brackets; int counts as float too."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = [get_origin(part) or part for part in parts]
    return (*kinds, int) if float in kinds else tuple(kinds)


def parse_options(texts: Sequence[str], *configs: type) -> list[dict[str, Any]]:
    """NAME=VALUE texts as options: a dict for each config, of the names that it is the first to have.

    Raises:
        ValueError: no `=`, or a name that no config has.
    """
    found: list[dict[str, Any]] = [{} for _ in configs]
    known = [[f.name for f in fields(config)] for config in configs]
    for text in texts:
        name, equals, value = text.partition("=")
        place = next((n for n, names in enumerate(known) if name in names), None)
        if not equals or place is None:
            every = ", ".join(name for names in known for name in names)
            raise ValueError(f"expected NAME=VALUE, got {text!r}; the names are {every}")
        try:
            found[place][name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[place][name] = value  # a text
    return found

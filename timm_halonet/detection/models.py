"""torchvision's detectors over a feature pyramid of any backbone that timm can take apart."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from ..photos import max_pixels
from .backbones import FEATURE_ARGS as FEATURE_ARGS
from .backbones import ExtraLevels as ExtraLevels
from .backbones import PyramidBackbone as PyramidBackbone
from .backbones import create_body, freeze_stages, normalization, without_sources
from .configs import NORMS as NORMS
from .configs import DetectorCfg, FasterRCNNCfg, MaskRCNNCfg, RetinaNetCfg, check_detector, preset


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a detector again; a detector has it as its attribute `recipe`."""

    detector: str
    backbone: str | None  # name in timm; None for a module of the user's
    num_classes: int
    options: DetectorCfg  # with what its defaults left open settled


def mask_rcnn(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    pretrained: bool | None = None,
    preset: str = "standard",
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870): boxes, classes and masks.

    Args:
        backbone: a name in timm, or a module that gives a list of feature maps (B, C, H / stride, W / stride) and says
            which in its `feature_info`, as timm's features_only models do; it is changed in place.
        num_classes: classes with the background, which is class 0, as torchvision counts: 2 for one kind of object.
        pretrained: take the backbone's weights by its name; for a module, whether it has been trained. It settles what
            `norm` and `trainable_layers` are if they are not given. Default: not for a name, yes for a module.
        preset: of `timm_halonet.detection.PRESETS`.
        options: any field of `timm_halonet.detection.configs.MaskRCNNCfg`; each has its comment there.

    Returns:
        torchvision's `MaskRCNN`. In training `model(images, targets)` gives a dict of losses; in evaluation
        `model(images)` a list of dicts of boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N) from 1, scores (N) and
        masks (N, 1, H, W) from 0 to 1. Images are (3, H, W) in float32 from 0 to 1, of any size.

    Raises:
        ValueError: an argument that does not fit, with what would.
    """
    cfg = _config(MaskRCNNCfg, preset, options)
    body, recipe = _pyramid("mask_rcnn", backbone, num_classes, pretrained, cfg, LastLevelMaxPool())
    width = cfg.mask_layers[-1]
    model = MaskRCNN(
        body,
        mask_roi_pool=_roi_pool(body, cfg.mask_pool, cfg.sampling_ratio),
        mask_head=MaskRCNNHeads(body.out_channels, cfg.mask_layers, dilation=1),
        mask_predictor=_float32(MaskRCNNPredictor(width, width, num_classes)),
        **_rcnn_arguments(body, num_classes, cfg),
    )
    return _finish(model, recipe)


def faster_rcnn(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    pretrained: bool | None = None,
    preset: str = "standard",
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN (arXiv 1506.01497) with a feature pyramid: boxes and classes.

    As `mask_rcnn`, without masks; options are the fields of `FasterRCNNCfg`.
    """
    cfg = _config(FasterRCNNCfg, preset, options)
    body, recipe = _pyramid("faster_rcnn", backbone, num_classes, pretrained, cfg, LastLevelMaxPool())
    return _finish(FasterRCNN(body, **_rcnn_arguments(body, num_classes, cfg)), recipe)


def retinanet(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    pretrained: bool | None = None,
    preset: str = "standard",
    **options: Any,
) -> RetinaNet:
    """RetinaNet (arXiv 1708.02002): boxes and classes in one stage.

    As `mask_rcnn`, without masks; options are the fields of `RetinaNetCfg`. `num_classes` counts the background here
    too: the class 0 that torchvision's RetinaNet has, and learns never to predict.
    """
    cfg = _config(RetinaNetCfg, preset, options)
    extra = ExtraLevels(cfg.fpn_channels, cfg.fpn_channels)
    body, recipe = _pyramid("retinanet", backbone, num_classes, pretrained, cfg, extra)
    model = RetinaNet(
        body,
        num_classes,
        anchor_generator=_anchors(body, cfg),
        score_thresh=cfg.score_thresh,
        nms_thresh=cfg.nms_thresh,
        detections_per_img=cfg.detections_per_img,
        fg_iou_thresh=cfg.fg_iou_thresh,
        bg_iou_thresh=cfg.bg_iou_thresh,
        topk_candidates=cfg.topk_candidates,
    )
    return _finish(model, recipe)


class DetectorTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and batching. Where `min_size` is None images are only scaled by a factor,
    and only in evaluation: in training they come as crops that have been scaled already.
    """

    def __init__(self, cfg: DetectorCfg):
        super().__init__(cfg.min_size or 1, cfg.max_size, cfg.image_mean, cfg.image_std)
        self.keep_size = cfg.min_size is None
        self.scale = cfg.scale

    def check_size(self, height: int, width: int) -> None:
        """Refuses an image of which resizing would leave no row or no column, or make more pixels than one may have.

        Raises:
            ValueError: with the size and the option that would help.
        """
        if self.keep_size:
            return
        side = min(self.min_size) if self.training else self.min_size[-1]
        short, long = sorted((height, width))
        factor = min(side / short, self.max_size / long)
        limit = max_pixels()
        if limit and height * width * factor**2 > limit:
            pixels = f"{height * width * factor**2:.0f}"
            raise ValueError(
                f"the image of {width} x {height} pixels (width, height) would have {pixels} at "
                f"min_size={side}, max_size={self.max_size}, over the limit of {limit}; set smaller ones"
            )
        if short * factor < 1:
            raise ValueError(
                f"the image has {width} x {height} pixels (width, height), and less than one would be left of its "
                f"shorter side at max_size={self.max_size}; leave it out, crop it, or set a larger max_size"
            )

    def resize(
        self, image: torch.Tensor, target: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        if not self.keep_size:
            self.check_size(*image.shape[-2:])
            return super().resize(image, target)
        if self.training or self.scale == 1.0:
            return image, target
        size = [max(1, round(side * self.scale)) for side in image.shape[-2:]]
        return nn.functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], target


def _config(kind: type, name: str, options: Mapping[str, Any]) -> Any:
    cfg: Any = preset(kind, name, options)
    check_detector(cfg)
    return cfg


def _pyramid(
    detector: str,
    backbone: str | nn.Module,
    num_classes: int,
    pretrained: bool | None,
    cfg: DetectorCfg,
    extra: ExtraFPNBlock,
) -> tuple[PyramidBackbone, Recipe]:
    """The backbone with what its defaults left open settled."""
    if num_classes < 2:
        raise ValueError(f"num_classes counts the background, so it is 2 or more, got {num_classes}")
    if isinstance(backbone, str):
        name, body, trained = backbone, create_body(backbone, bool(pretrained), cfg), bool(pretrained)
    else:
        name, body, trained = None, backbone, pretrained is not False
    pyramid = PyramidBackbone(body, cfg.out_indices, cfg.fpn_channels, extra, cfg.min_stride, cfg.channels_last)
    mean, std = normalization(body)
    layers = cfg.trainable_layers if cfg.trainable_layers is not None else (3 if trained else "all")
    cfg = replace(
        cfg,
        norm=cfg.norm or ("frozen" if trained else "batch"),
        trainable_layers=layers,
        image_mean=tuple(cfg.image_mean or mean),
        image_std=tuple(cfg.image_std or std),
    )
    if layers != "all":
        freeze_stages(body, layers)
    if cfg.norm == "frozen":
        pyramid.body = freeze_batch_norm_2d(body)
    elif cfg.norm == "sync":
        pyramid.body = convert_sync_batchnorm(body)
    if name is not None:
        name, cfg = without_sources(name, cfg)
    return pyramid, Recipe(detector, name, num_classes, cfg)


def _anchors(body: PyramidBackbone, cfg: DetectorCfg) -> AnchorGenerator:
    # whole pixels, rounded down, as torchvision's RetinaNet has them
    sizes = tuple(tuple(max(1, int(scale * stride)) for scale in cfg.anchor_scales) for stride in body.level_strides)
    return AnchorGenerator(sizes, (tuple(cfg.aspect_ratios),) * len(sizes))


def _roi_pool(body: PyramidBackbone, size: int, sampling_ratio: int) -> MultiScaleRoIAlign:
    names = [str(n) for n in range(len(body.strides))]
    pool = MultiScaleRoIAlign(names, size, sampling_ratio)
    # left to itself it guesses the strides from the first image, wrongly if that is mostly padding, and keeps the guess
    first, last = body.strides[0], body.strides[-1]
    pool.scales = [1 / stride for stride in body.strides]
    pool.map_levels = initLevelMapper(first.bit_length() - 1, last.bit_length() - 1)
    return pool


def _rcnn_arguments(body: PyramidBackbone, num_classes: int, cfg: FasterRCNNCfg) -> dict[str, Any]:
    return dict(
        box_roi_pool=_roi_pool(body, cfg.box_pool, cfg.sampling_ratio),
        box_head=TwoMLPHead(body.out_channels * cfg.box_pool**2, cfg.box_features),
        box_predictor=_float32(FastRCNNPredictor(cfg.box_features, num_classes)),
        rpn_anchor_generator=_anchors(body, cfg),
        rpn_pre_nms_top_n_train=cfg.rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=cfg.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_train=cfg.rpn_post_nms_top_n_train,
        rpn_post_nms_top_n_test=cfg.rpn_post_nms_top_n_test,
        rpn_nms_thresh=cfg.rpn_nms_thresh,
        rpn_fg_iou_thresh=cfg.rpn_fg_iou_thresh,
        rpn_bg_iou_thresh=cfg.rpn_bg_iou_thresh,
        rpn_batch_size_per_image=cfg.rpn_batch_size_per_image,
        box_score_thresh=cfg.score_thresh,
        box_nms_thresh=cfg.nms_thresh,
        box_detections_per_img=cfg.detections_per_img,
        box_batch_size_per_image=cfg.box_batch_size_per_image,
        box_positive_fraction=cfg.box_positive_fraction,
    )


def _finish(model: Any, recipe: Recipe) -> Any:
    model.recipe = recipe
    model.transform = DetectorTransform(recipe.options)
    _float32(model.head if recipe.detector == "retinanet" else model.rpn.head)
    return model.to(memory_format=torch.channels_last) if recipe.options.channels_last else model


def _float32(module: nn.Module) -> nn.Module:
    """The module, whose outputs are float32 under autocast too: boxes are computed in their type."""
    module.register_forward_hook(_output_to_float32)
    return module


def _output_to_float32(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: _output_to_float32(module, args, value) for key, value in output.items()}
    return type(output)(_output_to_float32(module, args, value) for value in output)

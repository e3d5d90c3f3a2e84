"""torchvision's detectors over a feature pyramid of any backbone that timm can take apart."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from ..config_file import explain_model_args, model_arguments
from ..hub import config_of, explain_downloads
from ..photos import max_pixels
from .configs import DetectorCfg, FasterRCNNCfg, MaskRCNNCfg, RetinaNetCfg, check_detector, preset

FEATURE_ARGS = ("out_indices", "feature_cls")  # of timm's features_only models, next to the model's own arguments


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


class PyramidBackbone(nn.Module):
    """A backbone's feature maps through a feature pyramid (FPN, arXiv 1612.03144): torchvision's `BackboneWithFPN` for
    timm's models.

    Shape: (B, 3, H, W) -> dict of level name -> (B, out_channels, H / stride, W / stride) in float32, finest first. The
    levels are "0", "1", ... of the backbone's maps, and those of the extra blocks.

    Args:
        body: gives a list of feature maps, described by its `feature_info`.
        out_indices: which, as in timm; None for all of a stride of `min_stride` pixels and more.
        out_channels: of every level.
        extra_blocks: torchvision's, for levels beyond the backbone's.
        min_stride: in pixels.
        channels_last: memory format that the images are turned to.

    Attributes:
        strides: of the backbone's maps that are used, in pixels.
        level_strides: the same with the extra levels.

    Raises:
        ValueError: maps that the body does not have, or whose strides do not double from one to the next.
    """

    def __init__(
        self,
        body: nn.Module,
        out_indices: tuple[int, ...] | None = None,
        out_channels: int = 256,
        extra_blocks: ExtraFPNBlock | None = None,
        min_stride: int = 4,
        channels_last: bool = False,
    ):
        super().__init__()
        self.body = body
        self.positions, self.strides, channels = _choose_maps(_maps(body), out_indices, min_stride)
        extra_blocks = extra_blocks or LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks)
        self.out_channels = out_channels
        self.channels_last = channels_last
        extra_levels = 2 if isinstance(extra_blocks, LastLevelP6P7) else 1
        self.level_strides = [*self.strides, *(self.strides[-1] * 2**n for n in range(1, extra_levels + 1))]
        # timm's transformers give (B, H, W, C)
        self.nhwc = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        maps = self.body(x)
        chosen = [maps[i].permute(0, 3, 1, 2) if self.nhwc else maps[i] for i in self.positions]
        levels = self.fpn(OrderedDict((str(n), m) for n, m in enumerate(chosen)))
        # anchors take the maps' type, and bfloat16 has no odd numbers above 256
        return OrderedDict((name, level.float()) for name, level in levels.items())


class ExtraLevels(LastLevelP6P7):
    """torchvision's levels 6 and 7 of RetinaNet, in float32 under autocast too.

    On the CPU a bfloat16 3x3 convolution of stride 2 on a map of one pixel gives a weight gradient with uninitialised
    memory in it (PyTorch 2.15); these maps are that small where images are, and cost nothing in either type.
    """

    def forward(
        self, p: list[torch.Tensor], c: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        with torch.autocast(p[-1].device.type, enabled=False):
            return super().forward([level.float() for level in p], [level.float() for level in c], names)


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
        name, body, trained = backbone, _create_body(backbone, bool(pretrained), cfg), bool(pretrained)
    else:
        name, body, trained = None, backbone, pretrained is not False
    pyramid = PyramidBackbone(body, cfg.out_indices, cfg.fpn_channels, extra, cfg.min_stride, cfg.channels_last)
    mean, std = _normalization(body)
    layers = cfg.trainable_layers if cfg.trainable_layers is not None else (3 if trained else "all")
    cfg = replace(
        cfg,
        norm=cfg.norm or ("frozen" if trained else "batch"),
        trainable_layers=layers,
        image_mean=tuple(cfg.image_mean or mean),
        image_std=tuple(cfg.image_std or std),
    )
    if layers != "all":
        _freeze_stages(body, layers)
    if cfg.norm == "frozen":
        pyramid.body = freeze_batch_norm_2d(body)
    elif cfg.norm == "sync":
        pyramid.body = convert_sync_batchnorm(body)
    if name is not None:
        name, cfg = _without_sources(name, cfg)
    return pyramid, Recipe(detector, name, num_classes, cfg)


def _without_sources(name: str, cfg: DetectorCfg) -> tuple[str, DetectorCfg]:
    """The backbone as a detector's config.json has it: a name in timm and the model's own arguments.

    The detector's file has the weights; a folder or repository that the backbone came from need not be there any more.
    """
    args = dict(cfg.backbone_kwargs or {})
    found = config_of(name)
    if found:
        name, args = found[1]["architecture"], {**(found[1].get("model_args") or {}), **args}
        args.pop("num_classes", None)
    own = model_arguments(name.partition(".")[0])
    args = {key: value for key, value in args.items() if key in own or key in FEATURE_ARGS}
    return name, replace(cfg, backbone_kwargs=args or None)


def _create_body(name: str, pretrained: bool, cfg: DetectorCfg) -> nn.Module:
    """timm's features_only model, cut off behind the last map that is used."""
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}; timm.list_models() has the names")
    found = config_of(name)
    name = found[0] if found else name
    args = dict(cfg.backbone_kwargs or {})
    kwargs = dict(pretrained=pretrained, features_only=True, **args)
    with explain_downloads(name), explain_model_args(name, args, "backbone_kwargs"):
        try:
            body = timm.create_model(name, **kwargs)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
            if "checkpoint_path" not in args:
                raise
            raise ValueError(f"{args['checkpoint_path']}: {str(e).partition(chr(10))[0]}") from None
    maps = _maps(body)
    positions, _, _ = _choose_maps(maps, cfg.out_indices, cfg.min_stride)
    if positions[-1] == len(maps) - 1:
        return body
    indices = tuple(index for index, _, _ in maps[: positions[-1] + 1])
    return timm.create_model(name, out_indices=indices, **kwargs)


def _maps(body: nn.Module) -> list[tuple[int, int, int]]:
    """Index, stride in pixels and channels of each map that a body gives, in order."""
    info: Any = getattr(body, "feature_info", None)
    if info is None or not hasattr(info, "out_indices"):
        raise ValueError(
            f"{type(body).__name__} has no feature_info that describes its maps; a backbone is a name in timm or a "
            "model made with timm.create_model(..., features_only=True)"
        )
    count = len(info.info)
    indices = [i % count for i in info.out_indices]
    return list(zip(indices, info.reduction(), info.channels(), strict=True))


def _choose_maps(
    maps: list[tuple[int, int, int]], out_indices: tuple[int, ...] | None, min_stride: int
) -> tuple[list[int], list[int], list[int]]:
    """Positions among the maps, strides and channels of those that are used."""
    there = ", ".join(f"{index} (stride {stride}, {channels} channels)" for index, stride, channels in maps)
    if out_indices is None:
        chosen = [n for n, (_, stride, _) in enumerate(maps) if stride >= min_stride]
    else:
        positions = {index: n for n, (index, _, _) in enumerate(maps)}
        wrong = [index for index in out_indices if index not in positions]
        if wrong:
            raise ValueError(f"out_indices {tuple(out_indices)}: the backbone has no map {wrong[0]}; it has {there}")
        chosen = [positions[index] for index in out_indices]
    strides = [maps[n][1] for n in chosen]
    if not chosen or any(b != 2 * a for a, b in pairwise(strides)):
        raise ValueError(
            f"a feature pyramid needs maps whose strides double from one to the next, got strides {strides}; the "
            f"backbone has the maps {there}"
        )
    return chosen, strides, [maps[n][2] for n in chosen]


def _normalization(body: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cfg: Any = getattr(body, "pretrained_cfg", None) or {}
    get = cfg.get if isinstance(cfg, Mapping) else lambda key: getattr(cfg, key, None)
    return get("mean") or IMAGENET_DEFAULT_MEAN, get("std") or IMAGENET_DEFAULT_STD


def _stage_of(body: nn.Module) -> tuple[dict[str, int], int]:
    """The stage of each module by its name, and the number of stages; a stage ends with a map of the backbone.

    timm's wrappers rename the modules that end a stage ("stages.0" is "stages_0"), or put them a level deeper.
    """
    info: Any = body.feature_info
    names = [name for name, _ in body.named_modules() if name]
    ends = []
    for entry in info.info:
        wanted = entry["module"].replace(".", "_")

        def inside(name: str, wanted: str = wanted) -> bool:
            flat = name.replace(".", "_")
            deeper = name.partition(".")[2].replace(".", "_")
            return any(n == wanted or n.startswith(wanted + "_") for n in (flat, deeper))

        found = [n for n, name in enumerate(names) if inside(name)]
        if not found:
            break  # a stage that was cut off
        ends.append(found[-1])
    if not ends or ends != sorted(ends):
        raise ValueError(f"cannot tell the stages of {type(body).__name__} apart; give trainable_layers='all'")
    ends[-1] = len(names)  # a norm behind the last stage belongs to it
    stages = {name: next(s for s, end in enumerate(ends) if n <= end) for n, name in enumerate(names)}
    return stages, len(ends)


def _freeze_stages(body: nn.Module, trainable_layers: int | str) -> None:
    """Takes all but the last stages out of training, the statistics of their batch norms included."""
    stages, count = _stage_of(body)
    if isinstance(trainable_layers, str) or not 0 <= trainable_layers <= count:
        raise ValueError(
            f"trainable_layers is {trainable_layers!r}, expected 0 to {count} stages of the backbone, or 'all'"
        )
    for name, module in list(body.named_modules()):
        if name and stages[name] < count - trainable_layers:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                body.set_submodule(name, freeze_batch_norm_2d(module))


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

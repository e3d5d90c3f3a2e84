"""A backbone of timm as a detector has it: its maps through a feature pyramid, its first stages frozen."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ..config_file import explain_model_args, model_arguments
from ..hub import config_of, explain_downloads
from .configs import DetectorCfg

FEATURE_ARGS = ("out_indices", "feature_cls")  # of timm's features_only models, next to the model's own arguments


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


def without_sources(name: str, cfg: DetectorCfg) -> tuple[str, DetectorCfg]:
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


def create_body(name: str, pretrained: bool, cfg: DetectorCfg) -> nn.Module:
    """timm's features_only model, cut off behind the last map that is used.

    Raises:
        ValueError: a name that timm does not know, or arguments and weights that do not fit.
    """
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


def normalization(body: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images, in 0..1, that a body's weights expect; ImageNet's where it names none."""
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


def freeze_stages(body: nn.Module, trainable_layers: int | str) -> None:
    """Takes all but the last stages out of training, the statistics of their batch norms included.

    Raises:
        ValueError: more stages than there are, or stages that cannot be told apart.
    """
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

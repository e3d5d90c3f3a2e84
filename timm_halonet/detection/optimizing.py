"""The optimiser of a detector: which parameters decay."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from .configs import TrainCfg


def make_optimizer(model: nn.Module, cfg: TrainCfg) -> torch.optim.Optimizer:
    """timm's, with weight decay on all but vectors and what the backbone exempts."""
    groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=undecayed(model))
    fused = {"fused": True} if cfg.opt in ("adam", "adamw", "sgd") else {}  # PyTorch's own
    return create_optimizer_v2(groups, opt=cfg.opt, lr=cfg.lr, weight_decay=0.0, **fused)


def undecayed(model: nn.Module) -> list[str]:
    """The parameters of a detector that its backbone's `no_weight_decay` names."""
    recipe, backbone = getattr(model, "recipe", None), getattr(model, "backbone", None)
    body = getattr(backbone, "body", None)
    if body is None:
        return []
    name, kwargs = (recipe.backbone, recipe.options.backbone_kwargs) if recipe else (None, None)
    wanted = {flat(name) for name in _names(body, name, kwargs or {})}
    own = ((name, name.removeprefix("backbone.body.")) for name, _ in model.named_parameters())
    return [whole for whole, name in own if whole != name and {flat(name), flat(name.removeprefix("model."))} & wanted]


def flat(name: str) -> str:
    """timm's features_only wrappers turn "stages.0" into "stages_0"."""
    return name.replace(".", "_")


def _names(body: nn.Module, name: str | None, kwargs: Mapping[str, Any]) -> set[str]:
    for module in (body, getattr(body, "model", None)):
        if callable(ask := getattr(module, "no_weight_decay", None)):
            return set(ask())
    # a features_only wrapper has lost the method: a model of the same name has it
    cfg = getattr(body, "pretrained_cfg", None) or {}
    name = name or (cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None))
    if not name:
        return set()
    with torch.random.fork_rng(devices=[]):
        plain = timm.create_model(name, pretrained=False, **kwargs)
    return set(plain.no_weight_decay()) if hasattr(plain, "no_weight_decay") else set()

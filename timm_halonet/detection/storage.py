"""A detector in a folder: config.json, from which it is built again, and model.safetensors."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .. import __version__
from ..config_file import check_finite, check_model_args, is_plain_name, read_json
from ..files import json_text, make_folder, whole_file
from ..hub import CONFIG_NAME, WEIGHTS_NAME, check_state_dict, describe_weights
from . import models
from .checkpoint import load_checkpoint as load_checkpoint  # under its earlier path too
from .checkpoint import save_checkpoint as save_checkpoint
from .configs import DETECTORS
from .values import short, whole


def save_detector(
    folder: str | os.PathLike[str], model: nn.Module, categories: list[dict[str, Any]], **details: Any
) -> None:
    """Writes config.json and model.safetensors, each the whole file or nothing.

    Args:
        folder: made if it does not exist.
        model: made by this package's mask_rcnn, faster_rcnn or retinanet over a backbone of a name.
        categories: dicts of id and name, in the order of the labels from 1.
        details: further entries of config.json.

    Raises:
        ValueError: a model that config.json could not describe.
    """
    folder = make_folder(folder)
    config = {**describe(model), "categories": categories, **details, "timm_halonet": __version__}
    with whole_file(folder / WEIGHTS_NAME) as temporary:
        try:
            save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, temporary)
        except SafetensorError as e:
            raise OSError(str(e)) from None
    write_json(folder / CONFIG_NAME, config)


def describe(model: nn.Module) -> dict[str, Any]:
    """All that is needed to build a detector again: detector, backbone, num_classes, options.

    Raises:
        ValueError: the model is not of this package, or has a backbone without a name.
    """
    recipe: models.Recipe | None = getattr(model, "recipe", None)
    if recipe is None:
        raise ValueError(f"{type(model).__name__} was not made by timm_halonet.detection: save its state_dict yourself")
    if recipe.backbone is None:
        raise ValueError("the backbone is a module of your own, not a name in timm: save the state_dict yourself")
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe.options).items()}
    return dict(detector=recipe.detector, backbone=recipe.backbone, num_classes=recipe.num_classes, options=options)


def build(config: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """The detector that a config.json describes, without its weights.

    Raises:
        ValueError: something in it is missing or does not fit.
    """
    for key in ("detector", "backbone", "num_classes", "options"):
        if key not in config:
            raise ValueError(f"the config has no {key!r}: not one of a detector of this package")
    if config["detector"] not in DETECTORS:
        raise ValueError(f"unknown detector {config['detector']!r}; there are {', '.join(DETECTORS)}")
    make = getattr(models, config["detector"])
    return make(config["backbone"], config["num_classes"], pretrained=pretrained, **config["options"])


def load_detector(folder: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The detector in evaluation mode, and its config.

    Raises:
        ValueError: files that are missing, broken or do not belong together; with the path.
    """
    config_path, weights = Path(folder, CONFIG_NAME), Path(folder, WEIGHTS_NAME)
    try:
        config = read_json(config_path)
    except FileNotFoundError:
        raise ValueError(
            f"{config_path} does not exist; a trained detector is a folder with {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}, which training writes at its end"
        ) from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{config_path} cannot be read: {e}") from None
    try:
        # where it runs need not be where it was trained: SyncBatchNorm has the parameters of BatchNorm
        options = {
            **config["options"],
            "norm": "batch" if config["options"]["norm"] == "sync" else config["options"]["norm"],
        }
        _check_backbone(config["backbone"], options, config_path)
        _check_categories(config)
        known = {**config, "options": options}
        with torch.device("meta"):  # without memory, until the weights are known to fit
            trial = build(known)
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{config_path}: {str(e).partition(chr(10))[0]}") from None
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"cannot read the weights: {describe_weights(weights)} ({e})") from None
    try:
        check_state_dict(state, trial.state_dict(), f"the detector of {config_path}")
        trial.load_state_dict(state, assign=True)
        model = build(known)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"{weights} does not fit {config_path}: {' '.join(str(e).split())}") from None
    return model.eval(), config


def _check_categories(config: dict[str, Any]) -> None:
    count, categories = whole(config["num_classes"], 2, 1_000_000), config["categories"]
    if count is None:
        raise ValueError(f"num_classes is {short(config['num_classes'])}, expected a whole number from 2 to 1000000")
    named = isinstance(categories, list) and all(
        isinstance(c, dict) and isinstance(c.get("name"), str) and whole(c.get("id")) is not None for c in categories
    )
    if not named or len(categories) != count - 1:
        raise ValueError(f"categories is {short(categories)}, expected {count - 1} objects with id and name")


def _check_backbone(name: Any, options: dict[str, Any], path: Path) -> None:
    """Refuse a backbone that would be loaded or fetched from somewhere, and options without a finite value."""
    check_finite(options, "options", path)
    architecture, dot, tag = name.partition(".") if isinstance(name, str) else ("", "", "")
    if not is_plain_name(architecture) or (dot and not is_plain_name(tag)):
        raise ValueError(f"backbone is {name!r}, expected a name in timm, without a source such as hf-hub:")
    args = options.get("backbone_kwargs")
    check_model_args(architecture, {} if args is None else args, "options.backbone_kwargs", models.FEATURE_ARGS)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, the whole file or nothing.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")

"""How every family of this package makes a model of a name, with weights whose hash has been checked."""

from collections.abc import Callable
from typing import Any

from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs

from ..hub import checked_weights, explain_load_errors, pretrained_cfgs


def build(
    model_cls: Callable[..., Any], variant: str, pretrained: bool, base_cfg: dict[str, Any] | None = None, **kwargs
) -> Any:
    """timm's `build_model_with_cfg`, its errors explained.

    Args:
        model_cls: of the family.
        variant: architecture's name in timm.
        pretrained: load weights.
        base_cfg: what a model without weights tells timm about its input; None for what its default weights say.
        kwargs: of `build_model_with_cfg` and the model.

    Raises:
        RuntimeError: weights that do not exist, cannot be had, or are not those that their config.json describes.
    """
    if base_cfg and not pretrained and kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg
    with explain_load_errors(variant, kwargs):
        if pretrained:
            kwargs = checked_weights(variant, kwargs)
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)


def default_cfgs_of(base_cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """timm's default configs, by architecture, of a family's `base_cfgs` and of its checkpoint folders."""
    return generate_default_cfgs(
        {key: cfg for variant, base in base_cfgs.items() for key, cfg in pretrained_cfgs(variant, base).items()}
    )

"""What every family of this package shares: building with checked weights, base configs, overrides, checks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs

from ..hub import check_state_dict, checked_weights, explain_load_errors, pretrained_cfgs

Cfg = TypeVar("Cfg")


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
        RuntimeError: weights that do not exist, cannot be downloaded, or are not those of their config.json.
        ValueError: out_indices of feature maps that the model has not.
    """
    _check_out_indices(variant, kwargs)
    if base_cfg and not pretrained and kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg
    with explain_load_errors(variant, kwargs):
        if pretrained:
            kwargs = checked_weights(variant, kwargs)
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)


def _check_out_indices(variant: str, kwargs: dict[str, Any]) -> None:
    known, asked = (kwargs.get("feature_cfg") or {}).get("out_indices"), kwargs.get("out_indices")
    if not kwargs.get("features_only") or not isinstance(known, tuple) or not isinstance(asked, list | tuple):
        return
    if max(asked, default=0) >= len(known):
        raise ValueError(
            f"{variant} has {len(known)} feature maps, with out_indices 0 to {len(known) - 1}, got {tuple(asked)}"
        )


def default_cfgs_of(base_cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """timm's default configs, by architecture, of a family's `base_cfgs` and of its checkpoint folders."""
    return generate_default_cfgs(
        {key: cfg for variant, base in base_cfgs.items() for key, cfg in pretrained_cfgs(variant, base).items()}
    )


def base_cfg(image_size: int, **kwargs: Any) -> dict[str, Any]:
    """What a model tells timm about its input: 1000 classes of ImageNet, its mean and standard deviation.

    Args:
        image_size: height and width in pixels.
        kwargs: further entries of a pretrained config, and those that differ.
    """
    cfg = dict(
        num_classes=1000,
        input_size=(3, image_size, image_size),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return {**cfg, **kwargs}


def paper_cfg(image_size: int, **kwargs: Any) -> dict[str, Any]:
    """`base_cfg` of the models of the HaloNet paper, with the names of their first convolution and classifier."""
    pool = -(-image_size // 32)
    return base_cfg(
        image_size,
        min_input_size=(3, 32, 32),
        pool_size=(pool, pool),
        crop_pct=0.95,
        license="apache-2.0",
        paper_ids="arXiv:2103.12731",
        paper_name="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        **kwargs,
    )


def override(
    cfg: Cfg,
    kwargs: dict[str, Any],
    model: str,
    also: Iterable[str] = (),
    per_stage: Iterable[str] = (),
    stages: int = 4,
) -> Cfg:
    """A variant with the fields that a caller names in place of its own.

    Args:
        cfg: a dataclass, the variant.
        kwargs: fields of it by name.
        model: the class that the caller makes, for messages.
        also: arguments of that class that are not fields, for messages.
        per_stage: fields with a number for each stage; a single number counts for all of them.
        stages: how many there are.

    Raises:
        TypeError: an argument that is not a field; the message lists the known ones.
    """
    known = [f.name for f in fields(cfg)]  # type: ignore[arg-type]
    if "output_stride" in kwargs and "output_stride" not in known:
        raise TypeError(
            f"{model} has one output stride, but output_stride={kwargs['output_stride']} was asked for (DeepLab does): "
            "halonet_*, seresnet*_halo* and uhalonet_* take it, and FPN, Unet and UPerNet take any backbone as it is"
        )
    unknown = ", ".join(repr(name) for name in sorted(set(kwargs) - set(known)))
    if unknown:
        raise TypeError(f"{model} has no argument {unknown}; it has {', '.join([*known, *also])}")
    kwargs = dict(kwargs)
    for name in per_stage:
        if name in kwargs:
            value = kwargs[name]
            kwargs[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * stages
    return replace(cfg, **kwargs)  # type: ignore[type-var]


@torch.fx.wrap
def check_images(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """x, if it is a batch of images; refuses before a convolution gives a less clear error.

    Raises:
        ValueError: another shape, or no image; with the shape.
    """
    if torch.jit.is_scripting():
        return x
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # would only become guards on sizes, or warnings
        return x
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images (batch, {in_chans}, height, width), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"empty batch of images: shape {tuple(x.shape)}")
    return x


class CheckedModel:
    """Put before a model's nn.Module: weights that are looked at before they are loaded, tables without decay."""

    no_decay: tuple[str, ...] = (".height_rel", ".width_rel")  # endings of names: the relative position tables

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must not reach, as timm asks for them."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.no_decay)}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. For the authors' names, see the family's `checkpoint_filter_fn`, where it has one.

        Raises:
            ValueError: the state dict is another model's, or holds NaN or infinity.
        """
        check_state_dict(state_dict, self.state_dict(), type(self).__name__)  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]

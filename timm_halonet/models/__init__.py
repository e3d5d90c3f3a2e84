"""Importing this package registers every model with timm."""

from timm.models import _registry


def _forget(name: str, module: str) -> None:
    """Take timm's own model of that name out of its registry, as if it had never been registered.

    timm has an untrained halonet_h1, with other widths and heads; registering over it would warn at every import. It
    stays importable as timm.models.byoanet.halonet_h1. (timm 1.0.27 and later could do this with a private function.)
    """
    if _registry._model_to_module.get(name) != module:
        return
    for entry in [*_registry._model_with_tags.pop(name, []), name]:
        _registry._model_pretrained_cfgs.pop(entry, None)
        _registry._model_has_pretrained.discard(entry)
    _registry._model_default_cfgs.pop(name, None)
    _registry._module_to_models[module].discard(name)
    del _registry._model_to_module[name], _registry._model_entrypoints[name]


_forget("halonet_h1", "byoanet")

from . import halonet  # noqa: E402
from .halonet import HaloNet  # noqa: E402

__all__ = ["HaloNet", "halonet"]

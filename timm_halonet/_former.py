"""Former names of modules: each has the names of the modules that took its place. To go with version 0.3.

Standard library only: every `import torch` runs this file.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# without "timm_halonet." in front; of two that have one name, the last counts
FORMER = {
    "attend": ("report.attention",),
    "converting": ("checkpoints.convert",),
    "inference": ("photos",),
    "layers.block_attention": ("families.block_unet.attention",),
    "layers.external_attention": ("families.eamlp.attention",),
    "layers.focal_attention": ("families.focal.attention",),
    "layers.lesa": ("families.lesa.attention",),
    "layers.map_attention": ("families.maast",),
    "models.eamlp": ("families.eamlp.checkpoint", "families.eamlp.eamlp"),
    "models.focal": ("families.focal.focal",),
    "models.focal_checkpoint": ("families.focal.checkpoint",),
    "models.lesa": ("families.lesa.checkpoint", "families.lesa.lesa"),
    "plotting": ("report.plots", "report.summary"),
    "publishing": ("checkpoints.publish", "checkpoints.verify"),
    "report.files": ("files",),
    "segmentation": ("families.block_unet.block_unet",),
}
_PACKAGE = __name__.rpartition(".")[0] + "."


class _Finder(MetaPathFinder, Loader):
    """The last finder: it is asked for what no other one finds."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = fullname.startswith(_PACKAGE) and fullname.removeprefix(_PACKAGE) in FORMER
        return ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        now = [_PACKAGE + name for name in FORMER[module.__name__.removeprefix(_PACKAGE)]]
        for name in now:
            found = vars(import_module(name))
            vars(module).update({key: value for key, value in found.items() if not key.startswith("__")})
        warnings.warn(f"{module.__name__} is now {' and '.join(now)}", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Makes the former names importable. Any number of times."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

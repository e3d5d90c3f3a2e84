"""How timm comes to know this package's models without anyone importing the package.

PyTorch calls `install` at the end of `import torch` (entry-point group `torch.backends`, by way of
`_timm_halonet_autoload.py`), and timm imports torch before `timm.models`. What is put on `sys.meta_path` there waits
for `timm.models`, imports `timm_halonet.registry` right after it has executed, and takes itself off. Standard library
only: every `import torch` runs this file.
"""

import sys
import threading
import warnings
from typing import Any


def install() -> None:
    """Register the models with timm, or wait until it is imported. Any number of times."""
    if hasattr(_thread, "registering"):
        return  # it is this that imports the package
    if "timm.models" in sys.modules and not _executing:
        _leave()
        _import_models()
    elif sys.meta_path[0] is not _finder:  # in front of finders that would not ask this one
        sys.meta_path = [_finder, *(finder for finder in sys.meta_path if finder is not _finder)]


def _leave() -> None:
    # a new list, since an import in another thread may be walking along the old one and would skip a finder
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]


def _import_models() -> None:
    # __import__, not importlib.import_module: of two threads that wait for each other's half-imported module, it lets
    # one go on with what there is, where import_module raises
    _thread.registering = True
    try:
        __import__("timm")  # another thread may be half-way through it
        __import__("timm_halonet.registry")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        message = f"timm_halonet's models are not in timm ({reason}); `import timm_halonet.registry` shows why"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    finally:
        del _thread.registering


class _Finder:
    """Wraps the loaders of `timm.models` and of this package's modules, as the other finders find them."""

    def find_spec(self, fullname, path=None, target=None):
        # a finder behind this one may start from the front again (wrapt's does): then this one has no answer
        if not (fullname == "timm.models" or fullname.startswith("timm_halonet.")) or hasattr(_thread, "asking"):
            return None
        _thread.asking = True
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            specs = (finder.find_spec(fullname, path, target) for finder in finders)
            spec: Any = next((spec for spec in specs if spec is not None), None)
        finally:
            del _thread.asking
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """The original loader in all but `exec_module`, which also registers the models if their time has come."""

    def __init__(self, original):
        self.original = original

    def __getattr__(self, name):
        return getattr(vars(self)["original"], name)

    def exec_module(self, module):
        # the original goes back first: what executes, and whoever looks at the module later, finds no wrapper
        for owner, attribute in ((module.__spec__, "loader"), (module, "__loader__")):
            if getattr(owner, attribute, None) is self:
                setattr(owner, attribute, self.original)
        _executing.append(module.__name__)
        try:
            self.original.exec_module(module)
        finally:
            _executing.remove(module.__name__)
        # A failed import does not get here, so the finder still waits for the next one. Nor is it time while a module
        # of this package is half-imported, whose own import of timm led here: the models may need the other half.
        if "timm.models" in sys.modules and not _executing:
            _leave()
            _import_models()


_finder = _Finder()
_thread = threading.local()
_executing: list[str] = []  # modules with a wrapped loader, of all threads: one may wait for another's import of timm

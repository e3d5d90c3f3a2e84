"""The entry point that PyTorch calls at the end of `import torch`, which fails where this fails: so it does not.

It is installed next to the package, not in it, also by an editable install, whose checkout may go. Standard library
only; what can fail is in `timm_halonet/_autoload.py`.
"""


def install():
    """Have the models registered as soon as timm is imported, unless TIMM_HALONET_AUTOLOAD is set to anything but 1."""
    try:
        _install()
    except (Exception, SystemExit) as error:
        _complain(error)


def _install():
    import os
    import sys

    if os.environ.get("TIMM_HALONET_AUTOLOAD", "1") != "1":
        return
    explicit = "timm_halonet" in sys.modules
    try:
        from timm_halonet import _autoload

        _autoload.install()
    finally:
        if not explicit:  # forgotten, so that an explicit import runs it, and registers whatever has come between
            sys.modules.pop("timm_halonet", None)


def _complain(error):
    try:
        reason = f"{type(error).__name__}: {error}"
        message = f"timm_halonet is broken, and timm goes without its models ({reason}); install it again or remove it"
        try:
            import warnings

            warnings.warn(message, RuntimeWarning, stacklevel=3)
        except Warning:  # an error by the user's wish, but not one of importing torch
            import sys

            print(message, file=sys.stderr)
    except Exception:
        pass

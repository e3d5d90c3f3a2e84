"""The environment variables that this package reads, one function each.

They are read anew at every call, and give defaults only: arguments and `timm_halonet.use_backend` outrank them. Nothing
in the package sets one. TIMM_HALONET_AUTOLOAD alone is read elsewhere, in _timm_halonet_autoload.py, which `import
torch` runs. docs/reference/environment.md lists them all.
"""

import os
from pathlib import Path


def backend() -> str | None:
    """TIMM_HALONET_BACKEND: the name of the backend of halo attention; None where it is not set or empty."""
    return os.environ.get("TIMM_HALONET_BACKEND") or None


def native_allowed() -> bool:
    """TIMM_HALONET_NATIVE: 0 turns the compiled kernel off."""
    return os.environ.get("TIMM_HALONET_NATIVE") != "0"


def onnx_scan_allowed() -> bool:
    """TIMM_HALONET_ONNX_SCAN: 0 keeps `Scan` out of ONNX files."""
    return os.environ.get("TIMM_HALONET_ONNX_SCAN") != "0"


def compiler() -> str | None:
    """CXX: the command line of the C++ compiler; None where it is not set or empty."""
    return os.environ.get("CXX") or None


def compiler_flags() -> str:
    """TIMM_HALONET_CXXFLAGS: the compiler's last arguments, as a shell would read them."""
    return os.environ.get("TIMM_HALONET_CXXFLAGS", "")


def cache_home() -> Path:
    """XDG_CACHE_HOME: the folder of all programs' caches, ~/.cache where it is not an absolute path.

    Raises:
        RuntimeError: it is not set, and there is no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def hub_organisation() -> str | None:
    """TIMM_HALONET_HUB_ORG: the organisation on the Hub that has the weights; None where it is not set or empty."""
    return os.environ.get("TIMM_HALONET_HUB_ORG") or None


def max_pixels() -> int | None:
    """TIMM_HALONET_MAX_PIXELS: the most pixels of an image; None where it is not set or empty.

    Raises:
        ValueError: it is not a whole number above 0.
    """
    text = os.environ.get("TIMM_HALONET_MAX_PIXELS")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"TIMM_HALONET_MAX_PIXELS is {text!r}, expected a number of pixels such as 200000000")
    return int(text)


def for_compilers(**more: str) -> dict[str, str]:
    """The whole environment for a compiler that is started, in English, with `more` in it."""
    return {**os.environ, "LC_ALL": "C", **more}


def triton_interpreted() -> bool:
    """TRITON_INTERPRET, which is Triton's: 1 makes it interpret kernels on the CPU, for debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def for_dry_run() -> dict[str, str]:
    """The whole environment for a process that walks a GPU's benchmark on the CPU: Triton interprets its kernels."""
    return {**os.environ, "TRITON_INTERPRET": "1"}


def world_size() -> int:
    """WORLD_SIZE, which torchrun sets next to RANK: the number of processes; 1 where RANK is not set."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """LOCAL_RANK, which torchrun sets: the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))

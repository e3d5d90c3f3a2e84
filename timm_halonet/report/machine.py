"""What measured figures depend on: the machine, the versions, the date."""

import contextlib
import datetime
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine(device: str, distributions: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on; `load` is the load average of the last minute, None where there is none.

    Of `distributions` the versions are in it too, where they are installed.
    """
    import torch

    from .. import __version__
    from ..ops import BACKENDS, backend_for

    versions = {"torch": torch.__version__, "timm_halonet": __version__, "python": platform.python_version()}
    for name in ("timm", "triton", *distributions):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    backends = {}
    for name in BACKENDS:
        try:
            backends[name] = backend_for(torch.empty(0, device=device), name)
        except ValueError as e:
            backends[name] = str(e)
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
        "backends": backends,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    """The processor, as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_line(machine: dict[str, Any]) -> str:
    """What `machine` returned, in one line to stand under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    load = machine.get("load")
    where = machine["name"] + (f", {machine['threads']} threads" if machine["device"] == "cpu" else "")
    return f"{where}; {versions}; {machine['date']}" + (
        "" if load is None else f"; load average {load:.1f} at the start"
    )

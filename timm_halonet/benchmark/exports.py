"""The exported files of `timm-halonet bench --deploy`: made once, kept in a folder, loaded for each measurement.

Exporting takes minutes and may be done while other programs run; what is timed then is only the loaded file. A file's
name ends with a digest of all that it depends on: model, engine, size, batch, opset, threads, processor, the versions
of the packages and the source of this one. So a folder never gives a file of something else. Next to each file is a
JSON file of its name, with the same facts in words, and the seconds that the export took or why it failed.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import whole_file
from ..report.machine import cpu_name
from .case import Failed, Skip
from .engines import Engine, export
from .measuring import reason_of

NOT_ENDED = "its export did not come to an end in an earlier try"


class Exports:
    """The models of a run and their files.

    Args:
        folder: for the files.
        size: height and width of images, pixels.
        opset: of ONNX, None for the exporter's choice.
        threads: of the CPU.
        tiny: whether torch.compile is left out.
        clock: of the seconds that exports take.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        opset: int | None,
        threads: int,
        tiny: bool,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.folder, self.size, self.opset, self.threads, self.tiny = folder, size, opset, threads, tiny
        self.clock = clock

    def images(self, batch: int) -> torch.Tensor:
        """(batch, 3, size, size) noise, always the same."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def model(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The model in evaluation mode with random weights, always the same."""
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

    def depends_on(self, engine: Engine, name: str, batch: int) -> dict[str, Any]:
        """All that the engine's file of this model depends on."""
        return {
            "model": name,
            "engine": engine.name,
            "size": self.size,
            "batch": None if engine.dynamic else batch,
            "opset": self.opset,
            "threads": self.threads,
            "tiny": self.tiny,
            "cpu": cpu_name(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": {x: _version(x) for x in ("torch", "timm", "timm_halonet", *engine.needs)},
            "source": source_digest(),
        }

    def place(self, engine: Engine, name: str, batch: int) -> tuple[Path, Path]:
        """Where the engine's file for this batch is, or would be; and its JSON file."""
        stem = f"{engine.name}-{name}" + ("" if engine.dynamic else f"-{batch}")
        facts = json.dumps(self.depends_on(engine, name, batch), sort_keys=True)
        stem = "".join(c if c.isalnum() else "-" for c in stem) + "-" + hashlib.sha256(facts.encode()).hexdigest()[:8]
        return self.folder / (stem + engine.suffix), self.folder / f"{stem}.json"

    def has(self, engine: Engine, name: str, batch: int) -> bool:
        """Whether the file is there; what is left of an export that failed is removed, so that it is tried again."""
        file, note = self.place(engine, name, batch)
        if file.exists() and "seconds" in _read(note):
            return True
        note.unlink(missing_ok=True)
        return False

    def file(self, engine: Engine, name: str, make: Callable[[], nn.Module], batch: int) -> tuple[Path, float]:
        """The engine's file for this batch and the seconds that its export took; exported where it is not there yet.

        Raises:
            case.Failed: it cannot be exported, now or in an earlier try of this run.
        """
        file, note = self.place(engine, name, batch)
        facts = self.depends_on(engine, name, batch)
        if not note.exists():
            _write(note, {"failed": NOT_ENDED, **facts})
            try:
                model = self.model(make)
                start = self.clock()
                export(engine, model, self.images(batch), file, self.opset)
                clock = "processor time" if self.clock is time.process_time else "wall clock"
                _write(note, {"seconds": self.clock() - start, "clock": clock, **facts})
            except Exception as e:
                _write(note, {"failed": f"cannot be exported: {reason_of(e)}", **facts})
        found = _read(note)
        if "seconds" not in found:
            raise Failed(found.get("failed", f"{note} cannot be read: remove it"))
        return file, found["seconds"]

    def loaded(self, engine: Engine, name: str, make: Callable[[], nn.Module], batch: int) -> Callable[[], Any]:
        """Loads the model into the engine and returns a call with images of this batch."""
        if engine.export is not None:
            source: Any = self.file(engine, name, make, batch)[0]
        elif engine.name != "eager" and self.tiny:
            raise Skip("left out of a dry run")
        else:
            source = self.model(make)
        run, images = engine.load(source, self.threads), self.images(batch)

        def step() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode():
                return (run(images),)

        return step


@cache
def source_digest() -> str:
    """Sixteen hex digits of what this package computes, since a version alone does not tell two states of it apart."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for room in ("ops", "layers", "models", "families"):
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _version(distribution: str) -> str | None:
    from .. import __version__

    if distribution == "timm_halonet":  # of a checkout, which may not be installed
        return __version__
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _write(note: Path, facts: dict[str, Any]) -> None:
    with whole_file(note) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _read(note: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}

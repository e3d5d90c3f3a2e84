"""One run of `timm-halonet embed`, from what is checked first to the file at the end."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import one_line
from ..photos import label_names
from . import pipeline
from .parts import Part, Parts, cut
from .sources import find_sources, printable


@dataclass
class Progress:
    """What a step of a run did: the number of photos, and the errors of those that cannot be read."""

    photos: int
    errors: list[str]


class Job:
    """Features of photos or shards, written to one Parquet file; what is done already is not done again.

    First the steps of `run()`, within `pipeline.session()`, then `finish()`.

    Args:
        paths: photos, folders, or shards (.tar, as webdataset has them); also URIs such as s3://bucket/photos.
        out: the file; finished parts are kept in the folder OUT.parts until it is there.
        model: a model of timm with its weights, in evaluation mode.
        output: "features" or "probabilities".
        batch_size: photos at a time in the model.
        part_size: photos saved together. A shard is always a part.
        workers: processes that hold the model at most (default: the GPUs, or the cores but one).
        device: "auto" for cuda where the cluster has GPUs, else cpu; or a name.
        force: replace `out` if it exists.

    Raises:
        ValueError: arguments that cannot be used, a model that gives no vectors, or parts of another run.
        RuntimeError: Ray is not installed.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        out: str | os.PathLike[str],
        model: nn.Module,
        *,
        output: str = "features",
        batch_size: int = 32,
        part_size: int = 4096,
        workers: int | None = None,
        device: str = "auto",
        force: bool = False,
    ) -> None:
        pipeline.check_ray()
        import pyarrow as pa
        from timm.data import resolve_data_config

        if output not in pipeline.OUTPUTS:
            raise ValueError(f"output is {output!r}, expected one of {', '.join(pipeline.OUTPUTS)}")
        if batch_size < 1 or part_size < 1:
            raise ValueError(f"need batch_size >= 1 and part_size >= 1, got {batch_size=}, {part_size=}")
        if workers is not None and workers < 1:
            raise ValueError(f"need workers >= 1, got {workers}")
        try:
            torch.device("cpu" if device == "auto" else device)
        except RuntimeError as e:
            raise ValueError(f"unknown device {device!r}: {str(e).splitlines()[0]}") from None
        self.workers, self.device = workers, device
        self.out = Path(out)
        self.skipped = Path(f"{out}.skipped.csv")
        if self.out.suffix != ".parquet":
            raise ValueError(f"the features are written as Parquet: --out must end with .parquet, got {out}")
        if self.out.exists() and not force:
            raise ValueError(f"{out} exists; --force replaces it")
        if not self.out.parent.is_dir():
            raise ValueError(f"cannot write {out}: there is no folder {self.out.parent}")
        folder = Path(f"{out}.parts")
        sources, self.shards = find_sources(paths, [str(self.out), str(self.skipped), str(folder)])
        self.model, self.output, self.batch_size = model.eval(), output, batch_size
        self.data = resolve_data_config(model=model)
        self.tag = model_tag(model)
        with torch.inference_mode():
            width = pipeline.vectors(model, torch.zeros(1, *self.data["input_size"]), output).shape[1]
        fields = [("path", pa.string()), ("label", pa.string()), ("model", pa.string())]
        fields += [(output, pa.list_(pa.float32(), width))]
        self.names = label_names(model) if output == "probabilities" else []
        if self.names:
            fields += [("prediction", pa.string())]
        metadata = {"label_names": json.dumps(self.names)} if self.names else None
        settings = {
            "model": self.tag,
            "weights": weights_digest(model),
            "output": output,
            "data": json.loads(json.dumps(self.data)),
        }
        self.parts = cut(sources, 1 if self.shards else part_size)
        self.store = Parts(folder, pa.schema([*fields, ("error", pa.string())], metadata=metadata), settings)
        self.todo = [part for part in self.parts if not self.store.is_done(part)]

    @property
    def total(self) -> int:
        """The number of photos, or of shards."""
        return sum(len(part.sources) for part in self.parts)

    @property
    def kept(self) -> int:
        """The number of photos, or of shards, that an earlier run has done."""
        return self.total - sum(len(part.sources) for part in self.todo)

    def run(self, resources: dict[str, float]) -> Iterator[Progress]:
        """Does what is left, and saves each part as soon as it is complete.

        Args:
            resources: what `pipeline.session` gave.

        Raises:
            ValueError: a device that the cluster does not have.
            RuntimeError: Ray could not go on; what is saved stays.
            OSError: a part cannot be written.
        """
        if not self.todo:
            return
        device = self.device
        if device == "auto":
            device = "cuda" if resources.get("GPU") else "cpu"
        if device.startswith("cuda") and not resources.get("GPU") and not self.workers:
            raise ValueError(f"--device {device}: Ray sees no GPU; where some will join later, --workers says how many")
        sources = [source for part in self.todo for source in part.sources]
        owner = [n for n, part in enumerate(self.todo) for _ in part.sources]
        rows = pipeline.run(
            sources,
            self.shards,
            self.model,
            self.data,
            self.output,
            batch_size=self.batch_size,
            workers=self.workers,
            device=device,
            resources=resources,
        )
        current, columns = 0, self._columns()
        for batch in rows:
            errors = []
            for number, name, label, error, values in zip(
                *(batch[key] for key in ("source", "name", "label", "error", "values")), strict=True
            ):
                while current < owner[number]:
                    self._save(self.todo[current], columns)
                    current, columns = current + 1, self._columns()
                source = sources[number]
                path = printable(f"{source.path}/{name}" if name else source.path)
                columns["path"].append(path)
                columns["label"].append(label or source.label)
                columns["model"].append(self.tag)
                columns[self.output].append(values)
                columns["error"].append(error or None)
                if self.names:
                    columns["prediction"].append(self.names[int(values.argmax())])
                errors += [f"{one_line(path)}: {error}"] if error else []
            yield Progress(len(batch["source"]), errors)
        for part in self.todo[current:]:  # shards without photos are parts without rows
            self._save(part, columns)
            columns = self._columns()
        self.todo = []

    def _columns(self) -> dict[str, list[Any]]:
        return {name: [] for name in self.store.schema.names}

    def _save(self, part: Part, columns: dict[str, list[Any]]) -> None:
        if not self.shards and len(columns["path"]) != len(part.sources):
            raise RuntimeError(f"part {part.number} has {len(columns['path'])} rows of {len(part.sources)}: not saved")
        self.store.write(part, columns)

    def finish(self) -> tuple[int, int]:
        """Joins the parts into `out`, and lists the files that could not be read in OUT.skipped.csv.

        Returns:
            The numbers of rows in `out` and in that list.

        Raises:
            RuntimeError: `run` has not done everything.
        """
        if self.todo:
            raise RuntimeError(f"{len(self.todo)} of {len(self.parts)} parts are missing")
        return self.store.join(self.parts, self.out, self.skipped)


def model_tag(model: nn.Module) -> str:
    """architecture.tag, or the class's name where a model does not know them."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(model).__name__
    return f"{name}.{cfg['tag']}" if cfg.get("tag") else name


def weights_digest(model: nn.Module) -> str:
    """The first half of a SHA-256 of names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]

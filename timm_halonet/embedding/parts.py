"""The finished parts of a run, each a Parquet file, from which an interrupted run goes on."""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import make_folder, whole_file
from .sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = b"timm_halonet"  # of the metadata


@dataclass(frozen=True)
class Part:
    """A run of sources, saved together."""

    number: int
    sources: Sequence[Source]

    @property
    def digest(self) -> str:
        """Changes when a file is added, removed, renamed or changed."""
        rows = [[os.fsencode(s.path).hex(), s.label, s.size, s.changed] for s in self.sources]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def cut(sources: Sequence[Source], size: int) -> list[Part]:
    """Sources as parts of `size`; the last one has the rest."""
    return [Part(n, sources[start : start + size]) for n, start in enumerate(range(0, len(sources), size))]


class Parts:
    """The folder of the parts.

    Args:
        folder: made when the first part is written.
        schema: of the rows: path, label, model, the values, error; the last one is null for good rows.
        settings: what the values depend on, apart from the photos.
    """

    def __init__(self, folder: Path, schema: "pa.Schema", settings: dict[str, Any]) -> None:
        self.folder, self.schema, self.settings = folder, schema, settings

    def _path(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:06d}.parquet"

    def is_done(self, part: Part) -> bool:
        """Whether the part is there, whole, and of these very sources.

        Raises:
            ValueError: it was made with other settings: it is kept, and the run must not go on.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = json.loads((pq.read_schema(self._path(part)).metadata or {})[_KEY])
            settings, digest = metadata["settings"], metadata["digest"]
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):  # missing, damaged or not ours
            return False
        if settings != self.settings:
            differing = [
                f"{name} {settings.get(name)!r}, now {value!r}"
                for name, value in self.settings.items()
                if settings.get(name) != value
            ]
            raise ValueError(
                f"{self.folder} has finished parts of another run ({'; '.join(differing)}): give the same arguments, "
                "another --out, or remove that folder"
            )
        return digest == part.digest

    def write(self, part: Part, columns: dict[str, Any]) -> None:
        """Save a part, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        metadata = json.dumps({"settings": self.settings, "digest": part.digest})
        schema = self.schema.with_metadata({**(self.schema.metadata or {}), _KEY: metadata})
        table = pa.table(columns, schema=schema)
        make_folder(self.folder)
        with whole_file(self._path(part)) as temporary:
            pq.write_table(table, temporary)

    def join(self, parts: Sequence[Part], out: Path, skipped: Path) -> tuple[int, int]:
        """Write the good rows of all parts to `out`, in order, and the others to `skipped`; then remove the parts.

        Returns:
            The numbers of good and of skipped rows. Without skipped rows there is no such file.

        Raises:
            OSError: it cannot be written; the parts stay.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        good, bad = 0, io.StringIO()
        lines = csv.writer(bad, lineterminator="\n")
        lines.writerow(["path", "error"])
        failed = 0
        schema = self.schema.remove(self.schema.get_field_index("error"))
        with whole_file(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for part in parts:
                table = pq.read_table(self._path(part))
                is_good = pc.is_null(table["error"])
                rows = table.filter(pc.invert(is_good)).select(["path", "error"]).to_pylist()
                lines.writerows([row["path"], row["error"]] for row in rows)
                failed += len(rows)
                kept = table.filter(is_good).drop_columns(["error"])
                good += kept.num_rows
                writer.write_table(kept.replace_schema_metadata(schema.metadata))
        if failed:
            with whole_file(skipped) as temporary:
                temporary.write_text(bad.getvalue(), encoding="utf-8")
        else:
            skipped.unlink(missing_ok=True)
        self._remove()
        return good, failed

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # the result is there; what cannot be removed is only in the way
            for path in self.folder.glob("part-*.parquet"):
                path.unlink()
            self.folder.rmdir()

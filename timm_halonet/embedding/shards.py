"""Shards of photos: tars as webdataset has them, where the files of a sample follow each other and share a name."""

import contextlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..files import MAX_FILE_BYTES
from .sources import is_uri

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # 0001.seg.png: sample 0001, kind seg.png


@dataclass
class Sample:
    """The files of a sample by their kind, which is what follows the first dot of the name: "jpg", "cls", "json"."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its photo within the shard; without a photo the key."""
        kind = self._photo()
        return f"{self.key}.{kind}" if kind else self.key

    def image(self) -> bytes:
        """The file of its photo.

        Raises:
            ValueError: it has none.
        """
        kind = self._photo()
        if kind is None:
            raise ValueError(f"no photo among the sample's files ({', '.join(self.files)})")
        return self.files[kind]

    def label(self) -> str:
        """What its .cls file says, else "label" in its .json; else empty."""
        if "cls" in self.files:
            return self.files["cls"].decode("utf-8", "replace").strip()
        with contextlib.suppress(ValueError):  # no JSON: no label
            content = json.loads(self.files.get("json", b"null"))
            if isinstance(content, dict):
                return str(content.get("label", ""))
        return ""

    def _photo(self) -> str | None:
        from PIL import Image

        kinds = Image.registered_extensions()
        return next((kind for kind in self.files if f".{kind.rpartition('.')[2].lower()}" in kinds), None)


def read_samples(place: str) -> Iterator[Sample]:
    """The samples of a tar, plain or compressed, in their order.

    Args:
        place: a path, or a URI that pyarrow knows.

    Raises:
        OSError, ValueError, tarfile.TarError, EOFError, zlib.error: it cannot be read, from here on.
    """
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(place) if is_uri(place) else (fs.LocalFileSystem(), place)
    sample: Sample | None = None
    with system.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            found = _NAME.fullmatch(member.name)
            if not member.isreg() or found is None:
                continue
            if member.size > MAX_FILE_BYTES:
                raise ValueError(f"{member.name} has {member.size} bytes, more than {MAX_FILE_BYTES}")
            content = tar.extractfile(member)
            assert content is not None  # a regular file
            if sample is None or sample.key != found[1]:
                if sample is not None:
                    yield sample
                sample = Sample(found[1])
            sample.files[found[2].lower()] = content.read()
    if sample is not None:
        yield sample

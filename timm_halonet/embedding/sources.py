"""The photos or shards to embed, in their order."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from ..files import one_line
from ..photos import find_photos

SHARD = ".tar"


@dataclass(frozen=True)
class Source:
    """A photo, or a shard: a tar of photos as webdataset has them.

    `label` is the name of the folder that holds the photo, None for the folder that was given itself. `size` in bytes
    and `changed` in nanoseconds say whether the file is still the one that was read.
    """

    path: str  # as it was given, or a URI such as s3://bucket/photo.jpg
    label: str | None
    size: int
    changed: int

    @property
    def place(self) -> str:
        """The absolute path, or the URI: it means the same in every process."""
        return self.path if is_uri(self.path) else os.path.abspath(self.path)


def is_uri(path: str) -> bool:
    """Whether a path names a file of another file system, such as s3://bucket/photo.jpg."""
    return "://" in path


def find_sources(paths: Iterable[str | os.PathLike[str]], ignored: Iterable[str] = ()) -> tuple[list[Source], bool]:
    """The files named, and every file below the folders named, in order; and whether they are shards.

    Args:
        ignored: files and folders that are left out, with all that is in them.

    Raises:
        ValueError: a path that does not exist, a folder without files, or photos and shards together.
        OSError: a place that cannot be read.
    """
    found: list[Source] = []
    for path in paths:
        text = os.fspath(path)
        found += _find_remote(text) if is_uri(text) else _find_local(text)
    left_out = tuple(os.path.abspath(path) for path in ignored)
    found = [s for s in found if not any(s.place == x or s.place.startswith(x + os.sep) for x in left_out)]
    shards = [s for s in found if s.path.lower().endswith(SHARD)]
    if shards and len(shards) < len(found):
        other = next(s for s in found if s not in shards)
        raise ValueError(
            f"{one_line(shards[0].path)} is a shard and {one_line(other.path)} is not; give photos or shards, not both"
        )
    if not found:
        raise ValueError("there are no photos to embed")
    return found, bool(shards)


def _find_local(given: str) -> list[Source]:
    sources = []
    for file in find_photos([given]):
        status = os.stat(file)
        above = PurePath(os.path.relpath(file, given)).parent.name if os.path.isdir(given) else ""
        sources.append(Source(file, _text(above), status.st_size, status.st_mtime_ns))
    return sources


def _find_remote(given: str) -> list[Source]:
    from pyarrow import fs

    system, start = fs.FileSystem.from_uri(given)
    info = system.get_file_info(start)
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"{given} does not exist")
    if info.is_file:
        return [Source(given, None, info.size or 0, info.mtime_ns or 0)]
    start = start.rstrip("/")
    sources = []
    for file in system.get_file_info(fs.FileSelector(start, recursive=True)):
        inside = file.path[len(start) :].lstrip("/")
        if file.is_file and not PurePosixPath(inside).name.startswith("."):
            path, label = f"{given.rstrip('/')}/{inside}", _text(PurePosixPath(inside).parent.name)
            sources.append(Source(path, label, file.size or 0, file.mtime_ns or 0))
    if not sources:
        raise ValueError(f"no files in the folder {given}")
    return sorted(sources, key=lambda source: PurePosixPath(source.path))


def _text(name: str) -> str | None:
    return printable(name) or None


def printable(name: str) -> str:
    """A file's name as text that UTF-8 can hold: bytes that are not UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")

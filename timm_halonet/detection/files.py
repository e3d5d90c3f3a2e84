"""Files by name, in a folder or in a tar as it is."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ..files import MAX_FILE_BYTES, open_file
from ..files import whole_file as whole_file  # under its earlier path too

EVALUATION_NAME = "evaluation.json"  # of a run: its scores


class Files:
    """The files below a folder, by their path from there with forward slashes.

    Links are followed, but never back into a folder that they lie in; behind a link, each folder is listed once.
    """

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """The names of all files, in order."""
        real = os.path.realpath(self.path)
        return sorted(self._below(self.path, "", [real], {real}, False))

    def _below(
        self, folder: str | os.PathLike[str], prefix: str, above: list[str], listed: set[str], behind_link: bool
    ) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not os.path.isdir(entry.path):
                yield prefix + entry.name
                continue
            real = os.path.realpath(entry.path)
            if real in above or (behind_link and real in listed):
                continue
            listed.add(real)
            linked = behind_link or entry.is_symlink()
            yield from self._below(entry.path, f"{prefix}{entry.name}/", [*above, real], listed, linked)

    def find(self, name: str) -> str | None:
        """The name, for `read`, of the file that a path means; None if there is none.

        The path may be absolute or start from this folder, with forward slashes or with Windows' backslashes.
        """
        for given in dict.fromkeys((name, name.replace("\\", "/"))):
            # the last: from behind a link, ".." is taken as written
            for candidate in (posixpath.normpath(given), given, os.path.abspath(self.path / given)):
                if os.path.isfile(self.path / candidate):
                    return candidate
        return None

    def why_not(self, name: str) -> str:
        """Why `find` has nothing for a path, as the end of a message: "does not exist"."""
        try:
            os.stat(self.path / name)
        except FileNotFoundError:
            return "does not exist"
        except (OSError, ValueError) as e:
            return f"cannot be read ({getattr(e, 'strerror', None) or e})"
        return "is not a regular file"

    def open(self, name: str) -> BinaryIO:
        """A file opened for reading, by its name.

        Raises:
            ValueError: not a regular file, or one of more than a gigabyte; with its name.
            OSError: it cannot be opened.
        """
        return open_file(self.path / name)

    def read(self, name: str) -> bytes:
        """The content of a file, by its name.

        Raises:
            ValueError, OSError: as `open`.
        """
        with self.open(name) as file:
            return file.read(MAX_FILE_BYTES)

    def where(self, name: str) -> str:
        """Where a file lies, for messages."""
        return str(self.path / name)


class TarFiles(Files):
    """The files in an uncompressed tar, which is read in place."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_file(path, limit=2**63) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = [member for member in tar.getmembers() if member.isfile()]
        except (tarfile.TarError, OSError) as e:
            raise ValueError(f"{path} is not an uncompressed tar ({e}); unpack it and name the folder") from None
        self.places = {m.name.removeprefix("./"): (m.offset_data, m.size, m.issparse()) for m in members}

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.places)

    def find(self, name: str) -> str | None:
        inside = posixpath.normpath(name.replace("\\", "/"))
        return next((n for n in (name, inside) if n in self.places), None)

    def why_not(self, name: str) -> str:
        return "does not exist"

    def open(self, name: str) -> BinaryIO:
        offset, size, sparse = self.places[name]
        if sparse:
            raise ValueError(f"{self.where(name)}: stored with holes (sparse); unpack the tar and name the folder")
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{self.where(name)}: {size} bytes, more than the {MAX_FILE_BYTES} that are read of one file"
            )
        with open(self.path, "rb") as f:  # a handle of its own: workers share nothing
            f.seek(offset)
            data = f.read(size)
        if len(data) != size:
            raise ValueError(f"{self.where(name)}: the tar ends after {len(data)} of {size} bytes")
        return io.BytesIO(data)

    def where(self, name: str) -> str:
        return f"{self.path}:{name}"


def open_files(path: str | os.PathLike[str]) -> Files:
    """The files of a folder or of a tar.

    Raises:
        ValueError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        return Files(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix.lower() == ".json":
        raise ValueError(
            f"{path} is a file, not a folder: --annotations names a JSON, --images the folder of its images"
        )
    return TarFiles(path)

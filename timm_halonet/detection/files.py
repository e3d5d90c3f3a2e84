"""Files by name, in a folder or in a tar as it is."""

import os
import tarfile
from pathlib import Path

EVALUATION_NAME = "evaluation.json"  # of a run: its scores


class Files:
    """The files below a folder, by their path from there with forward slashes."""

    def __init__(self, path: Path):
        self.path = path
        found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        self.names = sorted(file.relative_to(path).as_posix() for file in found)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def where(self, name: str) -> str:
        """For messages."""
        return str(self.path / name)


class TarFiles(Files):
    """The files in an uncompressed tar, which is read in place."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar.getmembers() if member.isfile()]
        except (tarfile.TarError, OSError) as e:
            raise ValueError(f"{path} is no uncompressed tar ({e}); unpack it and name the folder") from None
        self.places = {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}
        self.names = sorted(self.places)

    def read(self, name: str) -> bytes:
        offset, size = self.places[name]
        with open(self.path, "rb") as f:  # a handle of its own: workers share nothing
            f.seek(offset)
            data = f.read(size)
        if len(data) != size:
            raise OSError(f"the tar ends after {len(data)} of {size} bytes")
        return data

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
    return TarFiles(path)

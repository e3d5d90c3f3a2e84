"""Files that are read within limits, and written whole or not at all. Standard library only."""

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

MAX_FILE_BYTES = 2**30  # of one image
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")
_NAME_BYTES = 255  # what file systems allow
_PROBE = 1 << 20  # bytes


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well: all of the file or what was there before.

    What a killed process left of the same file is removed first.

    Args:
        path: of the file; its folder exists.
        mode: who may read and write it, less what the umask takes away; 0o600 for the user alone.

    Raises:
        OSError: it cannot be written; with the path and the reason, also where a library hides a full disk.
    """
    given, path = os.fspath(path), Path(path)
    temporary, handle = None, -1
    try:
        remove_leftovers(path)
        handle, temporary = _open_locked(path)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, mode & ~mask)
        os.replace(temporary, path)
    except Exception as e:
        reason = None
        if getattr(e, "errno", None) is None and temporary is not None:  # a library's own words
            reason = _named(e) or _full(temporary)
        if reason is None and not isinstance(e, OSError):
            raise
        first = str(e).partition("\n")[0]
        raise OSError(f"cannot write {given}: {reason or getattr(e, 'strerror', None) or first}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, and those above it, made where they do not exist.

    Raises:
        OSError: it cannot be made; with the path and the reason.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        reason = "there is a file of that name" if isinstance(e, FileExistsError) else e.strerror or e
        raise OSError(f"cannot make the folder {os.fspath(path)}: {reason}") from None
    return Path(path)


def remove_leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Removes temporary files of `path` whose writer was killed; those of a living writer are locked and stay.

    Returns:
        The files that were removed.
    """
    path = Path(path)
    prefix, suffix = _affixes(path)
    ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(suffix))
    removed: list[Path] = []
    if fcntl is None or not path.parent.is_dir():
        return removed
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for name in names:
        with suppress(OSError):  # locked, gone, or not ours to remove
            handle = os.open(path.parent / name, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (path.parent / name).unlink()
                removed.append(path.parent / name)
            finally:
                os.close(handle)
    return removed


def _open_locked(path: Path) -> tuple[int, Path]:
    """A new temporary file next to `path`, and a handle that holds its lock (-1 where there are no locks)."""
    prefix, suffix = _affixes(path)
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        if fcntl is None:
            os.close(handle)  # Windows does not replace files that are open
            return -1, Path(name)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


def _affixes(path: Path) -> tuple[str, str]:
    """What the names of the temporary files of `path` begin and end with."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= 20 else ""
    return f".{cut_name(path.name, _NAME_BYTES - len(os.fsencode(suffix)) - 14)}.tmp-", suffix


def cut_name(name: str, limit: int) -> str:
    """As much of the beginning of a file name as fits into `limit` bytes."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


def _named(error: Exception) -> str | None:
    """The system's reason, where a library's message has it in it."""
    reasons = (os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))
    return next((reason for reason in reasons if reason.lower() in str(error).lower()), None)


def _full(temporary: Path) -> str | None:
    """Why nothing more can be written to a file: a full disk, a quota, a limit. None if more can be written."""
    try:
        with open(temporary, "ab") as f:
            f.write(bytes(_PROBE))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        return e.strerror or str(e)
    return None


def json_text(content: Any, encoding: str = "utf-8", **kwargs: Any) -> str:
    """JSON that `encoding` can hold: letters as they are, or escaped where one of them would not fit. A file name that
    is not UTF-8 comes back as it was.
    """
    text = json.dumps(content, ensure_ascii=False, **kwargs)
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return json.dumps(content, **kwargs)
    return text


def open_file(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> BinaryIO:
    """A file opened for reading, if it is a regular one of at most `limit` bytes.

    Raises:
        ValueError: a folder, pipe, socket or device, which may never end; or a larger file. With the path.
        OSError: it cannot be opened.
    """
    status = os.stat(path)  # before it is opened: that alone waits at a pipe
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)}: not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{os.fspath(path)}: {status.st_size} bytes, more than the {limit} that are read of one file")
    return open(path, "rb")


def one_line(text: str) -> str:
    """A file's name for a message or a list: line breaks and other control characters are written as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_file(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        ValueError, OSError: as `open_file`.
    """
    with open_file(path, limit) as file:
        return file.read(limit)  # files of /proc have no size

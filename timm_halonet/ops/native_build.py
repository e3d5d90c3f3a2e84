"""Compiles the C++ kernel on first use, keeps the library, and loads only what it can trust. Standard library only.

A library is kept in `$XDG_CACHE_HOME/timm_halonet` (or ~/.cache/timm_halonet), named by a hash of all that it depends
on, with its size and SHA-256 in a file next to it. What does not agree with these is built again, never loaded.

As ssh does it, folder and files must belong to the user or to root, be writable by nobody else, and not be links. This
folder may not qualify, not be writable or not let its files be executed. Then a folder in the temporary directory
serves all processes of the user; the process that filled it empties it when it ends.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from .. import environment
from ..files import whole_file

try:
    import fcntl
except ImportError:  # Windows: processes that start at the same time each compile
    fcntl = None  # type: ignore[assignment]

_SOURCE = Path(__file__).with_name("native.cpp")
# Not -ffast-math: NaN must stay NaN, and the exponential rounds by adding and subtracting a large number.
_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w"]
# Flags that some compilers do not know, the best first: compilers of ARM machines have -mcpu=native, older ones no
# -march=native; Apple's clang has no OpenMP, and Linux's may lack its library.
_ARCH: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
_OPENMP: tuple[list[str], ...] = (["-fopenmp"], [])
# What a compiler or linker (in English) says of a flag that it does not know, in one line
_UNKNOWN = r"(?i)unrecognized|unknown|unsupported|not support|bad value|invalid|cannot find|unable to find|no such file"
_NAMED = {"-march=native": "march", "-mcpu=native": "mcpu", "-fopenmp": r"openmp|[lg]omp\b"}
_PROBE = "int probe(int n) {\n#pragma omp parallel for\nfor (int i = 0; i < n; i++) {}\nreturn n; }\n"
_TIME_LIMIT = 180  # seconds: for the compiler, and for another process's compiler
_NAME = "timm_halonet"  # of the cache's folder
_warned: set[str] = set()
_CURE = (
    "The next backend computes the same, slower; docs/backends/performance.md says by how much. Install g++ or clang, "
    "or set TIMM_HALONET_NATIVE=0 to silence this."
)


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none; tried once a process."""
    try:
        return _load()
    except Exception as error:  # a reason, whatever it was: there are other backends
        kind = "" if isinstance(error, (OSError, RuntimeError)) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split())  # one line, where compilers write many


def announce(reason: str) -> None:
    """Warn, once a process, that the kernel is missing: what is lost and what helps."""
    _warn_once(f"halo attention runs without its compiled CPU kernel ({reason}). {_CURE}")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)  # first: a warning may be an exception
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed
        if sys.stderr is not None:
            print(f"timm_halonet: {message}", file=sys.stderr, flush=True)


def _load() -> ctypes.CDLL:
    named = environment.compiler()
    names = [named] if named else ["g++", "c++", "clang++"]
    commands = [_words("CXX", name) for name in names]
    compiler = next((words for words in commands if words and shutil.which(words[0])), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler found, looked for {', '.join(names)}")
    extra = _words("TIMM_HALONET_CXXFLAGS", environment.compiler_flags())
    version = _run([*compiler, "--version"]).stdout
    sources = b"".join(path.read_bytes() for path in [_SOURCE, *sorted(_SOURCE.parent.glob("native*.h"))])

    def name(flags: list[str]) -> str:
        parts = [sources, shlex.join(compiler + flags).encode(), version.encode(), _cpu()]
        return f"halo_{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:24]}.so"

    folders = list(_folders())
    choices = [(arch + openmp, arch + _FLAGS + openmp + extra) for arch, openmp in itertools.product(_ARCH, _OPENMP)]
    kept = _find(folders, name(choices[0][1]))
    if kept is not None:
        return kept
    with _lock(folders):
        for optional, flags in choices:
            kept = _find(folders, name(flags))  # another process may have been faster
            if kept is not None:
                return kept
            if _knows(compiler, flags, optional):
                return _keep(folders, name(flags), _compile(compiler, flags))
    raise AssertionError("the last choice has no optional flags")


def _words(variable: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RuntimeError(f"{variable} is {text!r}: {error}") from None


def _cpu() -> bytes:
    """What -march=native depends on, so that a home directory shared by different machines is safe."""
    text = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.lower().startswith(("flags", "features", "model name"))}))
    except OSError:
        text += platform.processor() + platform.node()
    return text.encode()


# Compiling


def _run(command: list[str], limit: float = 30, **variables: str) -> subprocess.CompletedProcess:
    """Run a compiler; it and all that it has started are gone afterwards, whatever happens."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, umask=0o077, env=environment.for_compilers(**variables),
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{shlex.join(command)} did not finish in {limit:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, 9) if hasattr(os, "killpg") else process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _build(compiler: list[str], flags: list[str], source: Path, folder: str) -> tuple[Path, str]:
    """The library's path, and empty or the compiler's message."""
    path = Path(folder, "library")
    command = [*compiler, *flags, "-o", str(path), str(source)]
    done = _run(command, _TIME_LIMIT, TMPDIR=folder)  # what a killed compiler leaves there goes too
    if done.returncode == 0 and path.is_file() and path.stat().st_size:
        return path, ""
    return path, f"{shlex.join(command)} returned {done.returncode}: {done.stderr.strip()[:500]}"


def _knows(compiler: list[str], flags: list[str], optional: list[str]) -> bool:
    """Whether the compiler knows the optional flags: False only where it says that it does not know one of them.

    Raises:
        RuntimeError: it failed for another reason (killed, disk full, no compiler): other flags are not the answer.
    """
    with tempfile.TemporaryDirectory(prefix=f"{_NAME}_", ignore_cleanup_errors=True) as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROBE)
        _, message = _build(compiler, flags, source, folder)
    complaints = [line for line in message.partition(" returned ")[2].splitlines() if re.search(_UNKNOWN, line)]
    if message and not any(re.search(_NAMED[flag], line) for flag in optional for line in complaints):
        raise RuntimeError(message)
    return not message


def _compile(compiler: list[str], flags: list[str]) -> bytes:
    """The library."""
    _say(f"compiling the CPU kernel, once, with {compiler[0]} (some seconds, at most {_TIME_LIMIT}) ...")
    with tempfile.TemporaryDirectory(prefix=f"{_NAME}_", ignore_cleanup_errors=True) as folder:
        path, message = _build(compiler, flags, _SOURCE, folder)
        if message:
            raise RuntimeError(message)
        return _read(path)  # still the user's own, in whatever temporary directory


# Keeping


def _folders() -> Iterator[Path]:
    """Where libraries may lie, the best first; they need not exist. One that cannot be trusted is left out, aloud."""
    with contextlib.suppress(RuntimeError):  # no home directory
        cache = environment.cache_home() / _NAME
        fault = _fault(cache)
        if not fault:
            yield cache
        else:
            _warn_once(f"timm_halonet keeps its compiled CPU kernel in the temporary directory only: {fault}")
    with contextlib.suppress(OSError):  # no temporary directory
        shared = Path(tempfile.gettempdir(), f"{_NAME}-{os.geteuid() if hasattr(os, 'geteuid') else 'user'}")
        if not _fault(shared):
            yield shared


def _fault(folder: Path) -> str:
    """Empty, or why others could put something into this folder. What does not exist yet has no fault."""
    for path, is_parent in ((folder.parent, True), (folder, False)):
        try:
            status = path.stat() if is_parent else path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error)
        if is_parent:  # where everybody may rename everything; a sticky one, such as /tmp, is safe
            if hasattr(os, "geteuid") and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                return f"{path} is writable by everybody (chmod o-w helps)"
        elif not stat.S_ISDIR(status.st_mode):
            return f"{path} is a link or a file (a folder is expected)"
        elif _foreign(status):
            return f"{path} {_foreign(status)} (its owner can mend it with chmod 700, or remove it)"
    return ""


def _foreign(status: os.stat_result) -> str:
    """Empty, or who else could have written it."""
    if not hasattr(os, "geteuid"):  # Windows: other rights, which tempfile and the home directory take care of
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"is writable by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _make(folder: Path) -> None:
    """Make it, and the parents that do not exist, for the user alone."""
    for path in [*reversed(folder.parents), folder]:
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):  # by another process
                path.mkdir(mode=0o700)
    fault = _fault(folder)
    if fault:
        raise PermissionError(fault)


@contextlib.contextmanager
def _lock(folders: list[Path]) -> Iterator[None]:
    """One process at a time, in the first folder that can be written. The system frees a lock whose owner dies."""
    handle = None
    for folder in folders if fcntl is not None else ():
        with contextlib.suppress(OSError):
            _make(folder)
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            break
    try:
        if handle is not None:
            _acquire(handle)
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile shares the handle
            os.close(handle)


def _acquire(handle: int) -> None:
    """Wait for the lock, but not for ever: without it the worst is that two processes compile."""
    end = time.monotonic() + _TIME_LIMIT
    waiting = False
    while time.monotonic() < end:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                _say("another process compiles the CPU kernel; waiting for it ...")
            waiting = True
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return None


def _find(folders: list[Path], name: str) -> ctypes.CDLL | None:
    """The kept library, loaded; None where no library can be trusted and executed."""
    for folder in folders:
        with contextlib.suppress(OSError):
            return _load_verified(folder, name)
    return None


def _load_verified(folder: Path, name: str) -> ctypes.CDLL:
    """Load the very bytes that were verified.

    Raises:
        OSError: they are missing, damaged or foreign, or the system does not execute them.
    """
    fault = _fault(folder)
    if fault:
        raise PermissionError(fault)
    path = folder / name
    code = _read(path)
    if _read(folder / f"{name}.sha256") != _check(code):
        raise OSError(f"{path} is damaged")
    try:  # from memory, where nobody can exchange or cut it any more, and where the folder may be mounted noexec
        handle = os.memfd_create(_NAME)  # type: ignore[attr-defined,unused-ignore]
        os.write(handle, code)
        # stays open: the system's loader knows libraries by their paths, and would take the next one for this one
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except (AttributeError, OSError):  # not Linux, or forbidden
        return ctypes.CDLL(str(path))


def _read(path: Path) -> bytes:
    """The file's content, if only the user can have written it. Not through a link, nor waiting for a FIFO."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        reason = _foreign(status) if stat.S_ISREG(status.st_mode) else "is not a file"
        if reason:
            raise PermissionError(f"{path} {reason}")
        return file.read()


def _check(code: bytes) -> bytes:
    return f"{len(code)} {hashlib.sha256(code).hexdigest()}\n".encode()


def _keep(folders: list[Path], name: str, code: bytes) -> ctypes.CDLL:
    """Write the library into the first folder that takes it and lets it be executed, and load it from there."""
    failures = []
    for folder in [*folders, None]:
        try:
            if folder is None:  # somebody else has taken the folder's name in the temporary directory
                folder = Path(tempfile.mkdtemp(prefix=f"{_NAME}_"))
            if folder.name != _NAME:
                atexit.register(_remove, folder, name, os.getpid())
            _make(folder)
            for path, content in ((folder / name, code), (folder / f"{name}.sha256", _check(code))):
                with contextlib.suppress(OSError):  # a folder in its place goes if it is empty
                    path.rmdir()
                with whole_file(path, mode=0o600) as temporary:
                    temporary.write_bytes(content)
            return _load_verified(folder, name)
        except OSError as error:  # read-only, full, or mounted noexec
            failures.append(f"{folder}: {error}")
    raise OSError("; ".join(failures))


def _remove(folder: Path, name: str, process: int) -> None:
    """At exit of the process that wrote the library, not of its forks; who has loaded it keeps it."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            for path in (folder / name, folder / f"{name}.sha256", folder / "lock"):
                path.unlink(missing_ok=True)
            folder.rmdir()

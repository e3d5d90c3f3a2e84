"""How the C++ kernel gets compiled, kept and loaded: what is damaged or foreign never runs, what fails is not kept."""

import io
import multiprocessing
import os
import stat
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from timm_halonet.ops import native_build
from timm_halonet.ops.native import can_run_native, native_forward
from timm_halonet.ops.options import Options
from timm_halonet.ops.reference import halo_attention_reference

from ..support.native_workshop import COMPILERS, Workshop, make_libraries

pytestmark = pytest.mark.skipif(not COMPILERS or os.name != "posix", reason="needs a C++ compiler and POSIX")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return make_libraries(tmp_path_factory.mktemp("libraries"))


@pytest.fixture
def workshop(tmp_path, libraries, monkeypatch):
    return Workshop(tmp_path, libraries, monkeypatch)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_compiled_once_and_for_the_user_alone(workshop, capfd):
    old = os.umask(0)
    try:
        assert workshop.answer() == 1
    finally:
        os.umask(old)
    assert len(workshop.compiled()) == 1
    assert [line for line in capfd.readouterr().err.splitlines() if "compiling the CPU kernel" in line]
    assert mode(workshop.cache) == mode(workshop.cache.parent) == 0o700
    assert {mode(path) for path in workshop.cache.iterdir()} == {0o600}
    assert not list(workshop.temporary.iterdir())
    assert workshop.answer() == 1 and not workshop.compiled()
    assert not capfd.readouterr().err
    workshop.source(2)
    assert workshop.answer() == 2 and len(workshop.compiled()) == 1


def truncated(path):
    path.write_bytes(path.read_bytes()[:5000])


def flipped(path):
    code = bytearray(path.read_bytes())
    code[len(code) // 2] ^= 1
    path.write_bytes(code)


DAMAGE = {
    "truncated": truncated,
    "one bit flipped": flipped,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "0 bytes": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(10_000)),
    "missing": Path.unlink,
    "no hash": lambda path: Path(f"{path}.sha256").unlink(),
    "empty hash": lambda path: Path(f"{path}.sha256").write_bytes(b""),
    "garbage for a hash": lambda path: Path(f"{path}.sha256").write_bytes(os.urandom(10_000)),
    "hash of something else": lambda path: Path(f"{path}.sha256").write_bytes(native_build._check(b"else")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "an empty folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_library_is_built_again(workshop, damage):
    assert workshop.answer() == 1
    sound = workshop.library().read_bytes()
    DAMAGE[damage](workshop.library())
    workshop.compiled()
    assert workshop.answer() == 1 and len(workshop.compiled()) == 1
    assert workshop.library().read_bytes()[:4] == sound[:4] == b"\x7fELF" and not workshop.library().is_symlink()
    assert workshop.answer() == 1 and not workshop.compiled()


def test_a_folder_in_the_librarys_place(workshop):
    """Nothing of ours makes one; the temporary directory serves, and the folder is left alone."""
    workshop.answer()
    path = workshop.library()
    path.unlink()
    (path / "precious").mkdir(parents=True)
    assert workshop.answer() == 1 and (path / "precious").is_dir()


def link(path):
    """Move it away and let a link lead there."""
    there = path.with_name(path.name + ".moved")
    path.rename(there)
    path.symlink_to(there)


FOREIGN = {
    "file writable by all": lambda library: library.chmod(0o666),
    "file writable by the group": lambda library: library.chmod(0o620),
    "hash writable by all": lambda library: Path(f"{library}.sha256").chmod(0o602),
    "file of another user": lambda library: os.chown(library, 12345, -1),
    "hash of another user": lambda library: os.chown(f"{library}.sha256", 12345, -1),
    "linked file": link,
    "linked hash": lambda library: link(Path(f"{library}.sha256")),
    "folder writable by all": lambda library: library.parent.chmod(0o777),
    "folder writable by the group": lambda library: library.parent.chmod(0o770),
    "sticky folder": lambda library: library.parent.chmod(0o1777),
    "folder of another user": lambda library: os.chown(library.parent, 12345, -1),
    "linked folder": lambda library: link(library.parent),
    "cache home where all may rename": lambda library: library.parent.parent.chmod(0o777),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_planted_library_is_not_loaded(workshop, foreign):
    if "user" in foreign and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    workshop.answer()
    workshop.plant()
    assert workshop.answer() == 666, "what the user has written is trusted; else this test shows nothing"
    FOREIGN[foreign](workshop.library())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert workshop.answer() == workshop.answer() == 1
    said = [str(warning.message) for warning in caught]
    assert len(said) == ("older" in foreign or "home" in foreign) and all(str(workshop.cache.parent) in x for x in said)


def test_who_counts_as_another_user():
    def foreign(mode, uid):
        return native_build._foreign(os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0)))

    me = os.geteuid()
    assert not foreign(0o100600, me) and not foreign(0o100755, me) and not foreign(0o100644, 0)
    assert "user 4711" in foreign(0o100600, 4711)
    assert "0620" in foreign(0o100620, me) and "0602" in foreign(0o100602, 0)


def test_cache_home_like_tmp(workshop):
    """Everybody may write there, but nobody rename what is another's."""
    workshop.cache.parent.mkdir()
    workshop.cache.parent.chmod(0o1777)
    assert workshop.answer() == 1 and mode(workshop.cache) == 0o700
    assert workshop.answer() == 1 and len(workshop.compiled()) == 1


def test_cache_home_that_is_the_temporary_directory(workshop, monkeypatch):
    """What is kept there by the user's wish is not removed at exit."""
    removed = []
    monkeypatch.setattr("atexit.register", lambda *args: removed.append(args))
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.temporary))
    assert workshop.answer() == 1 and not removed
    assert list((workshop.temporary / "timm_halonet").glob("*.so"))


def test_linked_cache_home(workshop):
    """A whole ~/.cache on another disk is a matter of the user."""
    (workshop.folder / "disk").mkdir()
    workshop.cache.parent.symlink_to(workshop.folder / "disk")
    assert workshop.answer() == 1 and workshop.answer() == 1 and len(workshop.compiled()) == 1
    assert list((workshop.folder / "disk" / "timm_halonet").glob("*.so"))


@pytest.mark.parametrize("taken", [False, True])
def test_temporary_library_of_all_processes_until_exit(workshop, monkeypatch, taken):
    """The cache is below a file, which even root cannot write; `taken`: nor may the user's folder be used."""
    (workshop.folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "file" / "cache"))
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *args: at_exit.append(args))
    shared = workshop.temporary / f"timm_halonet-{os.geteuid()}"
    if taken:
        shared.mkdir()
        shared.chmod(0o777)
        (shared / "of another").touch()
    with pytest.warns(RuntimeWarning, match="temporary directory only.*file"):
        assert workshop.answer() == 1
    [library] = workshop.temporary.rglob("*.so")
    assert (library.parent == shared) == (not taken) and mode(library.parent) == 0o700
    if not taken:
        assert workshop.answer() == 1 and len(workshop.compiled()) == 1  # another process
    [(remove, folder, name, process)] = at_exit
    remove(folder, name, process + 1)  # a fork of it ends
    assert library.exists()
    remove(folder, name, process)
    assert [path.name for path in workshop.temporary.rglob("*")] == (["of another", shared.name][::-1] if taken else [])


def test_full_disk(workshop, monkeypatch):
    def full(handle):
        if str(workshop.cache) in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert workshop.answer() == 1 and workshop.answer() == 1
    assert len(workshop.compiled()) == 1 and os.listdir(workshop.cache) == ["lock"]


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_the_library_is_the_users_alone(workshop, mask):
    """Whatever other files get: one that a group may write is not loaded."""
    before = os.umask(mask)
    try:
        assert workshop.answer() == 1 and workshop.answer() == 1
    finally:
        os.umask(before)
    assert len(workshop.compiled()) == 1
    files = [path for path in workshop.cache.iterdir() if path.name != "lock"]
    assert len(files) == 2 and all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_folder_that_lets_nothing_be_executed(workshop, monkeypatch):
    load = native_build._load_verified

    def noexec(folder, name):
        if folder == workshop.cache:
            raise OSError("failed to map segment from shared object")
        return load(folder, name)

    monkeypatch.setattr(native_build, "_load_verified", noexec)
    assert workshop.answer() == 1 and workshop.answer() == 1 and len(workshop.compiled()) == 1


def test_library_exchanged_while_it_is_compiled(workshop):
    """The temporary directory may be one where everybody can rename."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    workshop.compiler(f'case "$*" in *native.cpp) cp {workshop.libraries}/666.so $TMPDIR/library;'
                      ' chown 12345 $TMPDIR/library; exit ;; esac')  # fmt: skip
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        native_build._load()
    assert not list(workshop.folder.rglob("halo*"))


def test_no_home(workshop, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert workshop.answer() == 1
    assert not Path("not").exists() and list(workshop.temporary.rglob("*.so"))


FAILURES = {
    "killed": "kill -9 $$",
    "killed inside": "echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1",
    "disk full": "echo 'ld: final link failed: No space left on device' >&2; exit 1",
    "silent": "exit 1",
    "nothing written": "exit 0",
}


@pytest.mark.parametrize("when", ["probe", "compile"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_compile_is_a_reason_and_not_kept(workshop, failure, when):
    """No other flags are tried: their library would be slow for ever under the fast one's name."""
    condition = {"probe": "*probe.cpp*", "compile": "*native.cpp*"}[when]
    workshop.compiler(f'case "$*" in {condition}) {FAILURES[failure]} ;; esac')
    with pytest.raises(RuntimeError, match="returned"):
        native_build._load()
    assert all("-march=native" in line for line in workshop.compiled())
    assert not list(workshop.folder.rglob("halo*")) and not list(workshop.temporary.iterdir())
    workshop.compiler()
    assert workshop.answer() == 1
    [line] = workshop.compiled()
    assert "-march=native" in line and line.count("-f") > 3


UNKNOWN = {
    "g++: error: unrecognized command-line option '-march=native'": ("-march=native", {"-mcpu=native", "-fopenmp"}),
    "clang: error: the clang compiler does not support '-march=native'": (
        "-march=native",
        {"-mcpu=native", "-fopenmp"},
    ),
    "cc1plus: error: bad value ('native') for '-march=' switch": ("-march=native", {"-mcpu=native", "-fopenmp"}),
    "clang: error: unsupported option '-fopenmp'": ("-fopenmp", {"-march=native"}),
    "/usr/bin/ld: cannot find -lomp: No such file or directory": ("-fopenmp", {"-march=native"}),
    "g++: error: libgomp.spec: No such file or directory": ("-fopenmp", {"-march=native"}),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_next_flags_only_where_the_compiler_does_not_know_them(workshop, message):
    flag, used = UNKNOWN[message]
    workshop.compiler(f'case "$*" in *{flag}*) echo "{message}" >&2; exit 1 ;; esac')
    assert workshop.answer() == 1
    [line] = workshop.compiled()
    assert {x for x in ("-march=native", "-mcpu=native", "-fopenmp") if x in line} == used
    slow = workshop.library().name
    assert workshop.answer() == 1 and not workshop.compiled()
    workshop.compiler()  # the flag is known now, and the other library is not taken for it
    assert workshop.answer() == 1
    assert flag in workshop.compiled()[0] and {path.name for path in workshop.cache.glob("*.so")} > {slow}


def test_hanging_compiler(workshop):
    workshop.impatient("_compile", 1)
    workshop.compiler(f'case "$*" in *native.cpp*) sleep 77 & echo $! > {workshop.folder}/child; wait ;; esac')
    with pytest.raises(TimeoutError, match=r"did not finish in 1 s"):
        native_build._load()
    child = int((workshop.folder / "child").read_text())
    for _ in range(100):  # killed with its parent; whoever adopts it may take a moment
        if not Path(f"/proc/{child}/stat").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the compiler's child still runs")
    assert not list(workshop.folder.rglob("halo*")) and not list(workshop.temporary.iterdir())


def test_compiler_that_reads_from_the_terminal(workshop):
    workshop.compiler("cat")
    assert workshop.answer() == 1


def test_slow_path_is_announced_once(workshop, monkeypatch):
    workshop.compiler("echo 'out\nof order' >&2; exit 3")
    native_build.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="(?s)returned 3: out of order.*performance.md.*Install g") as caught:
            reasons = {can_run_native(torch.zeros(1)) for _ in range(3)}
        assert len(caught) == 1 and len(reasons) == 1 and "\n" not in str(caught[0].message)
        assert len(workshop.compiled()) == 0  # the probe told, and once
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monkeypatch.setattr(native_build, "_warned", set())
            native_build.library.cache_clear()
            monkeypatch.setenv("TIMM_HALONET_NATIVE", "0")
            assert can_run_native(torch.zeros(1))
            monkeypatch.delenv("TIMM_HALONET_NATIVE")
            assert can_run_native(torch.zeros(1, device="meta")) and can_run_native(torch.zeros(1).double())
            from timm_halonet import halo_attention

            q, table = torch.ones(1, 2, 2, 1, 4), torch.ones(3, 4)
            for way in ({"backend": "blocked"}, {}):
                monkeypatch.setenv("TIMM_HALONET_BACKEND", "" if way else "reference")
                halo_attention(q, q, q, table, table, block_size=2, halo_size=0, **way)
            monkeypatch.delenv("TIMM_HALONET_BACKEND")
            with pytest.raises(RuntimeWarning):  # but asked for nothing, it says so
                halo_attention(q, q, q, table, table, block_size=2, halo_size=0)
            halo_attention(q, q, q, table, table, block_size=2, halo_size=0)
    finally:
        native_build.library.cache_clear()


def test_stderr_may_be_closed(workshop, monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for answer, stream in ((1, None), (2, closed)):
        monkeypatch.setattr(sys, "stderr", stream)
        workshop.source(answer)
        assert workshop.answer() == answer
    assert not capsys.readouterr().out


def _answer_to(queue, barrier):
    barrier.wait()
    queue.put(native_build._load().answer())


@pytest.mark.integration
@pytest.mark.parametrize("where", ["cache", "temporary"])
def test_processes_that_start_together_compile_once(workshop, monkeypatch, where):
    if where == "temporary":
        (workshop.folder / "cache").touch()
    workshop.compiler("sleep 0.2")
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forks of a process with threads; a cache that cannot be used
        processes = [context.Process(target=_answer_to, args=(queue, barrier)) for _ in range(8)]
        for process in processes:
            process.start()
    assert [queue.get(timeout=120) for _ in processes] == [1] * 8
    for process in processes:
        process.join()
    assert len(workshop.compiled()) == 1


def test_lock_of_a_process_that_died_or_hangs(workshop):
    workshop.cache.mkdir(parents=True, mode=0o700)
    (workshop.cache / "lock").touch(0o600)  # left by one that was killed
    assert workshop.answer() == 1
    workshop.impatient("_acquire", 0.2)
    workshop.source(2)
    with open(workshop.cache / "lock", "r+") as held:
        native_build.fcntl.flock(held, native_build.fcntl.LOCK_EX)
        assert workshop.answer() == 2  # compiled all the same


@pytest.mark.parametrize("system", ["other", "strict"])
def test_without_libraries_from_memory(workshop, monkeypatch, system):
    if system == "other":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", lambda name: os.open(os.devnull, os.O_RDONLY))
    assert workshop.answer() == 1
    library = workshop.library()
    library.unlink()  # this process has loaded it: a new file, not the same with other content
    library.write_bytes(b"garbage")
    assert workshop.answer() == 1 and workshop.answer() == 1 and len(workshop.compiled()) == 2


def test_without_locks_and_users(workshop, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(native_build, "fcntl", None)
    monkeypatch.delattr(os, "geteuid")
    assert workshop.answer() == 1 and workshop.answer() == 1 and len(workshop.compiled()) == 1
    assert not (workshop.cache / "lock").exists()


@pytest.mark.integration
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_compiler(tmp_path, monkeypatch, compiler):
    """The kernel itself, with this module's flags; tests/test_native_compilers.py has its values on every CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    native_build.library.cache_clear()
    try:
        assert can_run_native(torch.zeros(1)) is None
        q, k, v = (torch.randn(1, 9, 9, 2, 8, dtype=torch.float64) for _ in range(3))
        tables = [torch.randn(7, 8, dtype=torch.float64) for _ in range(2)]
        options = Options(2, 1, 1, 1.0, False, True, 1)
        expected = halo_attention_reference(q, k, v, *tables, options)
        out, _ = native_forward(*(x.float() for x in (q, k, v, *tables)), options)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    finally:
        monkeypatch.undo()
        native_build.library.cache_clear()


@pytest.mark.parametrize("variable", ["CXX", "TIMM_HALONET_CXXFLAGS"])
def test_quotes_that_do_not_close(monkeypatch, variable):
    monkeypatch.setenv(variable, "g++ '")
    with pytest.raises(RuntimeError, match=f"{variable} is .*: No closing quotation"):
        native_build._load()

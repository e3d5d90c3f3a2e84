"""A place to have libraries compiled, kept and loaded without a compiler's time."""

import shutil
import subprocess
from pathlib import Path

from timm_halonet.ops import native_build

COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]

# compiles nothing, for speed, but copies the library with this answer; $* has the arguments
COMPILER = """#!/bin/sh
echo "$*" >> {folder}/diary
{before}
case "$*" in *--version*) echo 1.0; exit ;; esac
for source; do :; done
while [ "$1" != -o ]; do shift; done
case "$source" in
  *probe.cpp) echo probe > "$2" ;;
  *) cp {libraries}/$(tr -dc 0-9 < "$source").so "$2" ;;
esac
"""


def make_libraries(folder: Path) -> Path:
    """Three libraries: NUMBER.so, whose `answer` is NUMBER."""
    for answer in (1, 2, 666):
        source = folder / f"{answer}.cpp"
        source.write_text(f'extern "C" int answer() {{ return {answer}; }}')
        command = [COMPILERS[0], "-shared", "-fPIC", "-o", source.with_suffix(".so"), source]
        subprocess.run(command, check=True)
    return folder


class Workshop:
    """A small source in place of the kernel's, folders of its own, and a compiler that keeps a diary."""

    def __init__(self, folder: Path, libraries: Path, monkeypatch):
        self.folder, self.libraries, self.monkeypatch = folder, libraries, monkeypatch
        self.cache, self.temporary = folder / "cache" / "timm_halonet", folder / "temporary"
        self.temporary.mkdir()
        self.source(1)
        self.compiler()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.delenv("TIMM_HALONET_CXXFLAGS", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(self.temporary))
        monkeypatch.setattr(native_build, "_SOURCE", folder / "native.cpp")
        monkeypatch.setattr(native_build, "_warned", set())

    def source(self, answer: int) -> None:
        shutil.copy(self.libraries / f"{answer}.cpp", self.folder / "native.cpp")

    def compiler(self, before: str = "") -> None:
        """`before`: lines of shell that run first."""
        script = self.folder / "compiler"
        script.write_text(COMPILER.format(folder=self.folder, libraries=self.libraries, before=before))
        script.chmod(0o755)
        self.monkeypatch.setenv("CXX", str(script))

    def compiled(self) -> list[str]:
        """The command lines that compiled the source since the last time."""
        diary = self.folder / "diary"
        lines = diary.read_text().splitlines() if diary.exists() else []
        diary.unlink(missing_ok=True)
        return [line for line in lines if "native.cpp" in line]

    def answer(self) -> int:
        """Load as a new process would, and ask the library."""
        return native_build._load().answer()

    def library(self) -> Path:
        [path] = self.cache.glob("*.so")
        return path

    def plant(self) -> None:
        """Put another library in place of the kept one, with the size and hash that it must have."""
        path = self.library()
        path.write_bytes((self.libraries / "666.so").read_bytes())
        path.with_name(path.name + ".sha256").write_bytes(native_build._check(path.read_bytes()))

    def impatient(self, function: str, limit: float) -> None:
        """Another time limit while this function of the module runs."""
        original = getattr(native_build, function)

        def hurried(*args):
            with self.monkeypatch.context() as patch:
                patch.setattr(native_build, "_TIME_LIMIT", limit)
                return original(*args)

        self.monkeypatch.setattr(native_build, function, hurried)

"""Files are written whole or not at all, say why they cannot be, and what a killed process left goes away."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from timm_halonet.files import _open_locked, json_text, remove_leftovers, whole_file

resource = pytest.importorskip("resource")
fcntl = pytest.importorskip("fcntl")

NOISE = torch.randint(0, 256, (3, 300, 300), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def small_files():
    """No file can grow beyond 64 kB, as on a disk that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_csv(path: Path) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([[n, "x" * 50] for n in range(4000)])


WRITERS = {
    "torch": lambda path: torch.save({"x": NOISE}, path),
    "safetensors": lambda path: save_file({"x": NOISE}, path),
    "Pillow": lambda path: Image.fromarray(np.ascontiguousarray(NOISE.permute(1, 2, 0))).save(path),
    "csv": write_csv,
    "text": lambda path: path.write_text(json.dumps(list(range(40000)))),
}


@pytest.mark.parametrize("library", WRITERS)
def test_full_disk_is_named_whatever_the_library_says(tmp_path, small_files, library):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=rf"^cannot write {path}: File too large$"), whole_file(path) as temporary:
        WRITERS[library](temporary)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_reason_in_the_words_of_a_library(tmp_path):
    """On a full disk safetensors leaves an empty file, to which more can be written."""
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    expected = r"^cannot write .*/a.pt: No space left on device$"
    with pytest.raises(OSError, match=expected), whole_file(tmp_path / "a.pt"):
        raise SafetensorError(message)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("not a number"), RuntimeError("no such layer"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, whole_file(tmp_path / "a.json"):
            raise error
        assert caught.value is error
    with (
        pytest.raises(OSError, match=r"cannot write .*nowhere/a.json: No such file"),
        whole_file(tmp_path / "nowhere" / "a.json"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_shown_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"^cannot write \./nowhere//a.json: "), whole_file("./nowhere//a.json"):
        pass


@pytest.mark.parametrize("name", ["checkpoint.pt", "a" * 251 + ".png", "é" * 125 + ".png", "x." + "y" * 250])
def test_what_a_dead_process_left_is_removed(tmp_path, name):
    path = tmp_path / name
    handle, leftover = _open_locked(path)
    living, busy = _open_locked(path)
    assert leftover.parent == tmp_path and len(os.fsencode(leftover.name)) <= 255
    os.close(handle)  # the process is gone, its file is not
    with whole_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not leftover.exists() and busy.exists()
        assert remove_leftovers(path) == []  # its own is in use
    assert path.read_bytes() == b"new"
    os.close(living)
    assert remove_leftovers(path) == [busy]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_of_others_are_not_leftovers(tmp_path):
    names = [".checkpoint.pt", ".checkpoint.pt.tmp-notes.pt", ".other.pt.tmp-abcdefgh.pt", ".checkpoint.pt.abcdefgh.pt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".checkpoint.pt.tmp-abcdefgh.pt").mkdir()
    with whole_file(tmp_path / "checkpoint.pt") as temporary:
        temporary.write_bytes(b"new")
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".checkpoint.pt.tmp-abcdefgh.pt", "checkpoint.pt"}


@pytest.mark.integration
def test_after_sigkill(tmp_path):
    code = (
        "import os, signal, sys; from timm_halonet.files import whole_file\n"
        "with whole_file(sys.argv[1]) as t:\n    t.write_bytes(bytes(1000)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.stat().st_size == 1000
    assert remove_leftovers(path) == [left]
    assert list(tmp_path.iterdir()) == []


def test_json_of_any_name():
    for name in ("細.png", "caf\udce9.png", "ü😀.png"):
        for encoding in ("utf-8", "ascii", "cp1252"):
            text = json_text({"file": name}, encoding)
            assert json.loads(text.encode(encoding).decode(encoding)) == {"file": name}
    assert json_text("細") == '"細"'

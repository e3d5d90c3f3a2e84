"""Progress: bars where standard error is a terminal, lines alone elsewhere."""

import io
import sys

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from timm_halonet.benchmark import cases as benchmark_cases
from timm_halonet.benchmark.case import Case, Subject
from timm_halonet.cli import main
from timm_halonet.detection.predicting import Predictor
from timm_halonet.detection.shared import counter
from timm_halonet.report.progress import progress_bar, say

from ..support.detection_tiny import tiny_trainer


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def stderr(monkeypatch):
    """A function that makes standard error a terminal, or not one."""

    def make(terminal):
        monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
        return stream

    return make


def count(n):
    for _ in progress_bar(range(n), unit="thing", mininterval=0, miniters=1):
        say("a line", sys.stderr)


def test_a_bar_on_a_terminal_makes_room_for_lines_and_goes(stderr):
    stream = stderr(True)
    count(3)
    text = stream.getvalue()
    assert "3/3" in text and text.count("\ra line\n") == 3
    assert text.split("\r")[-2:] == [" " * len(text.split("\r")[-2]), ""]  # wiped out


def test_lines_alone_elsewhere(stderr):
    stream = stderr(False)
    count(3)
    assert stream.getvalue() == "a line\n" * 3


def test_bars_can_be_turned_off(stderr):
    stream = stderr(True)
    disable_progress_bars()
    try:
        count(3)
        counter(0)(2, 2)
    finally:
        enable_progress_bars()
    assert stream.getvalue() == "a line\n" * 3 + "evaluated 2 of 2 images, 0 s\n"


def test_lines_are_out_at_once(capsys, monkeypatch):
    flushed = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(1))
    say("step 1")
    assert flushed and capsys.readouterr().out == "step 1\n"


def train(folder):
    tiny_trainer(folder, epochs=2, log=say, log_steps=1).run()


def evaluate(folder):
    show = counter(0)
    for done in (1, 2):
        show(done, 2)


def predict(folder):
    for name in "ab":
        (folder / f"{name}.png").write_text("not a photo")
    assert Predictor(torch.nn.Identity(), [{"id": 1, "name": "disc"}]).draw_photos([folder], folder) == 2


def bench(folder):
    step = lambda batch: lambda: (torch.zeros(batch),)  # noqa: E731
    case = Case("layer/tiny", (Subject("timm", step),), "timm", 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_cases, "build_cases", lambda config: [case])
        assert main(["bench", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("work", "bar", "line"),
    [
        (train, "epoch 1: ", None),
        (evaluate, "evaluation: ", "evaluated 2 of 2 images"),
        (predict, "0/2", "b.png: not an image"),
        (bench, "0/1", "[1/1] layer/tiny"),
    ],
)
def test_long_work_has_a_bar_and_its_lines_in_logs(work, bar, line, stderr, tmp_path, capsys):
    stream = stderr(True)
    (tmp_path / "first").mkdir()
    work(tmp_path / "first")
    assert bar in stream.getvalue()
    out = capsys.readouterr().out
    stream = stderr(False)
    (tmp_path / "second").mkdir()
    work(tmp_path / "second")
    assert "\r" not in stream.getvalue() and "it/s" not in stream.getvalue() and bar not in stream.getvalue()
    assert line is None or line in stream.getvalue()
    again = capsys.readouterr().out
    if work is train:
        assert again.count("\nepoch ") == out.count("\nepoch ") == 3 and again.startswith("epoch 0  step 1  loss ")

"""Loss and accuracy curves of training runs, from the summary.csv that timm's train.py writes; models as points."""

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SUMMARY_NAME = "summary.csv"
COLUMNS = ("train_loss", "eval_loss", "eval_top1")
# told apart by the colour-blind too (Okabe and Ito)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8b5a2b")

PANEL = (520, 300)  # width and height of a plot without its labels, in pixels
MARGIN = (70, 40, 20, 50)  # left, top, right, bottom of it
LEGEND_ROW = 20
_FINE = 2  # drawn this many times larger and averaged down, for smooth lines


@dataclass
class Run:
    """The curves of one run, an epoch a value; NaN where a value is missing, NaN or infinite."""

    name: str
    epochs: list[int]
    curves: dict[str, list[float]]  # those of COLUMNS that the file has; accuracies in percent
    minutes: float | None = None  # that an epoch takes, where it is known: curves then go over time

    @property
    def xs(self) -> list[float]:
        """Where the values stand: epochs counted from 0, or minutes from the start to the end of each epoch."""
        return [float(e) if self.minutes is None else (e + 1) * self.minutes for e in self.epochs]


def read_run(path: str | os.PathLike[str]) -> Run:
    """The curves of a run that train.py has written, or still writes.

    A resumed run writes its header again and repeats epochs: what came after the epoch that it goes on from was lost
    with the process, and is left out.

    Args:
        path: a folder that holds summary.csv, or such a file.

    Raises:
        ValueError: there is no such file, it has no row, or a line that is none of a summary, which is named.
    """
    file = Path(path)
    file = file / SUMMARY_NAME if file.is_dir() else file
    try:
        with open(file, encoding="utf-8", newline="") as f:
            reader = csv.reader(f, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist; a run is a folder that holds {SUMMARY_NAME}, or such a file"
        ) from None
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is no CSV: {e}") from None
    rows = _rows(file, lines)
    if not rows:
        raise ValueError(f"{file} has no epoch yet: train.py writes a line after each one")
    found = [column for column in COLUMNS if any(column in values for values in rows.values())]
    curves = {column: [values.get(column, math.nan) for values in rows.values()] for column in found}
    return Run(file.absolute().parent.name or str(file), list(rows), curves)


def _rows(file: Path, lines: list[tuple[int, list[str]]]) -> dict[int, dict[str, float]]:
    """Column values by epoch, in ascending order."""
    header: list[str] | None = None
    rows: dict[int, dict[str, float]] = {}
    for number, row in lines:
        where = f"{file}, line {number}"
        if row[0] == "epoch":
            if not set(row) & set(COLUMNS):
                raise ValueError(f"{where}: the header {','.join(row)} has none of {', '.join(COLUMNS)}")
            header = row
            continue
        if header is None:
            raise ValueError(f"{where}: expected a header that starts with epoch, got {','.join(row)!r}")
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} values for {len(header)} columns ({','.join(header)})")
        values = {column: _number(text, column, where) for column, text in zip(header, row, strict=True)}
        epoch = values["epoch"]
        if not epoch.is_integer() or epoch < 0:
            raise ValueError(f"{where}: epoch is {row[0]!r}, expected a whole number from 0 up")
        rows = {earlier: kept for earlier, kept in rows.items() if earlier < epoch}
        rows[int(epoch)] = {column: values[column] for column in COLUMNS if column in values}
    return rows


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text) if text.strip() else math.nan
    except ValueError:
        raise ValueError(f"{where}: {column} is {text!r}, expected a number") from None
    return value if math.isfinite(value) else math.nan


def best(run: Run) -> tuple[int, float] | None:
    """The epoch of the highest top-1 accuracy and its value in percent, or None where none was measured."""
    measured = [(y, -x) for x, y in zip(run.epochs, run.curves.get("eval_top1", ()), strict=False) if not math.isnan(y)]
    return (-max(measured)[1], max(measured)[0]) if measured else None


def draw(runs: Sequence[Run]) -> Image.Image:
    """Loss on the left, top-1 accuracy on the right; a colour a run, training loss paler and thinner.

    Over epochs, or over wall-clock time where every run knows the `minutes` that its epochs take.

    Returns:
        an RGB picture of 1220 x (400 + 20 a run) pixels.

    Raises:
        ValueError: no run, more than there are colours (8), or minutes known of some runs only.
    """
    unknown = [run.name for run in runs if run.minutes is None]
    if unknown and len(unknown) < len(runs):
        raise ValueError(f"one axis for all: minutes an epoch are not known of {', '.join(unknown)}")
    if not 1 <= len(runs) <= len(COLORS):
        raise ValueError(f"1 to {len(COLORS)} runs fit one picture, got {len(runs)}")
    left, top, right, bottom = MARGIN
    panel_width, panel_height = left + PANEL[0] + right, top + PANEL[1] + bottom
    size = (2 * panel_width, panel_height + LEGEND_ROW * len(runs) + 10)
    sheet = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
    pen = ImageDraw.Draw(sheet)
    _panel(pen, (left, top), "loss (validation; training pale)", runs, ("train_loss", "eval_loss"))
    _panel(pen, (panel_width + left, top), "top-1 accuracy, validation, %", runs, ("eval_top1",))
    names = [run.name for run in runs]
    for n, run in enumerate(runs):
        y = panel_height + LEGEND_ROW * n + LEGEND_ROW / 2
        _line(pen, [(left, y), (left + 30, y)], COLORS[n], 3)
        name = run.name if names.count(run.name) == 1 else f"{run.name} ({n + 1})"
        top1 = best(run)
        result = f"best top-1 {top1[1]:.2f} % at epoch {top1[0]}" if top1 else "no top-1"
        _text(pen, (left + 40, y), f"{name}: {result}, last epoch {run.epochs[-1]}", "lm")
    return sheet.reduce(_FINE)


def _panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, runs: Sequence[Run], columns: Sequence[str]
) -> None:
    shown = [y for run in runs for column in columns for y in run.curves.get(column, ()) if not math.isnan(y)]
    timed = runs[0].minutes is not None
    first = 0.0 if timed else min(run.xs[0] for run in runs)
    xs = _ticks(first, max(run.xs[-1] for run in runs), whole=not timed)
    place = _axes(
        pen, corner, title, "minutes" if timed else "epoch", xs, _ticks(min(shown), max(shown)) if shown else []
    )
    for n, run in enumerate(runs):
        for column in columns:
            color, width = (pale(COLORS[n]), 2) if column == "train_loss" else (COLORS[n], 3)
            for piece in _pieces(run.xs, run.curves.get(column, ())):
                points = [place(x, y) for x, y in piece]
                _line(pen, points, color, width)
                if len(points) == 1:
                    _dot(pen, points[0], color, 3)


def scatter(panels: Sequence[tuple[str, str, Mapping[str, tuple[float, float]]]]) -> Image.Image:
    """Two panels of points side by side, numbered, with a legend below that gives the numbers' names and values.

    Args:
        panels: title, label of the horizontal axis, and points (x, y) by name, one or more.

    Returns:
        an RGB picture of 1220 x (400 + 20 a name) pixels.
    """
    left, top, right, bottom = MARGIN
    panel_width, panel_height = left + PANEL[0] + right, top + PANEL[1] + bottom
    names = list(dict.fromkeys(name for _, _, points in panels for name in points))
    size = (2 * panel_width, panel_height + LEGEND_ROW * len(names) + 10)
    sheet = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (title, label, points) in enumerate(panels):
        # from zero: distances then show ratios
        xs, ys = (_ticks(0, max(point[i] for point in points.values())) for i in (0, 1))
        place = _axes(pen, (n * panel_width + left, top), title, label, xs, ys)
        for name, (x, y) in points.items():
            number = names.index(name)
            px, py = place(x, y)
            _dot(pen, (px, py), COLORS[number % len(COLORS)], 5)
            _text(pen, (px + 8, py - 8), str(number + 1), "lm")
    for number, name in enumerate(names):
        y = panel_height + LEGEND_ROW * number + LEGEND_ROW / 2
        _dot(pen, (left, y), COLORS[number % len(COLORS)], 5)
        values = [f"{points[name][1]:.3g}" if name in points else "-" for _, _, points in panels]
        x = next(points[name][0] for _, _, points in panels if name in points)
        _text(pen, (left + 12, y), f"{number + 1}  {name}: {x:.3g}; {', '.join(values)}", "lm")
    return sheet.reduce(_FINE)


def _axes(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    label: str,
    xs: Sequence[float],
    ys: Sequence[float],
) -> Callable[[float, float], tuple[float, float]]:
    """A panel with a grid at these ticks, none in `ys` where there is nothing to show; returns where a point goes."""
    left, top = corner
    right, bottom = left + PANEL[0], top + PANEL[1]
    _text(pen, ((left + right) / 2, top - 18), title, "mm")
    _text(pen, ((left + right) / 2, bottom + 36), label, "mm")
    low, high = (ys[0], ys[-1]) if ys else (0.0, 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + PANEL[0] * (x - xs[0]) / (xs[-1] - xs[0]), bottom - PANEL[1] * (y - low) / (high - low)

    for x in xs:
        px = place(x, low)[0]
        _line(pen, [(px, top), (px, bottom + 5)], "#e4e4e4", 1)
        _text(pen, (px, bottom + 16), f"{x:g}", "mm")
    for y in ys:
        py = place(xs[0], y)[1]
        _line(pen, [(left - 5, py), (right, py)], "#e4e4e4", 1)
        _text(pen, (left - 10, py), f"{y:g}", "rm")
    _line(pen, [(left, top), (left, bottom), (right, bottom)], "#606060", 1)
    if not ys:
        _text(pen, ((left + right) / 2, (top + bottom) / 2), "no values", "mm")
    return place


def pale(color: str) -> str:
    """Half way from a colour, #rrggbb, to white."""
    return "#" + "".join(f"{(int(color[i : i + 2], 16) + 256) // 2:02x}" for i in (1, 3, 5))


def _pieces(xs: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The curve's points, cut where a value is NaN: no line leads over what was not measured."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, values, strict=False):
        if not math.isnan(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers in equal steps, 3 to 9 of them, from at or below `low` to at or above `high`."""
    if low == high:
        margin = max(abs(low) * 0.1, 1e-6)
        low, high = (low, high + 1) if whole else (low - margin, high + margin)
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # not n * step alone: 3 * 0.1 is written as 0.30000000000000004
    return [round(n * step, 12) for n in range(first, last + 1)]


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], color: str, width: int) -> None:
    pen.line([(x * _FINE, y * _FINE) for x, y in points], fill=color, width=width * _FINE, joint="curve")


def _dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], color: str, radius: float) -> None:
    x, y = at
    pen.ellipse([_FINE * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=color)


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor: str) -> None:
    font = ImageFont.load_default(size=13 * _FINE)
    pen.text((at[0] * _FINE, at[1] * _FINE), text, fill="#202020", font=font, anchor=anchor)

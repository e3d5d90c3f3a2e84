"""Losses and scores of training runs, from the summary.csv that timm's train.py and `detect train` write."""

import csv
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

SUMMARY_NAME = "summary.csv"
AP = ("mask_AP", "box_AP")  # of detectors, from 0 to 1 in the file
COLUMNS = ("train_loss", "eval_loss", "eval_top1", *AP)


@dataclass
class Run:
    """The curves of one run, an epoch a value; NaN where a value is missing, NaN or infinite."""

    name: str
    epochs: list[int]
    curves: dict[str, list[float]]  # those of COLUMNS that the file has; scores in percent
    minutes: float | None = None  # that an epoch takes, where it is known: curves then go over time

    @property
    def xs(self) -> list[float]:
        """Horizontal positions: epochs counted from 0, or minutes from the start to the end of each epoch."""
        return [float(e) if self.minutes is None else (e + 1) * self.minutes for e in self.epochs]


def read_run(path: str | os.PathLike[str]) -> Run:
    """The curves of a run that train.py has written, or still writes.

    A resumed run writes its header again and repeats epochs: what came after the epoch that it goes on from was lost
    with the process, and is left out.

    Args:
        path: a folder that holds summary.csv, or such a file.

    Raises:
        ValueError: the file does not exist or has no row, or a line does not belong to a summary; with the line.
    """
    file = Path(path)
    file = file / SUMMARY_NAME if file.is_dir() else file
    try:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is not a file that can be read to its end")
        data = file.read_bytes()
        # what Excel saves again: UTF-8 or UTF-16 with a mark, separated by commas, semicolons or tabs
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        separator = next((s for s in ";\t" if text.lstrip().startswith(f"epoch{s}")), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist; a run is a folder that holds {SUMMARY_NAME}, or such a file"
        ) from None
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a CSV file: {e}") from None
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
                raise ValueError(f"{where}: the header {','.join(row)} has none of the columns {', '.join(COLUMNS)}")
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
        rows[int(epoch)] = {c: values[c] * (100 if c in AP else 1) for c in COLUMNS if c in values}
    return rows


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text.replace(",", ".")) if text.strip() else math.nan  # a comma: Excel's in many countries
    except ValueError:
        raise ValueError(f"{where}: {column} is {text!r}, expected a number") from None
    return value if abs(value) < 1e30 else math.nan  # a picture's axes end there


def best(run: Run, column: str = "eval_top1") -> tuple[int, float] | None:
    """The first epoch of the highest score and its value in percent, or None where none was measured."""
    measured = [(y, -x) for x, y in zip(run.epochs, run.curves.get(column, ()), strict=False) if not math.isnan(y)]
    return (-max(measured)[1], max(measured)[0]) if measured else None

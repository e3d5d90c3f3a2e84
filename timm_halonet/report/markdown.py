"""Regions of Markdown files that a command writes anew."""

from pathlib import Path

from ..files import whole_file


def replace_region(path: Path, start: str, end: str, text: str) -> None:
    """Put `text` between the lines `start` and `end` of a file, in place of what is there; a new file gets just that.

    Raises:
        ValueError: the file is there, but these marks are not.
    """
    before, after = around_region(path, start, end)
    with whole_file(path) as temporary:
        temporary.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def around_region(path: Path, start: str, end: str) -> tuple[str, str]:
    """The text of a file before the line `start` and after the line `end`; of a new file, nothing and a line's end.

    Raises:
        ValueError: the file is there, but these marks are not.
    """
    if not path.exists():
        return "", "\n"
    before, found, rest = path.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} has no lines {start} and, after it, {end}: put them where the tables belong")
    return before, after

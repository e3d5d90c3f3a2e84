"""Charts by matplotlib: curves of runs, models as points. Functions return a Figure, `save` writes it."""

import contextlib
import itertools
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import whole_file
from .summary import AP, Run, best

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")
# told apart by the colour-blind too (Okabe and Ito)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8b5a2b")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX<>ph*"
GREY = "#b0b0b0"
RC = {
    "text.parse_math": False,  # $ and _ in a name are letters
    "svg.hashsalt": "timm_halonet",  # ids in the file are the same each time
    "font.size": 9,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "grid.color": "#e4e4e4",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """This package's settings of matplotlib, whatever the user's are; also a decorator of functions that draw.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as e:
        raise RuntimeError(f"pictures need matplotlib ({e}): pip install 'timm_halonet[plot]'") from None
    with matplotlib.style.context(["default", RC]):
        yield


def check_output(path: str | os.PathLike[str]) -> None:
    """Whether `save` could write a picture there; to be asked before hours of work.

    Raises:
        ValueError: a suffix of another format.
        RuntimeError: matplotlib is not installed.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: the suffix is {suffix!r}, pictures are {', '.join(SUFFIXES)}")
    with style():
        pass


def save(figure: "Figure", path: str | os.PathLike[str]) -> str:
    """Writes a picture in the format that the suffix names, the same bytes each time; returns a line that says so.

    Raises:
        ValueError: a suffix of another format.
        OSError: it cannot be written; what was there stays.
    """
    check_output(path)
    kind = Path(path).suffix.lower()[1:]
    dates = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}  # and versions
    with style(), whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata={dates[kind]: None} if kind in dates else None)
    width, height = figure.canvas.get_width_height()
    return f"{path}" if kind in ("svg", "pdf") else f"{path}: {width} x {height} pixels"


def panels(count: int) -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side, 10 inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    FigureCanvasAgg(figure)  # measures texts without a detour
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def look(n: int) -> dict[str, Any]:
    """How the n-th of several models is drawn, from 0: 24 colours, 96 combinations of colour, line and marker."""
    turn = n // len(COLORS)
    color = blend(COLORS[n % len(COLORS)], *((("#000000", 0.0), ("#000000", 0.45), ("#ffffff", 0.4))[turn % 3]))
    return {"color": color, "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[turn % len(MARKERS)]}


def blend(color: str, other: str = "#ffffff", share: float = 0.5) -> str:
    """A colour, #rrggbb, moved towards another one by a share from 0 to 1."""
    pairs = [(int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def legend_below(figure: "Figure", entries: Sequence[tuple["Artist", str]]) -> None:
    """A legend under the panels, a row an entry, long names over several lines; the figure grows by its height."""
    legend = figure.legend(*zip(*entries, strict=True), loc="outside lower left", frameon=False)
    labels, fonts = readable([label for _, label in entries])
    width, height = figure.get_size_inches()
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, fontfamily=fonts)
        letters = len(label)
        while text.get_window_extent().width > 0.92 * width * figure.dpi:
            letters = letters * 9 // 10
            text.set_text("\n".join(textwrap.wrap(label, letters)))
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)


def readable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    r"""Texts as they can be written here, and the fonts for it: letters that no installed font has become \u4e2d."""
    from matplotlib.font_manager import fontManager, get_font

    missing, fonts = set(map(ord, "".join(texts))), ["DejaVu Sans"]  # which matplotlib brings
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name not in fonts, font.name)):
        # those draw a box for every letter, or pictures that matplotlib cannot
        if missing and not any(word in font.name for word in ("Last", "Color")):
            with contextlib.suppress(OSError, RuntimeError):  # a font that has been removed, or is broken
                found = missing & get_font(font.fname).get_charmap().keys()
                missing -= found
                fonts += [font.name] if found and font.name not in fonts else []
    escaped = {c: chr(c).encode("unicode_escape").decode() for c in missing}
    return [text.translate(escaped) for text in texts], fonts


@style()
def draw_runs(runs: Sequence[Run]) -> "Figure":
    """Loss on the left, the validation score on the right: top-1 accuracy, and average precision of detectors.

    Over epochs, or over wall-clock time where every run knows the `minutes` that its epochs take. The legend says the
    best score of each run, or that there is none.

    Raises:
        ValueError: no run, or minutes known of some runs only.
    """
    unknown = [run.name for run in runs if run.minutes is None]
    if not runs:
        raise ValueError("no runs to draw")
    if unknown and len(unknown) < len(runs):
        raise ValueError(f"one axis for all: minutes an epoch are not known of {', '.join(unknown)}")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    measured = {column for run in runs for column in run.curves if best(run, column)}
    charts = [("loss", {"training": "train_loss", "validation": "eval_loss"})]
    if "eval_top1" in measured or measured.isdisjoint(AP):
        charts.append(("top-1 accuracy, validation, %", {"": "eval_top1"}))
    if not measured.isdisjoint(AP):
        charts.append(("AP, validation, %", {"boxes": "box_AP", "masks": "mask_AP"}))
    figure, axes = panels(len(charts))
    for ax, (title, columns) in zip(axes, charts, strict=True):
        shown = [word for word, column in columns.items() if column in measured]  # of two, the first is pale
        which = f"{shown[-1]} (pale: {shown[0]})" if len(shown) > 1 else "".join(shown)
        ax.set(title=f"{title}: {which}" if which else title, xlabel="epoch" if unknown else "minutes")
        if unknown:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            ax.set_xlim(left=0)
        for (n, run), word in itertools.product(enumerate(runs), shown):
            pale = {"color": blend(look(n)["color"]), "linewidth": 1.2} if word != shown[-1] else {}
            _curve(ax, run, columns[word], {**look(n), **pale})
        if not shown:
            ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center")
    names = [run.name for run in runs]
    entries: list[tuple[Artist, str]] = []
    for n, run in enumerate(runs):
        name = run.name if names.count(run.name) == 1 else f"{run.name} ({n + 1})"
        entries.append((Line2D([], [], **{**look(n), "marker": ""}), f"{name}: {_result(run)}"))
    legend_below(figure, entries)
    return figure


def _curve(ax: "Axes", run: Run, column: str, how: dict[str, Any]) -> None:
    points = list(zip(run.xs, run.curves.get(column, ()), strict=False))
    if column in AP:  # measured every few epochs: no gap
        points = [point for point in points if not math.isnan(point[1])]
    if points:
        known = [False, *(not math.isnan(y) for _, y in points), False]
        alone = [i for i in range(len(points)) if known[i : i + 3] == [False, True, False]]
        marked = range(len(points)) if column in AP else alone
        ax.plot(*zip(*points, strict=True), **how, markersize=4, markevery=list(marked))


def _result(run: Run) -> str:
    for column, words in (("eval_top1", "top-1"), ("mask_AP", "mask AP"), ("box_AP", "box AP")):
        if found := best(run, column):
            return f"best {words} {found[1]:.2f} % at epoch {found[0]}, last epoch {run.epochs[-1]}"
    return f"no top-1 or AP in its summary.csv, last epoch {run.epochs[-1]}"


@style()
def scatter(charts: Sequence[tuple[str, str, Mapping[str, tuple[float, float]]]]) -> "Figure":
    """Panels of points side by side, numbered, with a legend below that gives their names and places (x, y).

    Args:
        charts: title, label of the horizontal axis, and points (x, y) by name, one or more.
    """
    names = list(dict.fromkeys(name for _, _, points in charts for name in points))
    figure, axes = panels(len(charts))
    entries: dict[str, Artist] = {}
    for ax, (title, label, points) in zip(axes, charts, strict=True):
        ax.set(title=title, xlabel=label)
        ax.margins(0.08)
        for name, (x, y) in points.items():
            [entries[name]] = ax.plot([x], [y], **{**look(names.index(name)), "linestyle": ""}, markersize=6)
        for axis, values in zip("xy", zip(*points.values(), strict=True), strict=True):
            if min(values) < max(values) / 2:
                ax.set(**{f"{axis}lim": (0, 1.08 * max(values))})  # from zero: distances then show ratios
    labels = []
    for number, name in enumerate(names, 1):
        places = ["({:.3g}, {:.3g})".format(*points[name]) if name in points else "-" for _, _, points in charts]
        labels.append(f"{number}  {name}: {', '.join(places)}")
    legend_below(figure, [(entries[name], label) for name, label in zip(names, labels, strict=True)])
    figure.draw_without_rendering()  # the places of points in pixels are known now
    for ax, (_, _, points) in zip(axes, charts, strict=True):
        _number(ax, {names.index(name): point for name, point in points.items()})
    return figure


def _number(ax: "Axes", points: Mapping[int, tuple[float, float]]) -> None:
    """A number next to each point, over no other number and no point."""
    from matplotlib.transforms import Bbox

    pixel = ax.figure.dpi / 72
    taken = [Bbox([p - 4 * pixel, p + 4 * pixel]) for p in ax.transData.transform(list(points.values()))]
    taken.append(ax.title.get_window_extent())
    for n, point in points.items():
        text = ax.annotate(str(n + 1), point, (0, 0), textcoords="offset points", ha="center", va="center")
        text.set(color=look(n)["color"], fontsize=8, in_layout=False)
        for radius, angle in itertools.product((9, 13, 18, 24, 32, 42, 54), range(45, 405, 30)):
            text.set_position((radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))))
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)

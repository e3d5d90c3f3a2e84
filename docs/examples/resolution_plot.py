"""Memory and time over image size on logarithmic axes, as `resolution.py` measured them."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from resolution import OUT_OF_MEMORY, Measurement, exponent

from timm_halonet.plotting import _FINE, COLORS, LEGEND_ROW, MARGIN, PANEL, _line, _text


def draw(found: Sequence[Measurement]) -> Image.Image:
    """Memory on the left, time on the right, over the image's side; a colour a model, x where it ran out of memory.

    The grey line grows with pixels, from the first model's last figure back.

    Returns:
        an RGB picture of 1220 x (400 + 20 a model) pixels.

    Raises:
        ValueError: more models than there are colours (8), or nothing measured.
    """
    models = list(dict.fromkeys(m.model for m in found))
    if len(models) > len(COLORS) or not any(m.bytes or m.seconds for m in found):
        raise ValueError(f"1 to {len(COLORS)} models with figures fit one picture, got {len(models)}")
    left, top, right, bottom = MARGIN
    panel_width, panel_height = left + PANEL[0] + right, top + PANEL[1] + bottom
    size = (2 * panel_width, panel_height + LEGEND_ROW * len(models) + 10)
    sheet = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
    pen = ImageDraw.Draw(sheet)
    mode = found[0].mode
    _panel(pen, (left, top), f"memory of a {mode} step, MiB", found, models, "bytes", 2**20)
    _panel(pen, (panel_width + left, top), f"time of a {mode} step, s", found, models, "seconds", 1)
    note = "grey: in proportion to pixels; x: out of memory"
    _text(pen, (panel_width + left, panel_height + LEGEND_ROW / 2), note, "lm")
    for n, model in enumerate(models):
        y = panel_height + LEGEND_ROW * n + LEGEND_ROW / 2
        _line(pen, [(left, y), (left + 30, y)], COLORS[n], 3)
        powers = [exponent(found, model, quantity) for quantity in ("bytes", "seconds")]
        grows = [f"{what} with pixels^{x:.2f}" for what, x in zip(("memory", "time"), powers, strict=True) if x]
        _text(pen, (left + 40, y), f"{model}: {', '.join(grows) or 'one size'}", "lm")
    return sheet.reduce(_FINE)


def _panel(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    found: Sequence[Measurement],
    models: Sequence[str],
    quantity: str,
    unit: int,
) -> None:
    left, top = corner
    right, bottom = left + PANEL[0], top + PANEL[1]
    _text(pen, ((left + right) / 2, top - 18), title, "mm")
    _text(pen, ((left + right) / 2, bottom + 36), "image, pixels a side", "mm")
    curves = [
        [(m.size, getattr(m, quantity) / unit) for m in found if m.model == n and getattr(m, quantity)] for n in models
    ]
    values = [value for curve in curves for _, value in curve]
    sizes = sorted({m.size for m in found})
    if not values:
        _text(pen, ((left + right) / 2, (top + bottom) / 2), "no values", "mm")
        return
    ticks = log_ticks(min(values), max(values))
    span_x = math.log(sizes[-1] / sizes[0]) or 1.0

    def place(size: float, value: float) -> tuple[float, float]:
        x = left + PANEL[0] * (0.04 + 0.92 * math.log(size / sizes[0]) / span_x)
        return x, bottom - PANEL[1] * math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])

    for size in sizes:
        px = place(size, ticks[0])[0]
        _line(pen, [(px, top), (px, bottom + 5)], "#e4e4e4", 1)
        _text(pen, (px, bottom + 16), f"{size}", "mm")
    for value in ticks:
        py = place(sizes[0], value)[1]
        _line(pen, [(left - 5, py), (right, py)], "#e4e4e4", 1)
        _text(pen, (left - 10, py), f"{value:g}", "rm")
    _line(pen, [(left, top), (left, bottom), (right, bottom)], "#606060", 1)
    reference = next(curve for curve in curves if curve)[-1]
    start = max(sizes[0], reference[0] * math.sqrt(ticks[0] / reference[1]))
    _line(pen, [place(start, reference[1] * (start / reference[0]) ** 2), place(*reference)], "#b0b0b0", 2)
    for n, curve in enumerate(curves):
        points = [place(*point) for point in curve]
        if len(points) > 1:
            _line(pen, points, COLORS[n], 3)
        for x, y in points:
            pen.ellipse([_FINE * v for v in (x - 3, y - 3, x + 3, y + 3)], fill=COLORS[n])
        for m in found:
            if m.model == models[n] and m.error == OUT_OF_MEMORY:
                x, y = place(m.size, ticks[-1])[0] + 12 * n - 20, top + 8  # beside each other
                for sign in (1, -1):
                    _line(pen, [(x - 4, y - 4 * sign), (x + 4, y + 4 * sign)], COLORS[n], 2)


def log_ticks(low: float, high: float) -> list[float]:
    """From at or below `low` to at or above `high`: 1, 2 and 5 times powers of ten, or the powers alone where many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(first, last) for step in steps]
    below = max(i for i, tick in enumerate(ticks) if tick <= low)
    above = next(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[min(below, above - 1) if above else 0 : max(above, below + 1) + 1]

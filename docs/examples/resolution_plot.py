"""Memory and time over image size on logarithmic axes, as `resolution.py` measured them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resolution import OUT_OF_MEMORY, Measurement, exponent

from timm_halonet.report.plots import GREY, legend_below, look, panels, style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


@style()
def draw(found: Sequence[Measurement]) -> "Figure":
    """Memory (left) and time (right) over the image's side; a line for each model, x where it ran out of memory.

    The grey line grows with pixels, from the first model's last figure back.

    Raises:
        ValueError: nothing measured.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not any(m.bytes or m.seconds for m in found):
        raise ValueError(f"there are no figures to draw in {len(found)} measurements")
    models = list(dict.fromkeys(m.model for m in found))
    sizes = sorted({m.size for m in found})
    figure, axes = panels(2)
    entries: list[tuple[Artist, str]] = []
    lost = [m for m in found if m.error == OUT_OF_MEMORY]
    kinds = (("bytes", "memory of a {} step, MiB", 2**20), ("seconds", "time of a {} step, s", 1))
    for ax, (quantity, title, unit) in zip(axes, kinds, strict=True):
        curves = {  # sizes and values of each model
            m: [(f.size, getattr(f, quantity) / unit) for f in found if f.model == m and getattr(f, quantity)]
            for m in models
        }
        ax.set(title=title.format(found[0].mode), xlabel="image, pixels a side", xscale="log", yscale="log")
        values = [value for curve in curves.values() for _, value in curve]
        if not values:
            ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center")
            continue
        size, value = next(curve for curve in curves.values() if curve)[-1]
        [grey] = ax.plot(sizes, [value * (x / size) ** 2 for x in sizes], color=GREY, linestyle=(0, (1, 1)))
        entries = []
        for n, (model, curve) in enumerate(curves.items()):
            [line] = ax.plot([x for x, _ in curve], [y for _, y in curve], **look(n), markersize=4)
            powers = [(what, exponent(found, model, q)) for what, q in (("memory", "bytes"), ("time", "seconds"))]
            grows = ", ".join(f"{what} with pixels^{power:.2f}" for what, power in powers if power)
            entries.append((line, f"{model}: {grows or 'one size'}"))
        for n, m in enumerate(lost):  # below each other at the top
            ax.plot(
                [m.size],
                [0.98 - 0.05 * n],
                "x",
                color=look(models.index(m.model))["color"],
                transform=ax.get_xaxis_transform(),
            )
        entries.append((grey, "in proportion to pixels"))
        ax.set_ylim(min(values) / 1.5, max(values) * 2)
        ax.set_xticks(sizes, map(str, sizes))
        ax.xaxis.set_minor_locator(NullLocator())
        few = max(values) < 300 * min(values)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if lost:
        entries.append((Line2D([], [], marker="x", linestyle="", color="#606060"), "out of memory at this size"))
    legend_below(figure, entries)
    return figure

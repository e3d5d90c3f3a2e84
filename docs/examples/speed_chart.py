"""`python docs/examples/speed_chart.py`: the README's chart of speed, from the figures in docs/reports/speed.json."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_halonet.report.plots import COLORS, GREY, panels, save, style

DOCS = Path(__file__).parents[1]
MODELS = {  # name in the file -> label
    "timm halonet_h1": "halonet_h1, timm's",
    "halonet_h1": "halonet_h1, this package's",
    "resnet26t": "resnet26t",
    "resnet50@224": "resnet50 (224 px)",
}
STAGES = ("64x64", "32x32", "16x16")


def layer_speed(figures: dict[str, Any], mode: str, backend: str = "default") -> float:
    """Times the speed of timm's attention layer in float32: the geometric mean over stages 1 to 3."""
    cases = [figures["cases"][f"layer/{stage}/float32/{mode}"] for stage in STAGES]
    return math.prod(case["timm eager"] / case[backend] for case in cases) ** (1 / len(cases))


@style()
def draw(figures: dict[str, Any]):
    """Images a second of whole models, inference on the left and training on the right."""
    figure, axes = panels(2)
    figure.set_size_inches(6.4, 1.9)
    for ax, mode in zip(axes, ("inference", "training"), strict=True):
        times = figures["cases"][f"model/float32/{mode}"]
        speeds = [figures["batch"] / times[name] * 1000 for name in MODELS]
        colors = [COLORS[1] if name == "halonet_h1" else GREY for name in MODELS]
        bars = ax.barh(list(MODELS.values()), speeds, color=colors)
        ax.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
        ax.set(title=f"{mode}, images a second", xlim=(0, 1.15 * max(speeds)))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    axes[1].set_yticklabels([])
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the chart and prints the figures of the README's table."""
    parser = argparse.ArgumentParser(prog="python docs/examples/speed_chart.py", description=__doc__)
    parser.add_argument("--json", type=Path, default=DOCS / "reports" / "speed.json")
    parser.add_argument("--plot", type=Path, default=DOCS / "images" / "speed.png")
    args = parser.parse_args(argv)
    figures = json.loads(args.json.read_text(encoding="utf-8"))
    for backend in ("default", "blocked"):
        speeds = (f"{layer_speed(figures, mode, backend):.2f}x {mode}" for mode in ("forward", "training"))
        print(f"attention layer, {backend}: {', '.join(speeds)}")
    print(save(draw(figures), args.plot))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python docs/examples/choosing.py`: the chart of docs/models/choosing.md, and the figures behind it.

    python docs/examples/choosing.py --measure   # a few minutes; writes docs/models/choosing.json
    python docs/examples/choosing.py             # draws docs/models/choosing.png from it

Accuracies are what papers and publishers report on ImageNet-1k. Parameters and multiply-adds are counted. Images a
second are measured: one image at a time, float32, one thread, all models in turns, the median of the rounds, in seconds
of CPU time, so that a second process on the core counts little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.transforms import Bbox

import timm_halonet
from timm_halonet.files import whole_file
from timm_halonet.registry import multiply_adds
from timm_halonet.report.machine import machine, machine_line
from timm_halonet.report.markdown import replace_region
from timm_halonet.report.plots import COLORS, MARKERS, save, style

FOLDER = Path(__file__).parents[1] / "models"
# family -> model -> (image size, reported top-1); timm's halo models run under `accelerate`
FAMILIES: dict[str, dict[str, tuple[int, float]]] = {
    "HaloNet, paper": {
        "halonet_h0": (256, 77.9),
        "halonet_h1": (256, 79.9),
        "halonet_h2": (256, 80.4),
        "halonet_h3": (320, 81.9),
        "halonet_h4": (384, 83.3),
        "halonet_h5": (448, 84.0),
        "halonet_h6": (512, 84.4),
        "halonet_h7": (600, 84.9),
    },
    "U-HaloNet, weights": {
        "uhalonet_micro": (224, 75.8),
        "uhalonet_tiny": (224, 83.0),
        "uhalonet_small": (224, 84.0),
        "uhalonet_base": (224, 84.6),
    },
    "timm's halo models, weights": {
        "halonet26t": (256, 79.13),
        "eca_halonext26ts": (256, 79.52),
        "sehalonet33ts": (256, 80.98),
        "haloregnetz_b": (224, 81.06),
        "halonet50ts": (256, 81.64),
        "halo2botnet50ts_256": (256, 82.08),
    },
    "related, paper": {
        "lesa_resnet50": (224, 79.55),
        "focal_transformer_tiny": (224, 82.2),
        "eamlp_14": (224, 78.9),
    },
    "timm's, to compare": {
        "resnet50": (224, 80.4),  # "ResNet strikes back", A1
        "swin_tiny_patch4_window7_224": (224, 81.3),
    },
}
TIMMS = "timm's halo models, weights"


def models() -> Iterator[tuple[str, str, int, float]]:
    """Family, name, image size and reported top-1 of every model."""
    for family, members in FAMILIES.items():
        for name, (size, top1) in members.items():
            yield family, name, size, top1


def measure(rounds: int) -> dict[str, Any]:
    """The machine, and a row for each model."""
    torch.set_num_threads(1)
    found = {"machine": machine("cpu"), "rounds": rounds, "models": []}
    steps = {}
    for family, name, size, top1 in models():
        model = timm.create_model(name).eval()
        parameters = sum(p.numel() for p in model.parameters())
        macs = multiply_adds(timm.create_model(name).eval().to("meta"), size)
        if family == TIMMS:
            timm_halonet.accelerate(model)
        model = model.to(memory_format=torch.channels_last)
        steps[name] = model, torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
        row = dict(family=family, model=name, image=size, top1=top1, parameters=parameters, macs=macs)
        found["models"].append(row)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        for model, image in steps.values():
            model(image)
        for _ in range(rounds):
            for name, (model, image) in steps.items():
                begin = time.process_time()
                model(image)
                seconds[name].append(time.process_time() - begin)
    for row in found["models"]:
        row["images_per_second"] = round(1 / statistics.median(seconds[row["model"]]), 3)
    return found


@style()
def draw(found: dict[str, Any]):
    """Top-1 over parameters, multiply-adds and images a second, a colour for each family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 11))
    FigureCanvasAgg(figure)
    charts = (
        ("parameters, millions", lambda row: row["parameters"] / 1e6),
        ("multiply-adds of one image, G", lambda row: row["macs"] / 1e9),
        ("images a second of one CPU core", lambda row: row["images_per_second"]),
    )
    axes = figure.subplots(3, 1)
    for ax, (label, value) in zip(axes, charts, strict=True):
        ax.set(xlabel=label, ylabel="reported ImageNet top-1, %", xscale="log")
        for n, family in enumerate(FAMILIES):
            rows = [row for row in found["models"] if row["family"] == family]
            points = [(value(row), row["top1"]) for row in rows]
            line = "-" if "HaloNet" in family else "none"  # sizes of one design
            ax.plot(*zip(*points, strict=True), linestyle=line, marker=MARKERS[n], color=COLORS[n], label=family)
        ax.margins(x=0.12, y=0.1)
        ax.set_xticks(*ticks(ax.get_xlim()))
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.canvas.draw()  # fixes the layout
    figure.set_layout_engine("none")
    for ax, (_, value) in zip(axes, charts, strict=True):
        write_names(ax, [(value(row), row["top1"]) for row in found["models"]], found["models"])
    return figure


def write_names(ax, points: Sequence[tuple[float, float]], rows: Sequence[dict[str, Any]]) -> None:
    """The model's name next to each point, on the side where the fewest names and points are in the way."""
    colors = dict(zip(FAMILIES, COLORS, strict=False))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(points)]
    for point, row in zip(points, rows, strict=True):
        text, best = ax.annotate(short(row["model"]), point, fontsize=7, color=colors[row["family"]]), None
        for dx, dy in ((6, -3), (-6, -3), (0, 6), (0, -12), (6, 4), (6, -10), (-6, 4), (-6, -10), (10, 12), (10, -18)):
            text.set(position=(dx, dy), horizontalalignment="left" if dx > 0 else "right" if dx else "center")
            text.anncoords = "offset points"
            box = text.get_window_extent()
            cost = sum(box.overlaps(other) for other in taken) + 5 * (not ax.bbox.padded(4).containsx(box.x1))
            if best is None or cost < best[0]:
                best = cost, (dx, dy), text.get_horizontalalignment(), box
        text.set(position=best[1], horizontalalignment=best[2])
        taken.append(best[3])


def short(name: str) -> str:
    """A model's name as the chart writes it."""
    name = name.removesuffix("_patch4_window7_224").replace("focal_transformer", "focal")
    size = name.removeprefix("halonet_h")
    return f"H{size}" if size.isdigit() else name.replace("uhalonet", "U-HaloNet")


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"Measured on: {machine_line(found['machine'])}.", ""]
    lines += [
        "| model | | image | top-1, % | parameters, M | multiply-adds, G | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["models"]:
        sizes = f"{row['parameters'] / 1e6:.1f} | {row['macs'] / 1e9:.1f} | {row['images_per_second']:.3g}"
        lines.append(f"| `{row['model']}` | {row['family']} | {row['image']} | {row['top1']} | {sizes} |")
    return "\n".join(lines)


def ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """1, 2 and 5 times powers of ten within the limits."""
    values = [m * 10**p for p in range(-2, 4) for m in (1, 2, 5)]
    inside = [value for value in values if limits[0] <= value <= limits[1]]
    return inside, [f"{value:g}" for value in inside]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures if asked to, then draws."""
    parser = argparse.ArgumentParser(prog="python docs/examples/choosing.py", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure anew; without it, draw what the file has")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=FOLDER / "choosing.json")
    parser.add_argument("--plot", type=Path, default=FOLDER / "choosing.png")
    parser.add_argument("--markdown", type=Path, default=FOLDER / "choosing.md", help="a page with <!-- choosing -->")
    args = parser.parse_args(argv)
    if args.measure:
        with whole_file(args.json) as temporary:
            temporary.write_text(json.dumps(measure(args.rounds), indent=1) + "\n", encoding="utf-8")
    found = json.loads(args.json.read_text(encoding="utf-8"))
    replace_region(args.markdown, "<!-- choosing -->", "<!-- /choosing -->", table(found))
    print(save(draw(found), args.plot))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

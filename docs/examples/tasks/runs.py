"""What the tasks have in common: options, one training run a variant and seed, CSV, table and picture."""

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import nn

from timm_halonet.photos import choose_device
from timm_halonet.report.machine import machine, machine_line
from timm_halonet.report.markdown import around_region, replace_region
from timm_halonet.report.plots import check_output, look, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEED = 1_000_000  # of the data that models are judged on, the same for all of them
Batch = tuple[torch.Tensor, torch.Tensor]
Row = dict[str, str]  # a line of the CSV


class Task:
    """One comparison. Subclasses say what is trained, on what, and how it is judged."""

    name: str  # of the command, its files and the marks in a Markdown file
    variants: ClassVar[dict[str, str]]  # what is compared: name -> words for the table
    scores: ClassVar[dict[str, str]]  # columns of the CSV, in percent -> words for the table; the first is what counts
    options: ClassVar[dict[str, tuple[Any, str]]]  # further ones, of their default's type: name -> (default, help)
    defaults: ClassVar[dict[str, Any]]  # for steps, batch_size, lr, test_size

    def model(self, variant: str, args: argparse.Namespace) -> nn.Module:
        """A new model for one of `variants`, on the CPU."""
        raise NotImplementedError

    def data(self, count: int, args: argparse.Namespace, generator: torch.Generator) -> Batch:
        """Inputs and targets, `count` of each, on the CPU."""
        raise NotImplementedError

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The training loss, a scalar."""
        raise NotImplementedError

    def judge(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """The scores, in percent."""
        raise NotImplementedError

    def notes(self, args: argparse.Namespace) -> str:
        """A sentence on what is reached without any model."""
        raise NotImplementedError

    def example(self, args: argparse.Namespace) -> Image.Image:
        """A picture of one input and target."""
        raise NotImplementedError


def main(task: Task, argv: Sequence[str] | None = None) -> int:
    """Trains what the CSV does not have yet, then writes table and picture; returns the exit code."""
    args = parse(task, argv)
    try:
        run(task, args)
    except (ValueError, RuntimeError, OSError) as e:
        print(f"{task.name}: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{task.name}: interrupted; finished runs are in {args.csv}, the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse(task: Task, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a task's command, its defaults filled in."""
    doc = (sys.modules[type(task).__module__].__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python docs/examples/tasks/{task.name}.py", description=doc)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"training steps of each run (default {task.defaults['steps']})")
    length.add_argument(
        "--minutes", type=float, help="instead: as many steps, the same for all, as let the whole comparison take this"
    )
    length.add_argument("--quick", action="store_true", help="a few steps, one seed: only to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--variants", nargs="+", choices=task.variants, metavar="NAME", help=", ".join(task.variants))
    parser.add_argument("--batch-size", type=int, default=task.defaults["batch_size"])
    parser.add_argument("--lr", type=float, default=task.defaults["lr"], help="the highest; one cycle, AdamW")
    parser.add_argument("--test-size", type=int, help=f"held-out samples (default {task.defaults['test_size']})")
    for name, (default, text) in task.options.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default {default})")
    parser.add_argument("--device", default="cpu", help="cpu (default), auto, cuda, mps ...")
    parser.add_argument("--csv", help=f"a line for each run; runs in it are not repeated (default {task.name}.csv)")
    parser.add_argument("--png", help=f"picture (default {task.name}.png)")
    parser.add_argument("--markdown", help=f"write the table between <!-- {task.name} --> and <!-- /{task.name} -->")
    args = parser.parse_args(argv)
    stem = f"{task.name}-quick" if args.quick else task.name
    args.csv, args.png = args.csv or f"{stem}.csv", args.png or f"{stem}.png"
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.variants = args.variants or list(task.variants)
    args.test_size = args.test_size or (32 if args.quick else task.defaults["test_size"])
    if args.steps is None and args.minutes is None:
        args.steps = 10 if args.quick else task.defaults["steps"]
    for name in ("batch_size", "test_size", "lr", "minutes", "steps"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def run(task: Task, args: argparse.Namespace) -> None:
    """Train what the CSV lacks, then write table and picture.

    Raises:
        ValueError: a file that cannot be written, or a CSV of other settings.
    """
    check_output(args.png)  # now, not after the training
    for file in (args.csv, args.png, args.markdown):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist")
    marks = (f"<!-- {task.name} -->", f"<!-- /{task.name} -->")
    if args.markdown:
        around_region(Path(args.markdown), *marks)
    device = choose_device(args.device)
    where = machine_line(machine(device.type))
    rows = read_rows(task, args)
    if args.steps is None:
        args.steps = int(next(iter(rows.values()))["steps"]) if rows else _steps_within(task, args, device)
    check_rows(task, args, rows)
    runs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    missing = [r for r in runs if r not in rows]
    print(f"{task.name}: {len(runs)} runs of {args.steps} steps, {len(runs) - len(missing)} of them done; {where}")
    for number, (variant, seed) in enumerate(missing, len(runs) - len(missing) + 1):
        row = train(task, variant, seed, args, device)
        append_row(Path(args.csv), row)
        rows[variant, seed] = row
        result = ", ".join(f"{words} {row[score]} %" for score, words in list(task.scores.items())[:2])
        print(f"{number}/{len(runs)}  {variant}, seed {seed}: {result}; {row['seconds']} s", flush=True)
    shown = [rows[r] for r in runs]
    picture = save(draw(task, args, shown), args.png)
    table = markdown_table(task, args, shown)
    print(f"\n{table}\n\n{args.csv}: {len(shown)} runs; {picture}")
    if args.markdown:
        link = os.path.relpath(args.png, Path(args.markdown).absolute().parent)
        text = f"Measured on: {where}.\n\n{table}\n\n{task.notes(args)}\n\n![{task.name}, every run]({link})"
        replace_region(Path(args.markdown), *marks, text)


# ---- one run -----------------------------------------------------------------------------------------------------


def train(task: Task, variant: str, seed: int, args: argparse.Namespace, device: torch.device) -> Row:
    """One training run and its scores on the held-out samples. Same seed: same data in the same order."""
    from huggingface_hub.utils import tqdm

    started = time.perf_counter()
    torch.manual_seed(seed)
    model = task.model(variant, args).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between updates: a log wants few
    with tqdm(total=args.steps, desc=f"{variant}, seed {seed}", leave=False, mininterval=interval) as bar:
        for inputs, targets in batches(task, args, seed, args.steps):
            loss = task.loss(model(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    seconds = time.perf_counter() - started
    inputs, targets = task.data(args.test_size, args, torch.Generator().manual_seed(TEST_SEED))
    with torch.no_grad():
        scores = task.judge(model.eval(), inputs.to(device), targets.to(device))
    return {
        "variant": variant,
        "seed": str(seed),
        "steps": str(args.steps),
        "settings": settings(task, args),
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "seconds": f"{seconds:.1f}",
        **{name: f"{scores[name]:.2f}" for name in task.scores},
    }


def batches(task: Task, args: argparse.Namespace, seed: int, steps: int) -> Iterator[Batch]:
    """Fresh samples for every step, made 16 steps at a time, which is cheaper."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, steps, 16):
        n = min(16, steps - first)
        inputs, targets = task.data(n * args.batch_size, args, generator)
        yield from zip(inputs.split(args.batch_size), targets.split(args.batch_size), strict=True)


def _steps_within(task: Task, args: argparse.Namespace, device: torch.device) -> int:
    """Steps a run, the same for all, so that all runs together take about `args.minutes`."""
    a_step, left = 0.0, args.minutes * 60
    for variant in args.variants:
        times = []
        for args.steps in (2, 10):  # the first warms up; making the model and judging it count as well
            started = time.perf_counter()
            train(task, variant, 0, args, device)
            times.append(time.perf_counter() - started)
        a_step += max(times[1] - times[0], 1e-3) / 8
        left -= times[0] * (len(args.seeds) + 1)
    return max(10, int(left / (a_step * len(args.seeds))))


# ---- the CSV -----------------------------------------------------------------------------------------------------


def settings(task: Task, args: argparse.Namespace) -> str:
    """All that a run's scores depend on, apart from its variant, seed and steps."""
    names = ("batch_size", "lr", "test_size", *task.options)
    return " ".join(f"{name}={getattr(args, name)}" for name in names)


def columns(task: Task) -> list[str]:
    """The columns of the CSV, in order."""
    return ["variant", "seed", "steps", "settings", "parameters", "seconds", *task.scores]


def read_rows(task: Task, args: argparse.Namespace) -> dict[tuple[str, int], Row]:
    """The runs that the CSV has, by variant and seed.

    Raises:
        ValueError: the file is another's.
    """
    path = Path(args.csv)
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != columns(task):
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, expected {columns(task)}; name another --csv"
            )
        # a line that was cut off, by a full disk say, is a run that was not finished
        return {(row["variant"], int(row["seed"])): row for row in reader if None not in row.values()}


def check_rows(task: Task, args: argparse.Namespace, rows: dict[tuple[str, int], Row]) -> None:
    """Figures of different settings must not stand in one table.

    Raises:
        ValueError: the CSV's runs have other settings, which are named.
    """
    ours = f"steps={args.steps} {settings(task, args)}"
    for row in rows.values():
        theirs = f"steps={row['steps']} {row['settings']}"
        if theirs != ours:
            raise ValueError(
                f"{args.csv} has runs with other settings, {theirs}, asked for {ours}; give the same or another --csv"
            )


def append_row(path: Path, row: Row) -> None:
    """Add a line to the CSV, with a header if the file is new."""
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# ---- table and picture -------------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a dash where there was nothing to judge."""
    if any(map(math.isnan, values)):
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def markdown_table(task: Task, args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """Markdown: a row for each variant, its scores as mean and standard deviation over the seeds."""
    lines = ["| | parameters | " + " | ".join(f"{words}, %" for words in task.scores.values()) + " | s a run |"]
    lines.append("|---" * (len(task.scores) + 3) + "|")
    for variant in args.variants:
        own = [row for row in rows if row["variant"] == variant]
        cells = [mean_and_spread([float(row[score]) for row in own]) for score in task.scores]
        seconds = statistics.median(float(row["seconds"]) for row in own)
        cells = [task.variants[variant], f"{int(own[0]['parameters']):,}", *cells, f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    what = "mean ± standard deviation" if len(args.seeds) > 1 else "one run each"
    seeds = f"seeds {', '.join(map(str, args.seeds))}"
    return "\n".join([*lines, "", f"({what}, {seeds}; {args.steps} steps; {settings(task, args)})"])


@style()
def draw(task: Task, args: argparse.Namespace, rows: Sequence[Row]) -> "Figure":
    """The example, and below it the first score: a circle a run, a line at each variant's mean."""
    from matplotlib.figure import Figure

    example = task.example(args)
    score, words = next(iter(task.scores.items()))
    heights = (2.2, 0.6 + 0.36 * len(args.variants))
    figure = Figure(figsize=(7, sum(heights)))
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    top.imshow(example, interpolation="nearest")
    top.set_axis_off()
    for n, variant in enumerate(args.variants):
        values = [float(row[score]) for row in rows if row["variant"] == variant]
        bottom.plot(values, [n] * len(values), "o", color=look(n)["color"], fillstyle="none", markersize=7)
        bottom.plot([statistics.fmean(values)], [n], "|", color=look(n)["color"], markersize=18)
    bottom.set_yticks(range(len(args.variants)), [task.variants[v] for v in args.variants])
    bottom.set_ylim(len(args.variants) - 0.5, -0.5)
    bottom.set_xlabel(f"{words}, %, on held-out samples; a circle a run, a line the mean")
    return figure

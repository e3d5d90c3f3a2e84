"""Accuracy of several models after one short training of the same recipe and the same wall-clock time.

    python docs/examples/compare_families.py --train train.py --data-dir imagenette --minutes 30 --out runs

train.py is timm's. It has no time limit, and a cosine schedule must know its end, so each model is first timed on a
quarter of the photos, validation included, and then trained for as many epochs as fit. A run that takes longer after
all is stopped, and the table says so. What is done is not done again: after an interrupt, start the same command.

With --jobs N, N models train at a time, each on its own share of the cores: one core does more for a small model than
half of what two do. Timed under the same conditions, they are compared as fairly.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg_value
from timm.utils import ParseKwargs

from timm_halonet.benchmark.families import MODELS
from timm_halonet.files import whole_file
from timm_halonet.report.machine import machine, machine_line
from timm_halonet.report.markdown import replace_region
from timm_halonet.report.plots import check_output, draw_runs, save, scatter
from timm_halonet.report.summary import read_run

RECIPE = Path(__file__).with_name("comparison.yaml")
MARGIN = 0.95  # of the time is planned for: epochs do not take exactly alike
PART = 4  # one photo of so many is what a model is timed with
START, END = "<!-- accuracy -->", "<!-- /accuracy -->"


def command(args: argparse.Namespace, model: str, epochs: int, experiment: str, data_dir: str) -> list[str]:
    """The command line of train.py, for `epochs` epochs. Models built for one image size get the one in use."""
    size = args.img_size or recipe_size(args.recipe)
    line = [sys.executable, args.train, "--config", args.recipe, "--data-dir", data_dir, "--model", model]
    line += ["--epochs", str(epochs), "--output", args.out, "--experiment", experiment, "--device", args.device]
    line += ["--img-size", str(size)]
    kwargs = [f"img_size={size}"] if get_pretrained_cfg_value(model, "fixed_input_size") else []
    kwargs += own_kwargs(args).get(model, [])
    return [*line, "--model-kwargs", *kwargs] if kwargs else line


def own_kwargs(args: argparse.Namespace) -> dict[str, list[str]]:
    """KEY=VALUE texts of --model-kwargs, by model.

    Raises:
        ValueError: a model that is not compared, or no KEY=VALUE.
    """
    found = {}
    for model, *kwargs in args.model_kwargs:
        if model not in args.models or not kwargs or not all("=" in text for text in kwargs):
            expected = f"one of {', '.join(args.models)}, and KEY=VALUE after it"
            raise ValueError(f"--model-kwargs {' '.join([model, *kwargs])}: expected {expected}")
        found[model] = kwargs
    return found


def recipe_size(recipe: str) -> int:
    """Pixels a side.

    Raises:
        ValueError: the recipe does not say.
    """
    for line in Path(recipe).read_text().splitlines():
        if line.startswith("img_size:"):
            return int(line.split()[1])
    raise ValueError(f"{recipe} has no img_size, and no --img-size was given")


def shares(jobs: int) -> list[list[int]]:
    """The machine's cores in `jobs` equal parts; what is left over is not used, so that all are alike.

    Raises:
        ValueError: fewer than one job, or fewer cores than jobs.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}, one or more are possible")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = len(cores) // jobs
    if each < 1:
        raise ValueError(f"--jobs {jobs} needs as many cores, there are {len(cores)}")
    return [cores[n * each : (n + 1) * each] for n in range(jobs)]


def start(line: list[str], cores: Sequence[int], **pipes: Any) -> subprocess.Popen[str]:
    """The command as a process that has these cores alone, as far as the system can say so, and a thread a core."""
    env = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    process = subprocess.Popen(line, stderr=subprocess.STDOUT, text=True, env=env, **pipes)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    return process


def link_part(data_dir: Path, part: Path) -> float:
    """Makes a folder with links to every PART-th photo of each class of train and val, unless it is there.

    Returns:
        how many times its photos go into all of them

    Raises:
        ValueError: data_dir has no photos in train/CLASS or val/CLASS.
    """
    count = linked = 0
    for split in ("train", "val"):
        folders = [sorted(folder.iterdir()) for folder in (data_dir / split).glob("*") if folder.is_dir()]
        if not any(folders):
            raise ValueError(f"{data_dir}/{split}: expected a folder for each class, with photos in it")
        for file in (file for files in folders for file in files[::PART]):
            link = part / file.relative_to(data_dir)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file.absolute())
            linked += 1
        count += sum(map(len, folders))
    return count / linked


def time_epoch(line: list[str], log: Path, cores: Sequence[int]) -> tuple[float, float]:
    """Seconds up to the end of the first training step of a command that trains one epoch, and of a whole epoch.

    What happens once only, such as starting the processes that load the data, is not part of the epoch: the steps
    between the first and the last that train.py reports are timed, in training and in validation.

    Raises:
        RuntimeError: it failed, with the end of its log.
    """
    began = time.monotonic()
    seen: dict[str, list[tuple[float, int]]] = {}  # of training and each validation: when a step ended, and its number
    with log.open("w") as f, start(line, cores, stdout=subprocess.PIPE) as p:
        for text in p.stdout or ():
            f.write(text)
            if found := re.match(r"(Train|Test.*?):.*?\[ *(\d+)/\d+", text):
                seen.setdefault(found[1], []).append((time.monotonic() - began, int(found[2])))
    check(p.returncode, line, log)
    if "Train" not in seen:
        raise RuntimeError(f"{log} has no line of a training step; --train must be timm's train.py")
    epoch = 0.0
    for steps in seen.values():
        (first, a), (last, b) = steps[0], steps[-1]
        epoch += (last - first) / max(1, b - a) * (b + 1)
    return seen["Train"][0][0], epoch


def run(line: list[str], log: Path, cores: Sequence[int], seconds: float) -> tuple[float, bool]:
    """Wall-clock seconds that a command took, and whether it came to its end before `seconds` were over.

    Raises:
        RuntimeError: it failed, with the end of its log.
    """
    began = time.monotonic()
    with log.open("w") as f, start(line, cores, stdout=f) as p:
        try:
            check(p.wait(seconds), line, log)
        except subprocess.TimeoutExpired:
            p.kill()
            return time.monotonic() - began, False
        except BaseException:
            p.kill()
            raise
    return time.monotonic() - began, True


def check(code: int, line: list[str], log: Path) -> None:
    """Raises a RuntimeError with the log's last lines unless train.py returned 0."""
    if code:
        end = "\n".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(line)} returned {code}; {log} ends with\n{end}")


def measure(
    args: argparse.Namespace,
    model: str,
    result: dict[str, Any],
    cores: Sequence[int],
    parts: float,
    save: Callable[[], None],
) -> None:
    """Fills the model's `result`; what it has already stays. The photos to time with are one in `parts`."""
    out, budget = Path(args.out), 60 * args.minutes
    if "planned_epoch_seconds" not in result:
        print(f"{model}: timing an epoch", flush=True)
        shutil.rmtree(out / f"{model}.timing", ignore_errors=True)
        line = command(args, model, 1, f"{model}.timing", str(out / "part"))
        result["start_seconds"], seconds = time_epoch(line, out / f"{model}.timing.log", cores)
        result["planned_epoch_seconds"] = parts * seconds
        save()
    result["epochs"] = int((MARGIN * budget - result["start_seconds"]) / result["planned_epoch_seconds"])
    if result["epochs"] < 1:
        needed = result["start_seconds"] + result["planned_epoch_seconds"]
        raise RuntimeError(f"one epoch takes {needed:.0f} s with the start, the budget is {budget:.0f} s")
    if "seconds" not in result:
        print(f"{model}: {result['epochs']} epochs of {result['planned_epoch_seconds']:.0f} s", flush=True)
        shutil.rmtree(out / model, ignore_errors=True)  # of a run that was interrupted
        line = command(args, model, result["epochs"], model, args.data_dir)
        result["seconds"], result["finished"] = run(line, out / f"{model}.log", cores, budget)
    curves = read_run(out / model)
    result["top1"] = curves.curves["eval_top1"][-1]
    result["epochs_done"] = curves.epochs[-1] + 1


def epoch_seconds(row: dict[str, Any]) -> float:
    """The time of an epoch of a trained model; as planned where it was stopped within an epoch."""
    if not row["finished"]:
        return row["planned_epoch_seconds"]
    return (row["seconds"] - row["start_seconds"]) / row["epochs_done"]


def table(results: dict[str, dict[str, Any]], options: dict[str, Any], machine: str) -> str:
    """Markdown: a row for each model, with the accuracy of the last epoch, not of the best."""
    beside = f", {options['jobs']} models at a time" if options["jobs"] > 1 else ""
    where = f"{options['device']} ({options['cores']} of its cores a model)" if options["device"] == "cpu" else "a GPU"
    lines = [
        f"Measured on: {machine}.",
        "",
        f"{options['minutes']:g} minutes a model, on {where}{beside}, at {options['img_size']} px; top-1 on the"
        " validation split after the last epoch.",
        "",
        "| model | parameters | an epoch, s | epochs | top-1, % |",
        "|---|---|---|---|---|",
    ]
    for model, row in results.items():
        if "top1" not in row:
            lines.append(f"| {model} | | | | {row.get('error', 'not trained yet')} |")
            continue
        epochs = f"{row['epochs_done']}" if row["finished"] else f"{row['epochs_done']} of {row['epochs']}, stopped"
        name = " ".join([model, *options["model_kwargs"].get(model, [])])
        lines.append(f"| {name} | {row['parameters']:,} | {epoch_seconds(row):.0f} | {epochs} | {row['top1']:.2f} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: str) -> None:
    """The models as points."""
    done = {model: row for model, row in results.items() if "top1" in row}
    if not done:
        return
    by_size = {model: (row["parameters"] / 1e6, row["top1"]) for model, row in done.items()}
    by_time = {model: (epoch_seconds(row), row["top1"]) for model, row in done.items()}
    panels = [("top-1, %", "parameters, millions", by_size), ("top-1, %", "seconds an epoch", by_time)]
    save(scatter(panels), path)


def plot_curves(results: dict[str, dict[str, Any]], out: Path, path: str) -> None:
    """Loss and accuracy over wall-clock time."""
    done = {model: row for model, row in results.items() if "top1" in row}
    if done:
        runs = [replace(read_run(out / model), minutes=epoch_seconds(row) / 60) for model, row in done.items()]
        save(draw_runs(runs), path)


def main(argv: list[str] | None = None) -> int:
    """Train each model for the same wall-clock time, then write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE", help="timm's train.py")
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="FOLDER",
        help="a folder with train and val, each with a folder for each class",
    )
    parser.add_argument("--minutes", type=float, required=True, help="of wall-clock time a model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="train.py's output, logs, results.json")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--recipe", default=str(RECIPE), metavar="YAML", help="a --config of train.py (comparison.yaml)"
    )
    parser.add_argument("--img-size", type=int, help="in place of the recipe's")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="train.py's --model-kwargs for one of the models",
    )
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="models at a time, each on its share of the cores"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="accuracy over parameters and over the time of an epoch")
    parser.add_argument("--curves", metavar="PICTURE", help="loss and accuracy over wall-clock time")
    args = parser.parse_args(argv)
    for picture in filter(None, (args.plot, args.curves)):
        check_output(picture)  # now, not after hours of training

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    options = {"minutes": args.minutes, "device": args.device, "jobs": args.jobs, "recipe": args.recipe}
    options["img_size"] = args.img_size or recipe_size(args.recipe)
    options["cores"] = len(shares(args.jobs)[0])
    options["model_kwargs"] = own_kwargs(args)  # wrong ones are refused now, not after hours of training
    new = {"options": options, "machine": machine_line(machine(args.device)), "models": {}}
    state = json.loads(file.read_text()) if file.exists() else new
    if state["options"] != options:
        raise SystemExit(f"{file} is of another comparison, {state['options']}; name another --out")

    parts = link_part(Path(args.data_dir), out / "part")
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for share in shares(args.jobs):
        free.put(share)
    lock = threading.Lock()

    def save() -> None:
        with lock:  # copies: other threads go on with theirs
            rows = {model: dict(row) for model, row in state["models"].items()}
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps({**state, "models": rows}, indent=1) + "\n")

    def compare(model: str) -> None:
        result = state["models"][model]
        result.pop("error", None)
        cores = free.get()
        try:
            if not timm.is_model(model):
                raise RuntimeError("timm knows no model of this name")
            parser = argparse.ArgumentParser()
            parser.add_argument("--kwargs", nargs="*", default={}, action=ParseKwargs)  # as train.py understands them
            kwargs = parser.parse_args(["--kwargs", *options["model_kwargs"].get(model, [])]).kwargs
            built = timm.create_model(model, num_classes=10, **kwargs)
            result["parameters"] = sum(p.numel() for p in built.parameters())
            measure(args, model, result, cores, parts, save)
        except (RuntimeError, TypeError, ValueError) as e:  # TypeError: an argument that the model does not have
            print(f"{model}: {e}", file=sys.stderr)
            result["error"] = str(e).splitlines()[0]
        finally:
            free.put(cores)
        save()

    for model in args.models:  # first: a dictionary must not grow while another thread writes it down
        state["models"].setdefault(model, {})
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(compare, args.models))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = {model: state["models"][model] for model in args.models}
    text = table(results, options, state["machine"])
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    if args.plot:
        plot(results, args.plot)
    if args.curves:
        plot_curves(results, out, args.curves)
    return 1 if any("error" in row for row in results.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, OSError) as e:
        sys.exit(f"compare_families.py: {e}")

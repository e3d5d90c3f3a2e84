"""Accuracy of several models after one short training of the same recipe and the same wall-clock time.

    python docs/examples/compare_families.py --train train.py --data-dir imagenette --minutes 30 --out runs

train.py is timm's. It has no time limit, and a cosine schedule must know its end, so each model is first timed for one
epoch, validation included, and then trained for as many epochs as fit. A run that takes longer after all is stopped,
and the table says so. What is done is not done again: after an interrupt, start the same command.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg_value

from timm_halonet.benchmark.families import MODELS
from timm_halonet.benchmark.report import replace_region
from timm_halonet.plotting import read_run, scatter

RECIPE = Path(__file__).with_name("comparison.yaml")
MARGIN = 0.95  # of the time is planned for: epochs do not take exactly alike
START, END = "<!-- accuracy -->", "<!-- /accuracy -->"


def command(args: argparse.Namespace, model: str, epochs: int, experiment: str) -> list[str]:
    """Of train.py, for `epochs` epochs. Models that are built for one image size are told the recipe's."""
    line = [sys.executable, args.train, "--config", str(RECIPE), "--data-dir", args.data_dir, "--model", model]
    line += ["--epochs", str(epochs), "--output", args.out, "--experiment", experiment, "--device", args.device]
    if args.img_size:
        line += ["--img-size", str(args.img_size)]
    if get_pretrained_cfg_value(model, "fixed_input_size"):
        line += ["--model-kwargs", f"img_size={args.img_size or recipe_size()}"]
    return line


def recipe_size() -> int:
    return next(int(line.split()[1]) for line in RECIPE.read_text().splitlines() if line.startswith("img_size:"))


def time_epoch(line: list[str], log: Path) -> tuple[float, float]:
    """Seconds before the first training step of a command that trains one epoch, and from there to its end.

    Raises:
        RuntimeError: it failed, with the end of its log.
    """
    start, first = time.monotonic(), None
    with log.open("w") as f, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for text in p.stdout or ():
            f.write(text)
            if first is None and text.startswith("Train: 0 "):
                first = time.monotonic()
    check(p.returncode, line, log)
    first = first or start
    return first - start, time.monotonic() - first


def run(line: list[str], log: Path, seconds: float) -> tuple[float, bool]:
    """Wall-clock seconds that a command took, and whether it came to its end before `seconds` were over.

    Raises:
        RuntimeError: it failed, with the end of its log.
    """
    start = time.monotonic()
    try:
        with log.open("w") as f:
            done = subprocess.run(line, stdout=f, stderr=subprocess.STDOUT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return time.monotonic() - start, False
    check(done.returncode, line, log)
    return time.monotonic() - start, True


def check(code: int, line: list[str], log: Path) -> None:
    if code:
        end = "\n".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(line)} returned {code}; {log} ends with\n{end}")


def measure(args: argparse.Namespace, model: str, result: dict[str, Any], save) -> None:
    """Fills the model's `result`; what it has already stays."""
    out, budget = Path(args.out), 60 * args.minutes
    if "epoch_seconds" not in result:
        print(f"{model}: timing an epoch", flush=True)
        shutil.rmtree(out / f"{model}.timing", ignore_errors=True)
        line = command(args, model, 1, f"{model}.timing")
        result["start_seconds"], result["epoch_seconds"] = time_epoch(line, out / f"{model}.timing.log")
        save()
    result["epochs"] = int((MARGIN * budget - result["start_seconds"]) / result["epoch_seconds"])
    if result["epochs"] < 1:
        needed = result["start_seconds"] + result["epoch_seconds"]
        raise RuntimeError(f"one epoch takes {needed:.0f} s with the start, the budget is {budget:.0f} s")
    if "seconds" not in result:
        print(f"{model}: {result['epochs']} epochs of {result['epoch_seconds']:.0f} s", flush=True)
        shutil.rmtree(out / model, ignore_errors=True)  # of a run that was interrupted
        line = command(args, model, result["epochs"], model)
        result["seconds"], result["finished"] = run(line, out / f"{model}.log", budget)
    curves = read_run(out / model)
    result["top1"] = curves.curves["eval_top1"][-1]
    result["epochs_done"] = curves.epochs[-1] + 1


def table(results: dict[str, dict[str, Any]], minutes: float, device: str) -> str:
    """Markdown: a row a model, the accuracy that of the last epoch, not of the best."""
    lines = [
        f"{minutes:g} minutes a model, on {device}; top-1 on the validation split after the last epoch.",
        "",
        "| model | parameters | an epoch, s | epochs | top-1, % |",
        "|---|---|---|---|---|",
    ]
    for model, row in results.items():
        if "top1" not in row:
            lines.append(f"| {model} | | | | {row.get('error', 'not trained yet')} |")
            continue
        epochs = f"{row['epochs_done']}" if row["finished"] else f"{row['epochs_done']} of {row['epochs']}, stopped"
        lines.append(f"| {model} | {row['parameters']:,} | {row['epoch_seconds']:.0f} | {epochs} | {row['top1']:.2f} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: str) -> None:
    done = {model: row for model, row in results.items() if "top1" in row}
    if not done:
        return
    by_size = {model: (row["parameters"] / 1e6, row["top1"]) for model, row in done.items()}
    by_time = {model: (row["epoch_seconds"], row["top1"]) for model, row in done.items()}
    panels = [("top-1, %", "parameters, millions", by_size), ("top-1, %", "seconds an epoch", by_time)]
    scatter(panels).save(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE", help="timm's train.py")
    parser.add_argument("--data-dir", required=True, metavar="FOLDER", help="with train and val, a folder a class")
    parser.add_argument("--minutes", type=float, required=True, help="of wall-clock time a model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="train.py's output, logs, results.json")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--img-size", type=int, help="in place of the recipe's")
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    parser.add_argument("--plot", metavar="PNG", help="accuracy over parameters and over time")
    args = parser.parse_args(argv)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    options = {"minutes": args.minutes, "device": args.device, "img_size": args.img_size or recipe_size()}
    state = json.loads(file.read_text()) if file.exists() else {"options": options, "models": {}}
    if state["options"] != options:
        raise SystemExit(f"{file} is of another comparison, {state['options']}; name another --out")

    def save() -> None:
        file.write_text(json.dumps(state, indent=1) + "\n")

    for model in args.models:
        result = state["models"].setdefault(model, {})
        result.pop("error", None)
        try:
            if not timm.is_model(model):
                raise RuntimeError("timm knows no model of this name")
            built = timm.create_model(model, num_classes=10)
            result["parameters"] = sum(p.numel() for p in built.parameters())
            measure(args, model, result, save)
        except (RuntimeError, ValueError) as e:
            print(f"{model}: {e}", file=sys.stderr)
            result["error"] = str(e).splitlines()[0]
        save()
    results = {model: state["models"][model] for model in args.models}
    text = table(results, args.minutes, args.device)
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    if args.plot:
        draw(results, args.plot)
    return 1 if any("error" in row for row in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

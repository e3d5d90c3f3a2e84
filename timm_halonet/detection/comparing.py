"""Trained detectors side by side, from the files that training and evaluation left in their folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub import CONFIG_NAME
from .evaluation import METRICS
from .files import EVALUATION_NAME

START, END = "<!-- detect -->", "<!-- /detect -->"


def read_run(folder: Path) -> dict[str, Any]:
    """What is known of a run: `name`, `config` (config.json) and `scores` (evaluation.json).

    Raises:
        ValueError: a file that is missing or broken; with its path.
    """
    found: dict[str, Any] = {"name": folder.resolve().name}
    for key, name, command in (("config", CONFIG_NAME, "train"), ("scores", EVALUATION_NAME, "train or eval")):
        try:
            found[key] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder / name} does not exist; `timm-halonet detect {command}` writes it") from None
        except (OSError, ValueError) as e:
            raise ValueError(f"{folder / name} cannot be read: {e}") from None
    for key, of in (("backbone", "config"), ("training", "config"), ("box", "scores"), ("max_dets", "scores")):
        if key not in found[of]:
            name = CONFIG_NAME if of == "config" else EVALUATION_NAME
            raise ValueError(f"{folder / name} has no {key!r}: not one of a trained detector")
    return found


def compare(runs: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables, a row for each run: scores of masks, if any, then scores of boxes with time and memory.

    Args:
        runs: of `read_run`.

    Raises:
        ValueError: scores that do not compare, since other numbers of images or of detections an image count.
    """
    counts = [(run["scores"]["images"], run["scores"]["max_dets"]) for run in runs]
    if len(set(counts)) > 1:
        each = ", ".join(f"{run['name']} {a} and {b}" for run, (a, b) in zip(runs, counts, strict=True))
        raise ValueError(f"runs compare only over the same images and detections an image, these have {each}")
    images, limit = counts[0]
    machines = dict.fromkeys(run["scores"]["machine"] for run in runs if "machine" in run["scores"])
    lines = [f"Measured on: {'; '.join(machines)}.", ""] if machines else []
    masks = [run for run in runs if "mask" in run["scores"]]
    if masks:
        lines += ["Masks:", "", *_head("run", "backbone", "start", "seed", "steps", *METRICS)]
        lines += [_row(*_names(run), run["config"]["training"]["steps"], *_scores(run, "mask")) for run in masks]
        lines.append("")
    costs = ("parameters, M", "minutes", "s a step", "peak memory, MB", "s an image in evaluation")
    lines += ["Boxes, time and memory:", "", *_head("run", *METRICS, *costs)]
    for run in runs:
        training = run["config"]["training"]
        cost = (f"{training['parameters'] / 1e6:.1f}", training["minutes"], training["seconds_per_step"])
        lines.append(
            _row(
                run["name"], *_scores(run, "box"), *cost, training["peak_memory_mb"], run["scores"]["seconds_per_image"]
            )
        )
    return "\n".join([*lines, "", f"(AP in %, {images} images, at most {limit} detections an image.)"])


def _names(run: dict[str, Any]) -> tuple[str, str, str, int]:
    training = run["config"]["training"]
    start = "pretrained" if training["pretrained"] else "random"
    return run["name"], f"`{run['config']['backbone']}`", start, training["seed"]


def _scores(run: dict[str, Any], kind: str) -> list[str]:
    values = (run["scores"][kind][metric] for metric in METRICS)
    return ["-" if value is None else f"{100 * value:.1f}" for value in values]


def _head(*columns: str) -> list[str]:
    return [_row(*columns), "|---" * len(columns) + "|"]


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"

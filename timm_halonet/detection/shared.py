"""What the actions of `timm-halonet detect` share: their data, progress, scores on disk."""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import whole_file
from ..report.machine import machine, machine_line
from ..report.progress import progress_bar
from .dataset import DetectionDataset, Transform
from .layouts import open_dataset
from .storage import write_json

_QUIET_SECONDS = 30.0  # between lines about an evaluation in a log


def check_names(args: argparse.Namespace) -> None:
    """Checks that the options name both what is trained on and what is evaluated.

    Raises:
        ValueError: only one of the two is named, with the option that is missing; or a number does not fit.
    """
    if args.annotations and not args.val_annotations and not args.no_eval:
        raise ValueError("--annotations names what to train on: name --val-annotations too, or --no-eval")
    if args.val_annotations and not args.annotations:
        raise ValueError("--val-annotations needs --annotations")
    if args.eval_epochs < 0 or not -(2**63) <= args.seed < 2**63:
        raise ValueError(f"need --eval-epochs >= 0 and a --seed of 64 bits, got {args.eval_epochs} and {args.seed}")


def open_splits(
    args: argparse.Namespace, transform: Transform, masks: bool
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The data set to train on, and the one to evaluate or None."""
    where = (args.data, args.format)
    dataset = open_dataset(*where, args.train_split, transform, masks, annotations=args.annotations, images=args.images)
    if not dataset.has_objects():
        raise ValueError(f"{dataset.source}: the split {args.train_split!r} has no objects to train on")
    if args.no_eval or (args.split is None and not args.val_annotations):
        return dataset, None
    images = args.val_images or (args.images if args.val_annotations else None)
    held_out = open_dataset(*where, args.split, None, masks, annotations=args.val_annotations, images=images)
    held_out.match_categories(dataset.categories, f"the training set ({dataset.source})")
    held_out.check()
    return dataset, held_out


def amp(args: argparse.Namespace) -> torch.dtype | None:
    """The type for autocast, or None."""
    return torch.bfloat16 if args.amp == "bfloat16" else None


def counter(rank: int, check: Callable[[], None] | None = None) -> Callable[[int, int], None]:
    """Shows how many images are done, on standard error: a bar on a terminal, else a line every half minute and a last
    one.

    Args:
        rank: of the process; only the first shows anything.
        check: called with each image, to end it early.
    """
    began = shown = time.monotonic()
    bar = progress_bar(desc="evaluation", unit="image", shown=rank == 0)

    def show(done: int, count: int) -> None:
        nonlocal shown
        if check is not None:
            check()
        if rank:
            return
        now = time.monotonic()
        if not bar.disable:
            bar.total = count
            bar.update(done - bar.n)
            if done == count:
                bar.close()
        elif done == count or now - shown >= _QUIET_SECONDS:
            shown = now
            print(f"evaluated {done} of {count} images, {now - began:.0f} s", file=sys.stderr, flush=True)

    return show


def columns_of(scores: dict[str, Any]) -> dict[str, Any]:
    """box_AP, box_AP50, ... mask_AR of an evaluation."""
    return {f"{kind}_{k}": v for kind in ("box", "mask") if kind in scores for k, v in scores[kind].items()}


def check_scores_path(path: Path) -> None:
    """Checks before scores are computed that they can be written.

    Raises:
        ValueError: they could not be written to this path.
    """
    if path.suffix.lower() == ".csv":
        raise ValueError(f"--out is {path}: name the JSON; a CSV of the same name is written next to it")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--out is {path}: {'a folder, expected a file' if path.is_dir() else 'there is no such folder'}"
        )


def write_scores(path: Path, scores: dict[str, Any], device: torch.device) -> None:
    """Writes scores, machine and date as JSON, and as a CSV of one row next to it."""
    result = {**scores, "machine": machine_line(machine(device.type))}
    write_json(path, result)
    row = {**columns_of(result), **{k: v for k, v in result.items() if not isinstance(v, dict)}}
    with (
        whole_file(path.with_suffix(".csv")) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f,
    ):
        writer = csv.DictWriter(f, list(row))
        writer.writeheader()
        writer.writerow(row)
    print(f"{path}: {json.dumps(columns_of(result))}", flush=True)

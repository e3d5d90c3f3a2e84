"""What `timm-halonet detect train` does, step by step."""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..files import make_folder
from ..report.progress import say
from . import configs, storage
from .budget import Budget, few_steps_note, sides_of, smaller_sides
from .checkpoint import CHECKPOINT_NAME, load_checkpoint
from .dataset import DetectionDataset
from .evaluation import evaluate, format_scores
from .files import EVALUATION_NAME
from .guessing import guess_format, guess_split, has_masks
from .layouts import open_dataset
from .processes import processes, world_and_rank
from .shared import amp, check_names, columns_of, counter, open_splits, write_scores
from .training import Trainer
from .transforms import training_transform

_WANTED_STEPS = 400  # that image sides are chosen for; a run takes some fewer, since it waits for data too
_SIZES = 20  # images whose size is looked at


def train(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError, RuntimeError, OSError: the data, the options or a file; in one line.
    """
    out = Path(args.out)
    check_names(args)
    if (out / CHECKPOINT_NAME).exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume goes on with it, another --out keeps it")
    with processes(args.device) as device:
        _settle(args, device)
        dataset, held_out, cfg, detector = _open(args)
        detector = _choose_sides(args, dataset, cfg, detector, device)
        trainer = _trainer(args, dataset, cfg, detector, device)
        _announce(args, trainer, held_out)
        _run(args, trainer, held_out)
    return 0


def _settle(args: argparse.Namespace, device: torch.device) -> None:
    """Fills in what the command line left open and the data set or the device tells."""
    if args.data and not args.annotations:
        args.format = args.format or guess_format(args.data)
        if not args.no_eval and args.split is None:
            args.split = guess_split(args.data, args.format, "val")
        args.train_split = args.train_split or guess_split(args.data, args.format, "train")
    args.train_split = args.train_split or "train"
    if args.detector is None:
        where = (args.data, args.format, args.train_split, None, False)
        dataset = open_dataset(*where, annotations=args.annotations, images=args.images)
        args.detector = "mask_rcnn" if has_masks(dataset) else "faster_rcnn"
    if args.preset is None:
        args.preset = "quick" if args.minutes and device.type == "cpu" else "standard"
    if args.epochs is None and args.minutes is None:
        args.epochs = 12


def _open(
    args: argparse.Namespace,
) -> tuple[DetectionDataset, DetectionDataset | None, configs.TrainCfg, configs.DetectorCfg]:
    """The two splits, with how to train and the detector's options."""
    kind = configs.DETECTORS[args.detector]
    options, train_options = configs.parse_options(args.set, kind, configs.TrainCfg)
    cfg = configs.preset(configs.TrainCfg, args.preset, train_options)
    detector = configs.preset(kind, args.preset, options)
    masks = args.detector == "mask_rcnn"
    transform = training_transform(cfg, detector.scale if detector.min_size is None else 1.0)
    dataset, held_out = open_splits(args, transform, masks)
    return dataset, held_out, cfg, detector


def _choose_sides(
    args: argparse.Namespace,
    dataset: DetectionDataset,
    cfg: configs.TrainCfg,
    detector: configs.DetectorCfg,
    device: torch.device,
) -> configs.DetectorCfg:
    """The detector with image sides for the preset `quick`.

    The sides are those that the images have; with --minutes smaller ones, if at those too few steps fit. A run that
    goes on keeps its own.
    """
    named = {text.partition("=")[0] for text in args.set}
    if args.preset != "quick" or {"min_size", "max_size"} & named:
        return detector
    checkpoint = Path(args.out, CHECKPOINT_NAME)
    if checkpoint.exists():
        before = load_checkpoint(checkpoint)["identity"].get("options") or {}
        return replace(detector, **{k: before[k] for k in ("min_size", "max_size") if k in before})
    sides = sides_of(_sizes(dataset))
    for _ in range(3 if args.minutes else 0):
        trial = _trainer(args, dataset, cfg, replace(detector, min_size=sides[0], max_size=sides[1]), device)
        seconds = trial.time_steps()
        if math.isnan(seconds):  # a broken image, which training will name
            break
        wanted = min(_WANTED_STEPS, (args.epochs or _WANTED_STEPS) * trial.batches)
        smaller = smaller_sides(sides, Budget(minutes=args.minutes).steps(seconds, trial.batches), wanted)
        if smaller == sides:
            break
        sides = smaller
    return replace(detector, min_size=sides[0], max_size=sides[1])


def _sizes(dataset: DetectionDataset) -> list[tuple[int, int]]:
    """Heights and widths of some of the images."""
    found = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(_SIZES, len(dataset))).round().astype(int)):
        try:
            height, width = dataset.image(int(index)).shape[-2:]
        except Exception:  # broken; training names it
            continue
        found.append((height, width))
    return found or [(800, 1333)]


def _trainer(
    args: argparse.Namespace,
    dataset: DetectionDataset,
    cfg: configs.TrainCfg,
    detector: configs.DetectorCfg,
    device: torch.device,
) -> Trainer:
    torch.manual_seed(args.seed)
    config = dict(
        detector=args.detector,
        backbone=args.model,
        num_classes=dataset.num_classes,
        options={f: getattr(detector, f) for f in detector.__dataclass_fields__},
    )
    model = storage.build(config, args.pretrained).to(device)
    out = make_folder(args.out)
    return Trainer(
        model,
        dataset,
        cfg,
        out,
        Budget(args.epochs, args.minutes),
        seed=args.seed,
        workers=args.workers,
        amp=amp(args),
        checkpoint_minutes=args.checkpoint_minutes,
        log=say,
        log_steps=args.log_steps,
    )


def _announce(args: argparse.Namespace, trainer: Trainer, held_out: DetectionDataset | None) -> None:
    """Says what is going to be trained, and for how many steps; goes back to the checkpoint, if that was asked for."""
    for note in [*trainer.dataset.notes, *(held_out.notes if held_out else [])]:
        trainer.log(f"note: {note}")
    if held_out is None and not args.no_eval:
        trainer.log(f"note: {args.data} has no split for the evaluation; --split names one")
    if args.resume:
        found = trainer.resume()
        trainer.log(
            f"resumed at step {trainer.progress.step}" if found else f"no checkpoint in {args.out}: from the start"
        )
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    trainer.log(
        f"{args.detector} over {args.model}: {parameters:.1f} M parameters, {len(trainer.dataset)} images, "
        f"{trainer.batches} steps an epoch"
    )
    if trainer.progress.step:
        return
    options: configs.DetectorCfg = trainer.model.recipe.options  # type: ignore[union-attr, assignment]
    seconds = trainer.time_steps() if args.minutes else None
    if seconds is not None and math.isnan(seconds):  # a broken image, which training will name
        return
    steps = trainer.budget.steps(seconds or 0.0, trainer.batches)
    if seconds is not None:
        sides = "images as they come" if options.min_size is None else f"sides {options.min_size} / {options.max_size}"
        trainer.log(f"preset {args.preset}, {sides}: {seconds:.2f} s a step, about {steps} steps in the budget")
    if few := few_steps_note(steps, seconds, args.preset, options):
        trainer.log(f"note: {few}")


def _run(args: argparse.Namespace, trainer: Trainer, held_out: DetectionDataset | None) -> None:
    """Trains, saves the detector and scores it, unless the last epoch was scored already."""
    _, rank = world_and_rank()
    scored: dict[int, dict[str, Any]] = {}  # by step

    def score(check: Callable[[], None] | None = None) -> dict[str, Any]:
        assert held_out is not None
        return evaluate(trainer.trained, held_out, amp=amp(args), progress=counter(rank, check))

    def after_epoch(epochs_done: int) -> dict[str, float]:
        if held_out is None or not args.eval_epochs or epochs_done % args.eval_epochs:
            return {}
        trainer.save()  # it may take long
        result = scored[trainer.progress.step] = score(trainer.stop.check)
        trainer.log(format_scores(result))
        return columns_of(result)

    trainer.run(after_epoch)
    if rank == 0:
        report = _report(trainer, args)
        storage.save_detector(trainer.out, trainer.trained, trainer.dataset.categories, training=report)
        trainer.log(
            f"{report['steps']} steps in {report['minutes']} minutes, {report['seconds_per_step']} s a step, "
            f"{report['peak_memory_mb']} MB at most; saved in {args.out}"
        )
    if held_out is not None:
        last = scored.get(trainer.progress.step)
        result = last or score()
        if rank == 0:
            if last is None:
                print(format_scores(result), flush=True)
            write_scores(trainer.out / EVALUATION_NAME, result, trainer.device)


def _report(trainer: Trainer, args: argparse.Namespace) -> dict[str, Any]:
    progress = trainer.progress
    return {
        **asdict(trainer.cfg),
        "seed": args.seed,
        "pretrained": args.pretrained,
        "preset": args.preset,
        "amp": args.amp,
        "processes": trainer.world,
        "images": len(trainer.dataset),
        "epochs": len(progress.rows),
        "steps": progress.step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "minutes": round(progress.seconds / 60, 2),
        "seconds_per_step": round(median(progress.step_seconds), 4) if progress.step_seconds else None,
        "peak_memory_mb": round(progress.peak_memory_mb),
    }

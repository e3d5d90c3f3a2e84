"""`timm-halonet detect train | eval | predict | compare`."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import EVALUATION_NAME


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    detect = commands.add_parser("detect", help="train, evaluate and run detectors and instance segmenters")
    actions = detect.add_subparsers(dest="action", required=True)

    train = actions.add_parser("train", help="train a detector on COCO JSON or on instance label maps")
    _data_arguments(train, validation=True)
    train.add_argument("--train-split", default="train", metavar="NAME", help="default train")
    train.add_argument("--split", default="val", metavar="NAME", help="what is evaluated (default val)")
    train.add_argument(
        "--model", default="halonet_h0", metavar="NAME", help="backbone: a name in timm (default halonet_h0)"
    )
    train.add_argument("--pretrained", action="store_true", help="begin with the backbone's weights")
    train.add_argument(
        "--detector", default="mask_rcnn", choices=("mask_rcnn", "faster_rcnn", "retinanet"), help="default mask_rcnn"
    )
    train.add_argument("--preset", default="standard", metavar="NAME", help="standard (default) or small_objects")
    train.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of detector and training, such as lr=2e-4",
    )
    train.add_argument("--out", required=True, metavar="FOLDER", help="where everything is written")
    train.add_argument("--epochs", type=int, metavar="N", help="default 12, unless --minutes is given")
    train.add_argument("--minutes", type=float, metavar="M", help="of training; the learning rate falls to 0 by then")
    train.add_argument("--resume", action="store_true", help="go on from FOLDER's checkpoint, if there is one")
    train.add_argument(
        "--checkpoint-minutes", type=float, default=5.0, metavar="M", help="between checkpoints (default 5)"
    )
    train.add_argument(
        "--eval-epochs", type=int, default=0, metavar="N", help="evaluate every N epochs (default 0: at the end)"
    )
    train.add_argument("--no-eval", action="store_true", help="do not evaluate at the end either")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--workers", type=int, default=2, metavar="N", help="processes that load data (default 2)")
    train.add_argument("--log-steps", type=int, default=20, metavar="N", help="steps between lines (default 20)")
    train.set_defaults(run=_train)

    evaluate = actions.add_parser("eval", help="COCO's average precision of a trained detector")
    evaluate.add_argument("trained", metavar="FOLDER", help="what train wrote")
    _data_arguments(evaluate)
    evaluate.add_argument("--split", default="val", metavar="NAME", help="default val")
    evaluate.add_argument("--out", metavar="JSON", help=f"default FOLDER/{EVALUATION_NAME}; a CSV is written beside it")
    evaluate.set_defaults(run=_evaluate)

    predict = actions.add_parser("predict", help="draw what a trained detector finds, and write it as JSON")
    predict.add_argument("trained", metavar="FOLDER", help="what train wrote")
    predict.add_argument("photos", nargs="*", metavar="PHOTO|FOLDER", help="anything that Pillow reads; or --data")
    _data_arguments(predict)
    predict.add_argument("--split", default="val", metavar="NAME", help="of --data (default val)")
    predict.add_argument(
        "--count", type=int, default=8, metavar="N", help="images of --data, evenly spaced (default 8)"
    )
    predict.add_argument(
        "--score", type=float, default=0.5, metavar="P", help="detections below are left out (default 0.5)"
    )
    predict.add_argument("--out", default="predictions", metavar="FOLDER", help="default predictions")
    predict.set_defaults(run=_predict)

    compare = actions.add_parser("compare", help="a table of what train and eval have written of several runs")
    compare.add_argument("runs", nargs="+", metavar="FOLDER", help="what train wrote")
    compare.add_argument("--markdown", metavar="FILE", help="write it between the marks <!-- detect --> in it")
    compare.set_defaults(run=_compare)

    for action in (train, evaluate, predict):
        action.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
        action.add_argument(
            "--amp", default="none", choices=("none", "bfloat16"), help="mixed precision (default none)"
        )


def _data_arguments(parser: argparse.ArgumentParser, validation: bool = False) -> None:
    parser.add_argument("--data", metavar="PATH", help="a folder, or for masks an uncompressed tar")
    parser.add_argument(
        "--format", choices=("coco", "masks"), help="of --data: COCO JSON, or images with instance label maps"
    )
    parser.add_argument("--annotations", metavar="FILE", help="COCO JSON in any place, instead of --data")
    parser.add_argument("--images", metavar="FOLDER", help="of --annotations (default: the file's folder)")
    if validation:
        parser.add_argument("--val-annotations", metavar="FILE", help="the same for what is evaluated")
        parser.add_argument("--val-images", metavar="FOLDER", help="of --val-annotations (default: --images)")


def _open_data(args: argparse.Namespace, masks: bool, categories: list[dict[str, Any]]) -> Any:
    """The dataset that eval and predict are given, its categories in the order of the detector's."""
    from .layouts import open_dataset

    dataset = open_dataset(
        args.data, args.format, args.split, None, masks, annotations=args.annotations, images=args.images
    )
    dataset.match_categories(categories)
    return dataset


def _open_splits(args: argparse.Namespace, transform: Any, masks: bool) -> tuple[Any, Any]:
    """What train learns from, and what it evaluates or None."""
    from .layouts import open_dataset

    if args.annotations and not args.val_annotations and not args.no_eval:
        raise ValueError("--annotations names what to train on: name --val-annotations too, or --no-eval")
    if args.val_annotations and not args.annotations:
        raise ValueError("--val-annotations needs --annotations")
    where = (args.data, args.format)
    dataset = open_dataset(*where, args.train_split, transform, masks, annotations=args.annotations, images=args.images)
    if not dataset.has_objects():
        raise ValueError(f"{dataset.source}: the split {args.train_split!r} has no objects to train on")
    if args.no_eval:
        return dataset, None
    images = args.val_images or (args.images if args.val_annotations else None)
    held_out = open_dataset(*where, args.split, None, masks, annotations=args.val_annotations, images=images)
    held_out.match_categories(dataset.categories, f"the training set ({dataset.source})")
    held_out.check()
    return dataset, held_out


def _train(args: argparse.Namespace) -> int:
    import torch

    from . import configs, storage, training
    from .evaluation import evaluate, format_scores
    from .transforms import training_transform

    kind = configs.DETECTORS[args.detector]
    options, train_options = configs.parse_options(args.set, kind, configs.TrainCfg)
    cfg = configs.preset(configs.TrainCfg, args.preset, train_options)
    detector = configs.preset(kind, args.preset, options)
    masks = args.detector == "mask_rcnn"
    transform = training_transform(cfg, detector.scale if detector.min_size is None else 1.0)
    dataset, held_out = _open_splits(args, transform, masks)
    out = Path(args.out)
    if (out / training.CHECKPOINT_NAME).exists() and not args.resume:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, another --out keeps it")

    with _processes(args) as (device, rank):
        torch.manual_seed(args.seed)
        config = dict(
            detector=args.detector,
            backbone=args.model,
            num_classes=dataset.num_classes,
            options={f: getattr(detector, f) for f in detector.__dataclass_fields__},
        )
        model = storage.build(config, args.pretrained).to(device)
        out.mkdir(parents=True, exist_ok=True)
        epochs = args.epochs or (None if args.minutes else 12)
        amp = _amp(args)
        trainer = training.Trainer(
            model,
            dataset,
            cfg,
            out,
            training.Budget(epochs, args.minutes),
            seed=args.seed,
            workers=args.workers,
            amp=amp,
            checkpoint_minutes=args.checkpoint_minutes,
            log=lambda line: print(line, flush=True),
            log_steps=args.log_steps,
        )
        for note in [*dataset.notes, *(held_out.notes if held_out else [])]:
            trainer.log(f"note: {note}")
        if args.resume:
            found = trainer.resume()
            trainer.log(
                f"resumed at step {trainer.progress.step}" if found else f"no checkpoint in {out}: from the start"
            )
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        trainer.log(
            f"{args.detector} over {args.model}: {parameters:.1f} M parameters, {len(dataset)} images, "
            f"{trainer.batches} steps an epoch"
        )

        def score(epochs_done: int) -> dict[str, float]:
            if held_out is None or not args.eval_epochs or epochs_done % args.eval_epochs:
                return {}
            result = evaluate(trainer.trained, held_out, amp=amp)
            trainer.log(format_scores(result))
            return _columns(result)

        trainer.run(score)
        result = None
        if rank == 0:
            report = _report(trainer, args)
            storage.save_detector(out, trainer.trained, dataset.categories, training=report)
            trainer.log(
                f"{report['steps']} steps in {report['minutes']} minutes, {report['seconds_per_step']} s a step, "
                f"{report['peak_memory_mb']} MB at most; saved in {out}"
            )
        if held_out is not None:
            result = evaluate(trainer.trained, held_out, amp=amp, progress=_counter(rank))
            if rank == 0:
                print(format_scores(result), flush=True)
                _write_scores(out / EVALUATION_NAME, result, device)
    return 0


def _report(trainer: Any, args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict
    from statistics import median

    from .training import peak_memory_mb

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
        "seconds_per_step": round(median(trainer.step_seconds), 4) if trainer.step_seconds else None,
        "peak_memory_mb": round(peak_memory_mb(trainer.device)),
    }


def _evaluate(args: argparse.Namespace) -> int:
    from . import storage
    from .evaluation import evaluate, format_scores

    model, config = storage.load_detector(args.trained)
    dataset = _open_data(args, config["detector"] == "mask_rcnn", config["categories"])
    dataset.check()
    out = Path(args.out or Path(args.trained, EVALUATION_NAME))
    for note in dataset.notes:
        print(f"note: {note}", flush=True)
    with _processes(args) as (device, rank):
        result = evaluate(model.to(device), dataset, amp=_amp(args), progress=_counter(rank))
        if rank == 0:
            print(format_scores(result), flush=True)
            _write_scores(out, result, device)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from ..inference import choose_device
    from . import storage
    from .predicting import Predictor

    data = bool(args.data or args.annotations)
    if bool(args.photos) == data:
        raise ValueError("name photos, or --data and --format, or --annotations: one of them")
    model, config = storage.load_detector(args.trained)
    predictor = Predictor(model.to(choose_device(args.device)), config["categories"], args.score, _amp(args))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if data:
        dataset = _open_data(args, config["detector"] == "mask_rcnn", config["categories"])
        for note in dataset.notes:
            print(f"note: {note}", flush=True)
        failed = predictor.draw_dataset(dataset, args.count, out)
    else:
        failed = predictor.draw_photos(args.photos, out)
    print(f"{out}: {len(predictor.rows)} pictures, sheet.png, predictions.json")
    return 1 if failed else 0


def _compare(args: argparse.Namespace) -> int:
    from ..report.markdown import replace_region
    from .comparing import END, START, compare, read_run

    text = compare([read_run(Path(folder)) for folder in args.runs])
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    return 0


@contextmanager
def _processes(args: argparse.Namespace) -> Iterator[tuple[Any, int]]:
    """Device and rank of this process; torchrun's, if it was started by it."""
    import torch
    from torch import distributed

    from ..inference import choose_device

    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield choose_device(args.device), 0
        return
    device = choose_device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, distributed.get_rank()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _amp(args: argparse.Namespace) -> Any:
    import torch

    return torch.bfloat16 if args.amp == "bfloat16" else None


def _counter(rank: int) -> Any:
    """A count of images that rewrites its line, where somebody watches."""
    if rank or not sys.stderr.isatty():
        return None

    def show(done: int, count: int) -> None:
        print(f"\r{done} of {count} images", end="" if done < count else "\n", file=sys.stderr, flush=True)

    return show


def _columns(result: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}_{k}": v for kind in ("box", "mask") if kind in result for k, v in result[kind].items()}


def _write_scores(path: Path, scores: dict[str, Any], device: Any) -> None:
    """With the machine and the date, as JSON, and as a CSV of one row beside it."""
    from ..report.files import whole_file
    from ..report.machine import machine, machine_line
    from .storage import write_json

    result = {**scores, "machine": machine_line(machine(device.type))}
    write_json(path, result)
    row = {**_columns(result), **{k: v for k, v in result.items() if not isinstance(v, dict)}}
    with whole_file(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(row))
        writer.writeheader()
        writer.writerow(row)
    print(f"{path}: {json.dumps(_columns(result))}", flush=True)

"""`timm-halonet detect train | eval | predict | compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import EVALUATION_NAME


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    detect = commands.add_parser(
        "detect",
        help="train, evaluate and run detectors and instance segmenters",
        epilog="Example: timm-halonet detect train --data photos --minutes 10",
    )
    actions = detect.add_subparsers(dest="action", required=True)

    train = actions.add_parser(
        "train",
        help="train a detector on COCO JSON or on instance label maps",
        epilog="Example: timm-halonet detect train --data photos --minutes 10",
    )
    train_arguments(train)
    train.set_defaults(run=_train)

    evaluate = actions.add_parser(
        "eval",
        help="COCO's average precision of a trained detector",
        epilog="Example: timm-halonet detect eval detector --data photos",
    )
    evaluate.add_argument("trained", metavar="FOLDER", help="what train wrote")
    _data_arguments(evaluate)
    evaluate.add_argument("--split", default="val", metavar="NAME", help="the split to evaluate on (default val)")
    evaluate.add_argument("--out", metavar="JSON", help=f"default FOLDER/{EVALUATION_NAME}; a CSV goes next to it")
    evaluate.set_defaults(run=_evaluate)

    predict = actions.add_parser(
        "predict",
        help="draw what a trained detector finds, and write it as JSON",
        epilog="Example: timm-halonet detect predict detector photo.jpg --out predictions",
    )
    predict.add_argument("trained", metavar="FOLDER", help="what train wrote")
    predict.add_argument(
        "photos", nargs="*", metavar="PHOTO|FOLDER", help="images in any format that Pillow reads; instead of --data"
    )
    _data_arguments(predict)
    predict.add_argument("--split", default="val", metavar="NAME", help="the split of --data (default val)")
    predict.add_argument(
        "--count", type=int, default=8, metavar="N", help="images of --data, evenly spaced (default 8)"
    )
    predict.add_argument(
        "--score", type=float, default=0.5, metavar="P", help="detections below are left out (default 0.5)"
    )
    predict.add_argument("--out", default="predictions", metavar="FOLDER", help="where to write (default predictions)")
    predict.set_defaults(run=_predict)

    compare = actions.add_parser(
        "compare",
        help="a table of what train and eval have written of several runs",
        epilog="Example: timm-halonet detect compare runs/first runs/second",
    )
    compare.add_argument("runs", nargs="+", metavar="FOLDER", help="what train wrote")
    compare.add_argument(
        "--markdown", metavar="FILE", help="a file that has the mark <!-- detect -->: write the table there"
    )
    compare.set_defaults(run=_compare)

    for action in (evaluate, predict):
        _device_arguments(action)


def train_arguments(train: argparse.ArgumentParser) -> None:
    """Adds the arguments of `detect train`."""
    train.add_argument("--config", metavar="YAML", help="a file of options, named as here or as in --set")
    _data_arguments(train, validation=True)
    train.add_argument("--train-split", metavar="NAME", help="the split to train on (default train)")
    train.add_argument("--split", metavar="NAME", help="the split to evaluate on (default val, or valid, or test)")
    train.add_argument(
        "--model", default="halonet_h0", metavar="NAME", help="backbone: a name in timm (default halonet_h0)"
    )
    train.add_argument("--pretrained", action="store_true", help="begin with the backbone's weights")
    train.add_argument(
        "--detector",
        choices=("mask_rcnn", "faster_rcnn", "retinanet"),
        help="default mask_rcnn where the data has masks, else faster_rcnn",
    )
    train.add_argument(
        "--preset",
        metavar="NAME",
        help="standard, small_objects or quick (default standard; quick with --minutes on a CPU)",
    )
    train.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of detector and training, such as lr=2e-4",
    )
    train.add_argument(
        "--out", default="detector", metavar="FOLDER", help="where everything is written (default detector)"
    )
    train.add_argument(
        "--epochs", type=int, metavar="N", help="train for N epochs (default 12, unless --minutes is given)"
    )
    train.add_argument(
        "--minutes", type=float, metavar="M", help="train for so long; the learning rate falls to 0 by then"
    )
    train.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if it has one")
    train.add_argument(
        "--checkpoint-minutes", type=float, default=5.0, metavar="M", help="minutes between checkpoints (default 5)"
    )
    train.add_argument(
        "--eval-epochs", type=int, default=0, metavar="N", help="evaluate every N epochs (default 0: at the end)"
    )
    train.add_argument("--no-eval", action="store_true", help="do not evaluate at the end either")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--workers", type=int, default=2, metavar="N", help="processes that load data (default 2)")
    train.add_argument(
        "--log-steps", type=int, default=20, metavar="N", help="steps between printed lines (default 20)"
    )
    _device_arguments(train)


def _device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
    parser.add_argument("--amp", default="none", choices=("none", "bfloat16"), help="mixed precision (default none)")


def _data_arguments(parser: argparse.ArgumentParser, validation: bool = False) -> None:
    parser.add_argument("--data", metavar="PATH", help="a folder, or for masks an uncompressed tar")
    parser.add_argument(
        "--format",
        choices=("coco", "masks"),
        help="COCO JSON, or images with instance label maps (default: what the folder looks like)",
    )
    parser.add_argument("--annotations", metavar="FILE", help="a COCO JSON file anywhere, instead of --data")
    parser.add_argument("--images", metavar="FOLDER", help="the images of --annotations (default: the file's folder)")
    if validation:
        parser.add_argument("--val-annotations", metavar="FILE", help="a COCO JSON file to evaluate on")
        parser.add_argument(
            "--val-images", metavar="FOLDER", help="the images of --val-annotations (default: --images)"
        )


def _open_data(args: argparse.Namespace, masks: bool, categories: list[dict[str, Any]]) -> Any:
    """The dataset that eval and predict are given, its categories in the order of the detector's."""
    from .guessing import guess_format
    from .layouts import open_dataset

    if args.data and not args.annotations:
        args.format = args.format or guess_format(args.data)
    dataset = open_dataset(
        args.data, args.format, args.split, None, masks, annotations=args.annotations, images=args.images
    )
    dataset.match_categories(categories)
    return dataset


def expand_config(argv: Sequence[str]) -> list[str]:
    """The words of a command line with `detect train --config FILE` written out: the file's options come first, so
    those of the command line win.

    Raises:
        ValueError: the file cannot be read, or has an option that there is not; with its name.
    """
    words = list(argv)
    if words[:2] != ["detect", "train"]:
        return words
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(words[2:])[0].config
    if file is None:
        return words
    from .config_file import read_words

    train = argparse.ArgumentParser()
    train_arguments(train)
    return [*words[:2], *read_words(file, vars(train.parse_args([]))), *words[2:]]


def _train(args: argparse.Namespace) -> int:
    from .train_command import train

    return train(args)


def _evaluate(args: argparse.Namespace) -> int:
    from . import storage
    from .evaluation import evaluate, format_scores
    from .processes import processes, world_and_rank
    from .shared import amp, check_scores_path, counter, write_scores

    out = Path(args.out or Path(args.trained, EVALUATION_NAME))
    check_scores_path(out)
    model, config = storage.load_detector(args.trained)
    dataset = _open_data(args, config["detector"] == "mask_rcnn", config["categories"])
    dataset.check()
    for note in dataset.notes:
        print(f"note: {note}", flush=True)
    with processes(args.device) as device:
        _, rank = world_and_rank()
        result = evaluate(model.to(device), dataset, amp=amp(args), progress=counter(rank))
        if rank == 0:
            print(format_scores(result), flush=True)
            write_scores(out, result, device)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from ..files import make_folder
    from ..photos import choose_device
    from . import storage
    from .predicting import Predictor
    from .shared import amp

    data = bool(args.data or args.annotations)
    if bool(args.photos) == data:
        raise ValueError("name photos, or --data and --format, or --annotations: one of them")
    model, config = storage.load_detector(args.trained)
    predictor = Predictor(model.to(choose_device(args.device)), config["categories"], args.score, amp(args))
    out = make_folder(args.out)
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

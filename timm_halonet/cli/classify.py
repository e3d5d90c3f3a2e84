"""`timm-halonet classify`: what is in photos."""

import argparse
import sys
from typing import Any

from ..files import json_text
from .arguments import add_model_arguments


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    classify = commands.add_parser(
        "classify", help="say what is in photos", epilog="Example: timm-halonet classify photo.jpg holidays --topk 3"
    )
    classify.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="images in any format that Pillow reads")
    classify.add_argument("--topk", type=int, default=5, metavar="K", help="labels for each photo (default 5)")
    classify.add_argument("--json", action="store_true", help="print one line of JSON for each photo")
    classify.add_argument("--batch-size", type=int, default=16, metavar="N", help="photos at a time (default 16)")
    classify.set_defaults(run=run)
    add_model_arguments(classify)


def run(args: argparse.Namespace) -> int:
    """Print the best classes of each photo; returns 1 if a file could not be read, else 0."""
    from .. import photos
    from ..report.progress import progress_bar, say

    files = photos.find_photos(args.photos)
    device = photos.choose_device(args.device)
    model = photos.load_model(args.model)
    predictions = photos.classify(model, files, topk=args.topk, device=device, batch_size=args.batch_size)
    failed = 0
    # a bar where there is something to wait for
    for prediction in progress_bar(predictions, total=len(files), unit="photo", shown=len(files) > 1):
        if prediction.error is not None:
            failed += 1
            say(f"timm-halonet: error: {prediction.error}", sys.stderr)
            if not args.json:
                continue
        if args.json:
            text = json_text(prediction.to_dict(), sys.stdout.encoding or "utf-8")
        else:
            text = "\n".join(
                [photos.one_line(prediction.file), *(f"  {100 * p:5.1f} %  {name}" for _, name, p in prediction.labels)]
            )
        say(text)
    if failed:
        print(f"timm-halonet: {failed} of {len(files)} files could not be read", file=sys.stderr)
    return 1 if failed else 0

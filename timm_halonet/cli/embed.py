"""`timm-halonet embed`: features of many photos, by Ray Data."""

import argparse
import sys
from typing import Any

from .arguments import add_model_arguments


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    embed = commands.add_parser(
        "embed",
        help="write features and labels of many photos into a Parquet file, on one machine or on a cluster of Ray",
        epilog="Example: timm-halonet embed photos --out features.parquet",
    )
    embed.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO|FOLDER|SHARD",
        help="images in any format that Pillow reads, folders of them, or webdataset's shards (.tar); also "
        "s3://BUCKET/FOLDER and other places that pyarrow knows",
    )
    embed.add_argument("--out", required=True, metavar="PARQUET", help="the same command goes on after an interruption")
    embed.add_argument(
        "--output",
        choices=("features", "probabilities"),
        default="features",
        help="what the classifier sees of a photo (default), or what it says",
    )
    embed.add_argument("--batch-size", type=int, default=32, metavar="N", help="photos at a time (default 32)")
    embed.add_argument(
        "--part-size", type=int, default=4096, metavar="N", help="photos saved together on the way (default 4096)"
    )
    embed.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that hold the model at most (default: the cluster's GPUs, or its cores but one)",
    )
    embed.add_argument("--force", action="store_true", help="replace --out if it exists")
    embed.set_defaults(run=run)
    add_model_arguments(embed)


def run(args: argparse.Namespace) -> int:
    """Write the features; returns 1 if a file could not be read, else 0.

    Raises:
        ValueError: photos, a model or an output that cannot be used.
        RuntimeError: Ray is not installed, or could not go on.
        OSError: something cannot be written.
    """
    from ..embedding import Job, check_ray, session
    from ..photos import load_model
    from ..report.progress import progress_bar, say

    check_ray()  # before weights are downloaded
    job = Job(
        args.photos,
        args.out,
        load_model(args.model),
        output=args.output,
        batch_size=args.batch_size,
        part_size=args.part_size,
        workers=args.workers,
        device=args.device,
        force=args.force,
    )
    if job.kept:
        unit = "shards" if job.shards else "photos"
        print(f"{job.kept} of {job.total} {unit} are done already", flush=True)
    if job.todo:
        with session() as resources:
            total, initial = (None, 0) if job.shards else (job.total, job.kept)
            bar = progress_bar(total=total, initial=initial, unit="photo")
            for step in job.run(resources):
                for error in step.errors:
                    say(f"timm-halonet: error: {error}", sys.stderr)
                bar.update(step.photos)
            bar.close()
    rows, skipped = job.finish()
    print(f"{args.out}: {rows} photos, {args.output} of {job.tag}")
    if skipped:
        print(
            f"timm-halonet: {skipped} of {rows + skipped} files could not be read; {job.skipped} lists them",
            file=sys.stderr,
        )
    return 1 if skipped else 0

"""`timm-halonet verify`, `publish` and `convert`."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the commands to those of `timm-halonet`."""
    verify = commands.add_parser(
        "verify",
        help="check a checkpoint: config, hash, tensors, values, stored logits",
        epilog="Example: timm-halonet verify halonet_h0.imagenette_r128",
    )
    verify.add_argument("checkpoint", metavar="FOLDER|NAME", help="a folder, a name in timm or hf-hub:ORG/NAME")
    verify.add_argument(
        "--write-check", action="store_true", help="first write the current hash and logits into FOLDER/config.json"
    )
    verify.set_defaults(run=_verify)

    publish = commands.add_parser(
        "publish",
        help="verify a checkpoint folder and upload it to the Hugging Face Hub",
        epilog="Example: timm-halonet publish halonet_h0.mine --repo ORG/NAME --dry-run",
    )
    publish.add_argument("folder", metavar="FOLDER")
    publish.add_argument(
        "--repo", required=True, metavar="ORG/NAME", help="the repository; created if it does not exist"
    )
    publish.add_argument(
        "--private", action="store_true", help="create a private repository; refuse an existing public one"
    )
    publish.add_argument(
        "--dry-run", action="store_true", help="print what would be uploaded, without using the network"
    )
    publish.add_argument("--message", metavar="TEXT", help="the message of the commit")
    publish.set_defaults(run=_publish)

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of a model's authors into a checkpoint folder",
        epilog="Example: timm-halonet convert averaged.pth halonet_h0.mine --model halonet_h0",
    )
    convert.add_argument("source", metavar="SRC", help="a file of torch.save, loaded as weights only, or safetensors")
    convert.add_argument("destination", metavar="DST", help="the folder; made if it does not exist")
    convert.add_argument(
        "--model", required=True, metavar="NAME", help="an architecture that `timm-halonet list` lists"
    )
    convert.add_argument("--force", action="store_true", help="replace the weights and config.json that DST has")
    convert.set_defaults(run=_convert)


def _verify(args: argparse.Namespace) -> int:
    from ..checkpoints import verify

    checkpoint = verify.find_checkpoint(args.checkpoint)
    if args.write_check:
        if not Path(args.checkpoint.removeprefix("local-dir:")).is_dir():
            raise ValueError(f"--write-check needs a folder, got {args.checkpoint!r}")
        checkpoint = verify.write_check(checkpoint)
    for step, found in verify.verify(checkpoint):
        print(f"{step}: {found}", flush=True)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ..checkpoints.publish import publish

    publish(args.folder, args.repo, private=args.private, dry_run=args.dry_run, message=args.message)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from ..checkpoints.convert import convert

    for step, found in convert(args.source, args.destination, args.model, force=args.force):
        print(f"{step}: {found}", flush=True)
    return 0

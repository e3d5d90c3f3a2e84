"""`timm-halonet convert`: a checkpoint of a model's authors becomes a folder of this package."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
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
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder, a line a step; returns the exit status.

    Raises:
        ValueError, RuntimeError, OSError: a source, model or destination that does not fit.
    """
    from ..checkpoints.convert import convert

    for step, found in convert(args.source, args.destination, args.model, force=args.force):
        print(f"{step}: {found}", flush=True)
    return 0

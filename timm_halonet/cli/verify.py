"""`timm-halonet verify`: whether a checkpoint is what its config.json says."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    verify = commands.add_parser(
        "verify",
        help="check a checkpoint: config, hash, tensors, values, stored logits",
        epilog="Example: timm-halonet verify halonet_h0.imagenette_r128",
    )
    verify.add_argument("checkpoint", metavar="FOLDER|NAME", help="a folder, a name in timm or hf-hub:ORG/NAME")
    verify.add_argument(
        "--write-check", action="store_true", help="first write the current hash and logits into FOLDER/config.json"
    )
    verify.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found, step by step; returns the exit status.

    Raises:
        ValueError, RuntimeError: a checkpoint that is not what it says, or --write-check for one that is not a folder.
    """
    from ..checkpoints import verify

    checkpoint = verify.find_checkpoint(args.checkpoint)
    if args.write_check:
        if not Path(args.checkpoint.removeprefix("local-dir:")).is_dir():
            raise ValueError(f"--write-check needs a folder, got {args.checkpoint!r}")
        checkpoint = verify.write_check(checkpoint)
    for step, found in verify.verify(checkpoint):
        print(f"{step}: {found}", flush=True)
    return 0

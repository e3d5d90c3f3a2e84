"""`timm-halonet publish`: a checkpoint folder goes to the Hugging Face Hub."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
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
    publish.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify and upload a folder; returns the exit status.

    Raises:
        ValueError, RuntimeError: not a checkpoint folder or no ORG/NAME; the Hub refuses.
    """
    from ..checkpoints.publish import publish

    publish(args.folder, args.repo, private=args.private, dry_run=args.dry_run, message=args.message)
    return 0

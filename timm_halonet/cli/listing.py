"""`timm-halonet list`: the architectures of this package and the weights that exist."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    models = commands.add_parser(
        "list",
        help="the architectures of this package and the weights that exist",
        epilog="Example: timm-halonet list --macs",
    )
    models.add_argument("--macs", action="store_true", help="add a column: multiply-adds of one image, in billions")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of this package's models; returns the exit status."""
    from ..registry import listing

    rows = listing(macs=args.macs)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    return 0

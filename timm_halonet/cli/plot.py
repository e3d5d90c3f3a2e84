"""`timm-halonet plot`: curves of training runs."""

import argparse
from typing import Any

from .arguments import PICTURE


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    plot = commands.add_parser(
        "plot",
        help="curves of loss, accuracy and average precision of training runs",
        epilog="Example: timm-halonet plot runs/first runs/second --out curves.png",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a folder that holds summary.csv, or such a file")
    plot.add_argument("--out", default="curves.png", metavar="PICTURE", help=PICTURE.format("curves.png"))
    plot.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the curves of training runs into one picture; returns the exit status.

    Raises:
        ValueError: a run or a file name that cannot be used.
    """
    from ..report.plots import check_output, draw_runs, save
    from ..report.summary import read_run

    check_output(args.out)
    print(save(draw_runs([read_run(run) for run in args.runs]), args.out))
    return 0

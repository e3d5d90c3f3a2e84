"""The `timm-halonet` command."""

import argparse
import sys
from collections.abc import Sequence

from ..benchmark import run as benchmark
from ..detection import command as detection
from ..report.streams import any_text
from . import attend, checkpoints, classify, listing, plot


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 for success, 1 where something failed (argparse exits with 2)."""
    with any_text():
        try:
            args = _parser().parse_args(detection.expand_config(sys.argv[1:] if argv is None else argv))
            return args.run(args)
        except (ValueError, RuntimeError, OSError) as e:
            print(f"timm-halonet: error: {' '.join(str(e).splitlines())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("timm-halonet: interrupted", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-halonet", description="HaloNets for timm.")
    commands = parser.add_subparsers(dest="command", required=True)

    for part in (classify, attend, listing, checkpoints, plot, detection, benchmark):
        part.add_parser(commands)
    return parser

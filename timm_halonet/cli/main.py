"""The `timm-halonet` command."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

from .. import __version__
from ..benchmark import run as benchmark
from ..detection import command as detection
from ..report.streams import any_text
from . import attend, classify, convert, embed, listing, plot, publish, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 for success, 1 where something failed (argparse exits with 2)."""
    with any_text(), _one_line_warnings():
        try:
            args = make_parser().parse_args(detection.expand_config(sys.argv[1:] if argv is None else argv))
            return args.run(args)
        except (ValueError, RuntimeError, OSError) as e:
            print(f"timm-halonet: error: {' '.join(str(e).splitlines())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("timm-halonet: interrupted", file=sys.stderr)
            return 130


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Within the block, a warning is shown as one line without the code that it came from."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, *_: object, **__: object) -> str:
        return f"timm-halonet: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="timm-halonet",
        description="HaloNets for timm.",
        epilog="Example: timm-halonet classify photo.jpg",
    )
    parser.add_argument("--version", action="version", version=f"timm-halonet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    for part in (classify, attend, embed, listing, verify, publish, convert, plot, detection, benchmark):
        part.add_parser(commands)
    return parser

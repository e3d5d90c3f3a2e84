"""`python -m timm_halonet.benchmark`: the same as `timm-halonet bench`; the process that measures memory runs it."""

import argparse
import sys

from .run import add_arguments, run

parser = argparse.ArgumentParser(prog="python -m timm_halonet.benchmark")
add_arguments(parser)
sys.exit(run(parser.parse_args()))

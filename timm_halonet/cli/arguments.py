"""Arguments that several commands have."""

import argparse

DEFAULT_MODEL = "halonet_h0"
PICTURE = ".png, .jpg, .svg or .pdf (default {})"


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """--model and --device."""
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"name in timm, local-dir:FOLDER or hf-hub:ORG/NAME (default {DEFAULT_MODEL})",
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps ...")

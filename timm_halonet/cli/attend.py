"""`timm-halonet attend`: where a model looks from a position, stage by stage."""

import argparse
from typing import Any

from .arguments import PICTURE, add_model_arguments

_LONGEST = 30  # times the shorter side of a photo: memory and time grow with it


def add_parser(commands: Any) -> None:
    """Adds the command to those of `timm-halonet`."""
    attend = commands.add_parser(
        "attend",
        help="draw where a model looks from a position, stage by stage",
        epilog="Example: timm-halonet attend photo.jpg --at 120,200 --out attention.png",
    )
    attend.add_argument("photo", metavar="PHOTO")
    attend.add_argument("--at", required=True, type=position, metavar="Y,X", help="position in pixels of the photo")
    attend.add_argument("--out", default="attention.png", metavar="PICTURE", help=PICTURE.format("attention.png"))
    attend.add_argument("--panel", default=320, type=panel_height, metavar="PX", help="height of a panel (default 320)")
    attend.set_defaults(run=run)
    add_model_arguments(attend)


def position(text: str) -> tuple[int, int]:
    """Y,X as two whole numbers."""
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected Y,X in pixels such as 120,200, got {text!r}") from None
    return y, x


def panel_height(text: str) -> int:
    """A whole number of pixels from 64 to 2048."""
    if not (text.isascii() and text.isdigit() and 64 <= int(text) <= 2048):
        raise argparse.ArgumentTypeError(f"expected a height from 64 to 2048 pixels, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Draw where the attention looks from one pixel; returns the exit status.

    Raises:
        ValueError: a photo, model, pixel or file name that cannot be used.
    """
    from timm.data import resolve_data_config
    from torchvision.transforms.v2 import functional as tv

    from .. import photos
    from ..report.attention import attention_of, draw
    from ..report.plots import check_output, save

    check_output(args.out)
    photo = photos.open_photo(args.photo)
    y, x = args.at
    if not (0 <= y < photo.height and 0 <= x < photo.width):
        raise ValueError(
            f"--at {y},{x} lies outside the photo of {photo.height} x {photo.width} pixels (height, width)"
        )
    device = photos.choose_device(args.device)
    model = photos.load_model(args.model).to(device)
    data = resolve_data_config(model=model)
    # the whole photo, its sides kept in proportion: these models take any size
    side = min(data["input_size"][1:])
    if max(photo.size) > _LONGEST * min(photo.size):
        raise ValueError(
            f"{args.photo} has {photo.width} x {photo.height} pixels (width, height), and all of it is looked at with "
            f"{side} pixels on the shorter side; crop it until the longer side is at most {_LONGEST} times the shorter"
        )
    scale = side / min(photo.size)
    size = [max(1, round(photo.height * scale)), max(1, round(photo.width * scale))]
    image = tv.to_dtype(tv.to_image(photo.resize((size[1], size[0]))), scale=True)
    image = tv.normalize(image, list(data["mean"]), list(data["std"]))[None].to(device)
    at = (y / photo.height, x / photo.width)
    print(save(draw(photo, attention_of(model, image, at), at, args.panel), args.out))
    return 0

"""Photos as files: read within limits, and brought to RGB in 8 bits by one rule a type."""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import environment

MAX_FILE_BYTES = 2**30  # of one image
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")


def open_file(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> BinaryIO:
    """A file opened for reading, if it is a regular one of at most `limit` bytes.

    Raises:
        ValueError: a folder, pipe, socket or device, which may never end; or a larger file. With the path.
        OSError: it cannot be opened.
    """
    status = os.stat(path)  # before it is opened: that alone waits at a pipe
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)}: not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{os.fspath(path)}: {status.st_size} bytes, more than the {limit} that are read of one file")
    return open(path, "rb")


def one_line(text: str) -> str:
    """A file's name for a message or a list: line breaks and other control characters are written as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_file(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        ValueError, OSError: as `open_file`.
    """
    with open_file(path, limit) as file:
        return file.read(limit)  # files of /proc have no size


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """A photo as RGB in 8 bits (see `to_rgb`), turned the way its EXIF orientation says; reads what Pillow reads.

    Raises:
        ValueError: no image, a truncated one, one of more pixels than the limit, or no regular file; with the path.
    """
    try:
        data = read_file(path)
    except OSError as e:
        raise ValueError(f"{os.fspath(path)}: {e.strerror or e}") from None
    return decode_photo(data, os.fspath(path))


def decode_photo(data: bytes, where: str) -> Image.Image:
    """As `open_photo`, from the bytes of a file.

    Args:
        where: the file, for errors.
    """
    with _named(where, len(data)):
        file = Image.open(io.BytesIO(data))
        file.load()
        image = ImageOps.exif_transpose(file)
    image.format = file.format
    try:
        return to_rgb(image)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def load_image(data: bytes, where: str) -> np.ndarray:
    """The pixels of an image as they are stored, (H, W) or (H, W, channels).

    Raises:
        ValueError: as `open_photo`.
    """
    with _named(where, len(data)):
        return np.array(Image.open(io.BytesIO(data)))


def image_header(file: BinaryIO, where: str) -> tuple[int, int, str]:
    """Width and height in pixels, once turned the way the EXIF orientation says, and Pillow's mode; without decoding.

    Raises:
        ValueError: as `open_photo`.
    """
    with _named(where):
        image = Image.open(file)
        width, height = image.size
        # Pillow turns TIFFs itself
        if image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        return width, height, image.mode


def max_pixels() -> int | None:
    """The most pixels of an image: PIL.Image.MAX_IMAGE_PIXELS (89 million, None for no limit), which
    TIMM_HALONET_MAX_PIXELS in the environment sets.

    Raises:
        ValueError: the variable is not a whole number above 0.
    """
    Image.MAX_IMAGE_PIXELS = environment.max_pixels() or Image.MAX_IMAGE_PIXELS
    return Image.MAX_IMAGE_PIXELS


@contextmanager
def _named(where: str, size: int | None = None) -> Iterator[None]:
    """Whatever Pillow's decoders raise becomes a ValueError that names the file."""
    limit = max_pixels()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(
            f"{where}: {str(e).partition(',')[0]}; cut it into tiles or make it smaller, or set "
            f"TIMM_HALONET_MAX_PIXELS to more than {limit} if there is the memory"
        ) from None
    except UnidentifiedImageError:
        count = "" if size is None else f" ({size} bytes)"
        raise ValueError(f"{where}: not an image that Pillow can read{count}") from None
    except Exception as e:  # OSError, SyntaxError, ValueError, struct.error, EOFError, KeyError, MemoryError ...
        text = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(f"{where}: not an image that Pillow can read ({text})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB with 8 bits a channel, by its type alone, so that images of one set stay comparable.

    Grey is repeated; palettes, CMYK, YCbCr, LAB and HSV are converted as Pillow does it; what is transparent is white,
    as a page would show it. 16 bits are divided by 257, however dark the image is. Floats are read as 0 (black) to 1
    (white), as scikit-image and matplotlib have them.

    Raises:
        ValueError: floats that are beyond 0 to 1 or not finite; 32-bit integers, which have no agreed range; a mode
            that Pillow cannot convert.
    """
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "I":
        if image.format not in ("PNG", "PPM"):  # those have 16 bits, which Pillow opens as 32
            raise ValueError("32-bit integers have no agreed range; save the image with 8 or 16 bits a channel")
        image = _from_16_bits(image)
    elif image.mode == "F":
        image = _from_floats(image)
    if image.mode == "La":
        image = image.convert("LA")
    try:
        if image.mode in ("P", "PA", "LA") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode in ("RGBA", "RGBa"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except (ValueError, OSError) as e:
        raise ValueError(f"colours of the mode {image.mode} cannot be read ({e}); save the image as RGB") from None


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
    step = 0.5 / 255  # what rounds to 0 and 1
    if finite.size < values.size or low < -step or high > 1 + step:
        other = f" and {values.size - finite.size} that are not finite" if finite.size < values.size else ""
        found = f"from {low:g} to {high:g}" if finite.size else "without a value"
        raise ValueError(
            f"floats {found}{other}; floats are read as 0 (black) to 1 (white): scale them to that, "
            "or save the image with 8 or 16 bits a channel"
        )
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8))

"""Photos in, labels out: files read within limits, brought to RGB in 8 bits by one rule a type, and classified."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from . import environment
from .config_file import explain_model_args
from .files import MAX_FILE_BYTES as MAX_FILE_BYTES
from .files import one_line as one_line
from .files import open_file as open_file
from .files import read_file as read_file
from .hub import config_of, explain_downloads, names_with_weights


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


# ---- classifying ---------------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """What a model says of one photo: `labels` are (class index, name, probability), best first; or an `error`."""

    file: str
    labels: list[tuple[int, str, float]] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `classify --json` prints: the file, and its predictions or its error."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        return {
            "file": self.file,
            "predictions": [{"index": i, "label": name, "probability": p} for i, name, p in self.labels],
        }


def choose_device(name: str) -> torch.device:
    """`name`, or for "auto" the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True)` in evaluation mode, its errors made clear.

    Args:
        name: architecture, architecture.tag, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    Raises:
        ValueError: an unknown model, one without weights (with a list of those that have them), or a folder that is
            not a checkpoint.
        RuntimeError: weights that are broken or do not fit.
    """
    import timm

    from . import registry as _  # noqa: F401  registers, wherever this is called from

    found = config_of(name, kwargs.get("cache_dir"))
    name, config = found or (name, {})
    architecture = config.get("architecture", name.partition(".")[0])
    if (found or ":" not in name) and not timm.is_model(architecture):
        hint = f"; a folder is named local-dir:{name}" if os.path.isdir(name) else ""
        raise ValueError(f"unknown architecture {architecture or name!r}; `timm-halonet list` has this package's{hint}")
    if ":" not in name and not timm.models.is_model_pretrained(name):
        ours = ", ".join(names_with_weights()) or "none"
        raise ValueError(f"{name!r} has no pretrained weights; with weights, of this package: {ours}")
    model_args = config.get("model_args") or {}
    with explain_downloads(name, kwargs.get("cache_dir")), explain_model_args(architecture, model_args, name):
        return timm.create_model(name, pretrained=True, **kwargs).eval()


def label_names(model: nn.Module) -> list[str]:
    """Class names in words: the checkpoint's own, else timm's for ImageNet, else the numbers."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    count = int(model.num_classes)  # type: ignore[arg-type]
    names = cfg.get("label_names")
    if names and len(names) == count:
        descriptions = cfg.get("label_descriptions") or {}
        return [descriptions.get(name, name) for name in names]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]


def find_photos(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files named, and every file below the folders named, in order; each path begins as it was given.

    Raises:
        ValueError: a path that does not exist, or a folder without files.
    """
    found: list[str] = []
    for named in paths:
        given, path = os.fspath(named), Path(named)
        if not given:
            raise ValueError("the name of a photo is empty; . is the folder that this runs in")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            if not files:
                raise ValueError(f"no files in the folder {given}")
            found += (os.path.join(given, p.relative_to(path)) for p in files)
        elif path.exists():
            found.append(given)
        else:
            raise ValueError(f"{given} does not exist")
    return found


def classify(
    model: nn.Module,
    files: Sequence[str | os.PathLike[str]],
    *,
    topk: int = 5,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> Iterator[Prediction]:
    """Predictions in the order of `files`, as they are made; a file that cannot be read gives one with an error.

    Raises:
        ValueError: topk or batch_size below 1.
    """
    from timm.data import create_transform, resolve_data_config

    if topk < 1 or batch_size < 1:
        raise ValueError(f"need topk >= 1 and batch_size >= 1, got {topk=}, {batch_size=}")
    data = resolve_data_config(model=model)
    transform = create_transform(**data)
    side = round(min(data["input_size"][1:]) / (data["crop_pct"] or 1))
    names = label_names(model)
    model = model.to(device)
    for start in range(0, len(files), batch_size):
        batch: list[tuple[Prediction, torch.Tensor | None]] = []
        for file in files[start : start + batch_size]:
            try:
                batch.append((Prediction(str(file)), transform(resizable(open_photo(file), side))))
            except Exception as e:  # whatever a decoder raises for a broken file: the other photos go on
                batch.append((Prediction(str(file), error=photo_error(file, e)), None))
        images = [x for _, x in batch if x is not None]
        probs: Iterator[torch.Tensor] = iter(_probabilities(model, torch.stack(images), device) if images else [])
        for prediction, image in batch:
            if image is not None:
                values, indices = next(probs).topk(min(topk, len(names)))
                prediction.labels = [(i, names[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
            yield prediction


def photo_error(file: str | os.PathLike[str], e: Exception) -> str:
    """One line that names the file and what is wrong with it."""
    name = one_line(os.fspath(file))
    text = str(e).replace(os.fspath(file), name).partition("\n")[0]
    if name in text:
        return text
    return f"{name}: {text if isinstance(e, ValueError) and text else f'{type(e).__name__}: {text}'}"


def resizable(photo: Image.Image, side: int) -> Image.Image:
    """The photo, if its shorter side can become `side` pixels without more pixels than Pillow allows in an image.

    Raises:
        ValueError: it is too long for that.
    """
    short, long = sorted(photo.size)
    limit = max_pixels()
    if limit and side * side * long / short > limit:
        raise ValueError(
            f"{photo.width} x {photo.height} pixels (width, height) would be {side * side * long / short:.0f} pixels "
            f"when the shorter side is {side}, over the limit of {limit}; crop it"
        )
    return photo


@torch.inference_mode()
def _probabilities(model: nn.Module, images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return model(images.to(device)).float().softmax(dim=-1).cpu()

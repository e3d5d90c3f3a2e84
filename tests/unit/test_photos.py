"""Photos as files: one rule a type for their pixels, and limits."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_halonet import photos
from timm_halonet.photos import open_photo, to_rgb

GREY = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


def reopened(tmp_path, image, name, **save):
    image.save(tmp_path / name, **save)
    return np.asarray(open_photo(tmp_path / name))


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.pgm"])
@pytest.mark.parametrize("top", [100, 255, 4095, 65535])
def test_16_bits_are_divided_by_257_however_dark(tmp_path, name, top):
    values = np.round(GREY.astype(np.float64) * top).astype(np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
        found = np.asarray(open_photo(tmp_path / name))
    else:
        found = reopened(tmp_path, Image.fromarray(values), name)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def test_16_bits_of_the_other_byte_order(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    found = reopened(tmp_path, Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()), "a.tif")
    assert np.array_equal(found[..., 0], np.floor(values / 257 + 0.5))


def test_floats_are_0_to_1(tmp_path):
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(reopened(tmp_path, Image.fromarray(GREY), "a.tif")[..., 0], expected)
    dark = reopened(tmp_path, Image.fromarray(GREY / 8), "b.tif")[..., 0]  # by type: not stretched
    assert dark.max() == 32
    rounded = GREY * np.float32(1 + 1e-6) - np.float32(1e-6)
    assert np.array_equal(reopened(tmp_path, Image.fromarray(rounded), "c.tif")[..., 0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * 2 - 1, "floats from -1 to 1; floats are read as 0 .black. to 1 .white.: scale them"),
        (lambda a: a * 255, "floats from 0 to 255; "),
        (lambda a: np.where(a == 0, np.nan, a), "floats from 0.0039.* to 1 and 1 that are not finite; "),
        (lambda a: np.where(a > 0.999, np.inf, a), "floats from 0 to 0.99.* and 1 that are not finite; "),
        (lambda a: a * np.float32(np.nan), "floats without a value and 256 that are not finite; "),
    ],
)
def test_other_floats_are_refused(tmp_path, change, message):
    path = tmp_path / "a.tif"
    Image.fromarray(change(GREY).astype(np.float32)).save(path)
    with pytest.raises(ValueError, match=rf"a.tif: {message}"):
        open_photo(path)


def test_32_bit_integers_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray((GREY * 255).astype(np.int32)).save(path)
    with pytest.raises(ValueError, match=r"a.tif: 32-bit integers have no agreed range; save the image with 8 or 16"):
        open_photo(path)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_8_bits_is_converted(mode):
    """White stays white and black stays black, whatever holds them."""
    black = {"CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "LAB": (0, 128, 128), "HSV": (0, 0, 0)}
    white = {"CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128), "LAB": (255, 128, 128), "HSV": (0, 0, 255)}
    bands = len(Image.new(mode, (1, 1)).getbands())
    opaque = mode in ("LA", "La", "PA", "RGBA", "RGBa")
    for colours, level in ((black, 0), (white, 255)):
        color = colours.get(mode, level if bands == 1 else (level,) * (bands - opaque) + (255,) * opaque)
        image = Image.new(mode, (3, 2), 1 if mode == "P" else (1, 255) if mode == "PA" else color)
        if mode in ("P", "PA"):
            image.putpalette([0, 0, 0, level, level, level])
        found = np.asarray(to_rgb(image)).astype(int)
        assert found.shape == (2, 3, 3) and np.abs(found - level).max() <= 1, mode


def test_transparent_pixels_are_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    found = reopened(tmp_path, palette, "a.png", transparency=0)
    assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [200, 0, 0]
    found = reopened(tmp_path, Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "b.png")
    assert found.min() == 255
    grey = Image.new("L", (4, 4), 7)
    grey.putpixel((0, 0), 5)
    found = reopened(tmp_path, grey, "c.png", transparency=5)
    assert found[0, 0, 0] == 255 and found[1, 1, 0] == 7
    one = Image.new("1", (4, 4), 0)
    assert reopened(tmp_path, one, "d.png", transparency=0).min() == 255
    deep = np.full((4, 4), 25700, np.uint16)
    deep[0, 0] = 5000
    (tmp_path / "e.png").write_bytes(png(deep, transparent=5000))
    found = np.asarray(open_photo(tmp_path / "e.png"))
    assert found[0, 0, 0] == 255 and found[1, 1, 0] == 100


def png(values, transparent=None, size=None):
    """A grey PNG of 16 bits; of a size that need not be the data's."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = size or values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
        + (b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent)))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation_by_header_and_by_pixels(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / name, exif=exif)
    with open(tmp_path / name, "rb") as file:
        assert photos.image_header(file, name) == (20, 40, "RGB")
    assert open_photo(tmp_path / name).size == (20, 40)
    Image.fromarray(np.zeros((20, 40), np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert open_photo(tmp_path / "deep.png").size == (20, 40)


@pytest.mark.parametrize("side", [10_000, 13_000, 20_000])
def test_images_of_too_many_pixels(tmp_path, side):
    """Small files, gigabytes of pixels: refused by the header."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(np.zeros((2, 2), np.uint16), size=(side, side)))
    message = rf"bomb.png: Image size \({side**2} pixels\) exceeds limit of \d+ pixels; cut .* TIMM_HALONET_MAX_PIXELS"
    with pytest.raises(ValueError, match=message):
        open_photo(path)
    with open(path, "rb") as file, pytest.raises(ValueError, match=message):
        photos.image_header(file, "bomb.png")


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (100, 70)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match=r"a.png: Image size \(7000 pixels\) exceeds"):
        open_photo(path)
    monkeypatch.setenv("TIMM_HALONET_MAX_PIXELS", "7000")
    assert open_photo(path).size == (100, 70)
    monkeypatch.setenv("TIMM_HALONET_MAX_PIXELS", "6999")
    with pytest.raises(ValueError, match=r"exceeds limit of 6999 pixels"):
        open_photo(path)
    for wrong in ("many", "0", "-5", "1e9"):
        monkeypatch.setenv("TIMM_HALONET_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=rf"TIMM_HALONET_MAX_PIXELS is '{wrong}', expected a number of pixels"):
            open_photo(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "link.png"):
        with pytest.raises(ValueError, match=rf"{name}: not a regular file"):
            open_photo(tmp_path / name)
    with pytest.raises(ValueError, match=r"nowhere.png: No such file"):
        open_photo(tmp_path / "nowhere.png")


def test_gigantic_files_are_not_read(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match=r"sparse.png: 10737418240 bytes, "):
        open_photo(tmp_path / "sparse.png")

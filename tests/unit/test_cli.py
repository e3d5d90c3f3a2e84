"""The command: classify, list, attend; good photos, odd photos, and everything that goes wrong."""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image

import timm_halonet
from timm_halonet import photos as module
from timm_halonet.cli import main
from timm_halonet.cli.main import make_parser
from timm_halonet.report.attention import attention_of


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i, (width, height) in enumerate([(80, 60), (50, 120), (200, 40)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def test_classify_folder(checkpoint, photos, capsys):
    code = main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--topk", "2", "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert code == 0
    assert [line for line in out if not line.startswith(" ")] == [str(photos / f"{i}.png") for i in range(3)]
    labels = [line.split("%")[1].strip() for line in out if line.startswith(" ")]
    assert len(labels) == 6
    assert set(labels) <= {"cat", "dog", "bee"}


def test_classify_json_and_batches_agree(checkpoint, photos, capsys):
    results = []
    for batch in ("1", "2", "16"):
        args = ["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--json", "--batch-size", batch]
        assert main([*args, "--device", "cpu"]) == 0
        results.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for row in results[0]:
        assert sum(p["probability"] for p in row["predictions"]) == pytest.approx(1, abs=1e-4)
        assert row["predictions"] == sorted(row["predictions"], key=lambda p: -p["probability"])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a["file"] == b["file"]
            assert [p["index"] for p in a["predictions"]] == [p["index"] for p in b["predictions"]]


def test_a_bad_file_does_not_stop_the_folder(checkpoint, photos, capsys):
    (photos / "1b.txt").write_text("no photo")
    (photos / "1c.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes()[:2000])
    code = main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu", "--json"])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert code == 1
    assert [("error" in row) for row in rows] == [True, False, True, True, False]
    assert "1b.txt: not an image that Pillow can read (8 bytes)" in captured.err
    assert "3 of 5 files could not be read" in captured.err


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("AVIF", lambda b: b[: b.index(b"mdat") + 4] + bytes(len(b) - b.index(b"mdat") - 4)),
        ("DDS", lambda b: b[:80] + b"\x80" + b[81:]),
        ("BLP", lambda b: b[:8] + b"\x7f" + b[9:]),
        ("TIFF", lambda b: b[:4] + b"\xff\xff\xff\x7f" + b[8:]),
        ("GIF", lambda b: b[:20]),
    ],
)
def test_broken_files_of_every_kind(checkpoint, photos, capsys, kind, spoil):
    image, whole = Image.new("P" if kind == "BLP" else "RGB", (64, 48)), io.BytesIO()
    try:
        image.save(whole, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    (photos / "1b.bin").write_bytes(spoil(whole.getvalue()))
    code = main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu", "--json"])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert code == 1 and [("error" in row) for row in rows] == [False, False, True, False]
    assert "1b.bin" in captured.err and "1 of 4 files could not be read" in captured.err


def test_any_error_of_a_decoder_is_one_files_error(checkpoint, photos, capsys, monkeypatch):
    opened = module.open_photo

    def broken(path):
        if str(path).endswith("1.png"):
            raise IndexError("tuple index out of range\nmore")
        return opened(path)

    monkeypatch.setattr(module, "open_photo", broken)
    assert main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert f"error: {photos / '1.png'}: IndexError: tuple index out of range\n" in captured.err
    assert str(photos / "0.png") in captured.out and str(photos / "2.png") in captured.out


def test_long_photo_is_named_before_it_fills_the_memory(checkpoint, photos, capsys):
    Image.new("L", (60000, 1)).save(photos / "1b.png")
    assert main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "1b.png: 60000 x 1 pixels (width, height) would be 245760000 pixels" in captured.err
    assert captured.out.count(".png") == 3


NAMES = [b"caf\xe9.png", "細 😀.png".encode(), "é.png".encode(), b"a" * 249 + b".png"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_a_terminal_cannot_show(checkpoint, photos, monkeypatch, encoding, name):
    try:
        os.rename(photos / "1.png", os.fsencode(photos) + b"/" + name)
    except OSError as e:
        pytest.skip(f"this file system has no such names: {e}")
    out = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", out[0])
    monkeypatch.setattr(sys, "stderr", out[1])
    argv = ["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu"]
    assert main([*argv, "--json"]) == 0
    rows = [json.loads(line) for line in out[0].buffer.getvalue().decode(encoding).splitlines()]
    assert sorted(os.fsencode(row["file"]) for row in rows) == sorted(os.fsencode(p) for p in photos.iterdir())
    assert main(argv) == 0
    assert main(["classify", str(photos / "nowhere\udce9 細.png")]) == 1
    assert b"does not exist" in out[1].buffer.getvalue()
    assert out[0].errors == "strict"  # as it was


def test_paths_are_shown_as_they_were_given(checkpoint, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    argv = ["classify", "./0.png", "../photos//1.png", "./../photos", "--model", f"local-dir:{checkpoint}"]
    assert main([*argv, "--device", "cpu", "--topk", "1"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == ["./0.png", "../photos//1.png", *(f"./../photos/{n}.png" for n in range(3))]
    assert main(["classify", "./nowhere//x.png"]) == 1
    assert "error: ./nowhere//x.png does not exist" in capsys.readouterr().err


def test_line_breaks_in_names(checkpoint, photos, capsys):
    """A name takes one line, and what is wrong stands in it."""
    odd = photos / "a\nb\r\x1b[31m.png"
    odd.write_bytes((photos / "0.png").read_bytes())
    (photos / "c\nd.png").write_bytes(b"x")
    argv = ["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu", "--topk", "1"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8 and f"{photos}/a\\nb\\r\\x1b[31m.png" in out.splitlines()
    [line] = [line for line in err.splitlines() if "error" in line]
    assert line.endswith(f"{photos}/c\\nd.png: not an image that Pillow can read (1 bytes)")
    assert main([*argv, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["file"] for line in lines} == {str(photo) for photo in photos.iterdir()}


def test_odd_photos(tmp_path):
    def saved(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return module.open_photo(tmp_path / name)

    assert saved(Image.new("L", (5, 4), 77), "grey.png").getpixel((0, 0)) == (77, 77, 77)
    assert saved(Image.new("RGBA", (5, 4), (10, 20, 30, 0)), "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("CMYK", (5, 4)), "cmyk.jpg").mode == "RGB"
    assert saved(Image.new("P", (5, 4), 3), "palette.gif").mode == "RGB"
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 65535)
    deep.putpixel((1, 0), 32768)
    deep = saved(deep, "deep.png")
    assert deep.getpixel((0, 0)) == (255, 255, 255)
    assert abs(deep.getpixel((1, 0))[0] - 127) <= 1
    # EXIF orientation 6: the camera was held upright, the file is lying
    lying = Image.new("RGB", (4, 2), "black")
    lying.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = saved(lying, "exif.png", exif=exif)
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_image_bomb_is_refused_with_its_pixels(checkpoint, photos, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    code = main(["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu"])
    err = capsys.readouterr().err
    assert code == 1
    assert "6000 pixels" in err  # 50 x 120: over the limit; Pillow only warns of it
    assert "8000 pixels" in err  # 200 x 40
    assert "3 of 3" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["classify", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["classify", "PHOTO", "--model", "halonet_h99"], "unknown architecture 'halonet_h99'"),
        (["classify", "PHOTO", "--model", "halonet_h7"], "'halonet_h7' has no pretrained weights"),
        (["classify", "PHOTO", "--model", "local-dir:/nowhere"], "config.json does not exist"),
        (["classify", "PHOTO", "--model", "MODEL", "--topk", "0"], "topk=0"),
        (["classify", "PHOTO", "--model", "MODEL", "--device", "abacus"], "'abacus' cannot be used"),
        (["classify", "EMPTY", "--model", "MODEL"], "no files in the folder"),
        (["attend", "PHOTO", "--at", "60,10", "--model", "MODEL"], "60,10 lies outside the photo of 60 x 80 pixels"),
        (["attend", "TEXT", "--at", "1,1", "--model", "MODEL"], "not an image"),
        (["attend", "LONG", "--at", "0,0", "--model", "MODEL"], "has 3000 x 1 pixels (width, height), and all of it"),
        (["classify", ""], "the name of a photo is empty"),
        (["classify", "PHOTO", "--model", "./model"], "unknown architecture './model'"),
        (["classify", "PHOTO", "--model", "EMPTY"], "a folder is named local-dir:"),
        (
            ["attend", "PHOTO", "--at", "1,1", "--model", "MODEL", "--out", "a.gif"],
            "the suffix is '.gif', pictures are",
        ),
    ],
)
def test_errors(argv, message, checkpoint, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    Image.new("RGB", (3000, 1)).save(tmp_path / "long.png")
    names = {
        "LONG": str(tmp_path / "long.png"),
        "PHOTO": str(photos / "0.png"),
        "EMPTY": str(tmp_path / "empty"),
        "MODEL": f"local-dir:{checkpoint}",
        "TEXT": str(tmp_path / "a.txt"),
    }
    assert main([names.get(a, a) for a in argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("timm-halonet: error: ")
    assert message in err


def test_broken_checkpoints_are_named(checkpoint, photos, capsys):
    argv = ["classify", str(photos), "--model", f"local-dir:{checkpoint}", "--device", "cpu"]
    config = checkpoint / "config.json"
    text = config.read_text()
    config.write_text(text.replace("halonet_h0", "halonet_h3"))  # another architecture than the weights'
    assert main(argv) == 1
    assert "size mismatch" in capsys.readouterr().err
    config.write_text(text[:-10])
    assert main(argv) == 1
    assert f"{config} is not JSON" in capsys.readouterr().err
    config.write_text(text)
    (checkpoint / "model.safetensors").write_bytes(b"x" * 100)
    assert main(argv) == 1
    assert "model.safetensors (100 bytes) is not a checkpoint but a text that begins with" in capsys.readouterr().err


def test_usage_errors():
    for argv in ([], ["attend", "x.png", "--at", "1"], ["attend", "x.png", "--at", "a,b"], ["classify"]):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2


def parsers(parser, words=()):
    """The parsers of all commands and of their actions, with their words."""
    yield list(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, [*words, name])


@pytest.mark.parametrize("words", [words for words, _ in parsers(make_parser())], ids=" ".join)
def test_every_help_text_has_an_example_that_parses(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as e:
        main([*words, "--help"])
    assert e.value.code == 0
    start, _, example = capsys.readouterr().out.splitlines()[-1].partition(" timm-halonet ")
    assert start == "Example:"  # the last line, so it was not wrapped
    args = shlex.split(example)
    assert args[: len(words)] == words
    assert callable(make_parser().parse_args(args).run)


def test_version(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"timm-halonet {timm_halonet.__version__}\n"


def test_a_warning_is_one_line(capsys, monkeypatch):
    """The hint that there is no compiler, say, without the source line that it came from."""

    def warn(paths):
        warnings.warn("the kernel is missing;\ninstall g++", RuntimeWarning, stacklevel=2)
        raise ValueError("stop")

    def show(message, category, filename, lineno, file=None, line=None):  # Python's own, which pytest replaces
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    monkeypatch.setattr(module, "find_photos", warn)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert main(["classify", "x.png"]) == 1
    assert capsys.readouterr().err == (
        "timm-halonet: warning: the kernel is missing; install g++\ntimm-halonet: error: stop\n"
    )
    assert warnings.formatwarning is before


@pytest.mark.integration
def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "timm_halonet", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"timm-halonet {timm_halonet.__version__}\n"), done.stderr


@pytest.mark.integration
def test_list(capsys):
    assert main(["list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["model", "parameters", "image_size", "weights"]
    assert any(row.split()[:2] == ["halonet_h3", "11842792"] for row in rows)
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["model"] == "halonet_h0"


def test_attend(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "where.png"
    argv = ["attend", str(photos / "0.png"), "--at", "30,70", "--model", f"local-dir:{checkpoint}", "--device", "cpu"]
    assert main([*argv, "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert f"{image.width} x {image.height}" in capsys.readouterr().out
        assert image.width > 4 * image.height  # the photo and four stages side by side
        assert image.height == 320 + 40  # of a panel, and its title
    assert main([*argv, "--out", str(tmp_path / "small.png"), "--panel", "100"]) == 0
    with Image.open(tmp_path / "small.png") as image:
        assert image.height == 100 + 40
    (tmp_path / "small.png").unlink()
    for height in ("63", "2049", "x", "-1"):
        with pytest.raises(SystemExit):
            main([*argv, "--panel", height])
        assert "height from 64 to 2048" in capsys.readouterr().err
    # a place where nothing can be written: an error, and what was there stays
    (tmp_path / "file").write_text("kept")
    assert main([*argv, "--out", str(tmp_path / "file" / "x.png")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "missing" / "x.png")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main([*argv, "--out", str(photos)]) == 1  # a folder
    assert "cannot write" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "halonet_h0.test_r64", "photos", "where.png"]


def test_attention_lies_in_the_window(checkpoint):
    model = module.load_model(f"local-dir:{checkpoint}")
    found = attention_of(model, torch.rand(1, 3, 200, 150), (0.5, 0.9))
    assert [a.map_size for a in found] == [(50, 38), (25, 19), (13, 10), (7, 5)]
    assert [a.name for a in found] == [f"stages.{i}.{n - 1}.self_attn" for i, n in enumerate((3, 3, 7, 3))]
    for a in found:
        top, left, bottom, right = a.window
        assert a.weights.shape == a.map_size
        assert float(a.weights.sum()) == pytest.approx(1, abs=1e-4)
        assert float(a.weights[top:bottom, left:right].sum()) == pytest.approx(1, abs=1e-4)
        y, x = int(0.5 * a.map_size[0]), int(0.9 * a.map_size[1])
        assert a.block[0] <= y < a.block[2]
        assert a.block[1] <= x < a.block[3]
    assert found[0].block == (24, 32, 32, 38)
    assert found[0].window == (21, 29, 35, 38)
    with pytest.raises(ValueError, match="0 <= y, x < 1"):
        attention_of(model, torch.rand(1, 3, 64, 64), (1.0, 0.2))
    with pytest.raises(ValueError, match="no halo attention"):
        attention_of(torch.nn.Conv2d(3, 3, 1), torch.rand(1, 3, 64, 64), (0.1, 0.2))


@pytest.mark.integration
def test_the_installed_command_works_offline(checkpoint, photos):
    """In a process of its own, as users run it."""
    code = "import sys; from timm_halonet.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "classify", str(photos / "0.png"), "--model", f"local-dir:{checkpoint}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(photos / "0.png")
    assert done.stderr == ""

"""docs/examples/sharpness.py: a model that looks at sharpness is told from one that does not."""

import numpy as np
import pytest
import sharpness
import torch
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            pixels = generator.integers(0, 256, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    return tmp_path


class Model(torch.nn.Module):
    """Two classes by one figure of the photo."""

    def __init__(self, figure):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
        self.figure = figure

    def forward(self, x):
        found = self.figure(x)
        return torch.stack([found, -found], 1)


def contrast(x):
    return 100 * (x.std((1, 2, 3)) - 0.25)


def brightness(x):
    return 100 * (x.mean((1, 2, 3)) + 0.5)


@pytest.mark.parametrize(("figure", "same"), [(contrast, 0), (brightness, 100)])
def test_who_looks_at_sharpness(photos, figure, same):
    files = sharpness.find_photos(photos, 3)
    assert [f for f, _ in files] == ["a"] * 3 + ["b"] * 3
    row = sharpness.row("m", 32, sharpness.answers(Model(figure), files, 32, 4))
    assert row == f"| m | 32 | {same} | 100 | 100 | 100 |"


def test_blur_to_the_same_size_changes_nothing(photos):
    _, file = sharpness.find_photos(photos, 1)[0]
    with Image.open(file) as photo:
        views = sharpness.views(photo, 32, 32)
    assert views["blurred"].tobytes() == views["sharp"].tobytes() != views["moved"].tobytes()


def test_no_photos_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sharpness.main(["--data-dir", str(tmp_path), "--models", "halonet_h0", "--img-size", "32"])
    assert f"{tmp_path} holds no folders of photos" in capsys.readouterr().err

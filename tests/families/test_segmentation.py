"""Semantic segmentation by segmentation_models_pytorch over these backbones: it learns, on synthetic blobs."""

import io
import json
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "segment_nuclei.py"


def blobs(n, generator, size=64):
    """Photos (n, 3, size, size) of bright discs in noise, and their foregrounds (n, 1, size, size), 0 or 1."""
    place = torch.arange(size)
    y = torch.zeros(n, 1, size, size)
    for image in y:
        for row, col, radius in torch.randint(6, size - 6, (3, 3), generator=generator).tolist():
            radius = 5 + radius % 8
            image[0][(place[:, None] - row) ** 2 + (place - col) ** 2 < radius**2] = 1
    x = 0.5 * y + 0.5 * torch.randn(n, 3, size, size, generator=generator)
    return x, y


@torch.no_grad()
def iou(model, x, y):
    found = model.eval()(x) > 0
    assert found.shape == y.shape
    return float((found & (y > 0)).sum() / (found | (y > 0)).sum())


@pytest.mark.parametrize(("name", "weights"), [("halonet_h0", True), ("seresnet50_halo8", None)])
def test_a_few_steps(name, weights):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = smp.Unet(f"tu-{name}", encoder_weights=weights, decoder_channels=(64, 32, 32, 16, 16))
    held_out = blobs(8, generator)
    before = iou(model, *held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(16):
        x, y = blobs(4, generator)
        loss = F.binary_cross_entropy_with_logits(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    after = iou(model, *held_out)
    assert after > max(0.5, before + 0.2), (before, after)


def test_the_example_in_the_docs(tmp_path, monkeypatch, capsys):
    """A few steps, stopped and gone on with, on a tar of three photos in the data's layout."""
    rng = np.random.default_rng(0)
    names = {"train": ["a", "b"], "val": ["c"]}
    with tarfile.open(tmp_path / "data.tar", "w") as tar:

        def add(name, data):
            info = tarfile.TarInfo(f"dsb2018/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for name in "abc":
            label = np.zeros((70, 90), np.uint16)
            label[20:50, 30:60] = 300
            photo = (np.where(label > 0, 200, 50)[..., None] + rng.integers(50, size=(70, 90, 3))).astype(np.uint8)
            for kind, array, ending in (("images", photo, "jpg"), ("labels", label, "png")):
                data = io.BytesIO()
                Image.fromarray(array).save(data, {"jpg": "JPEG", "png": "PNG"}[ending])
                add(f"{kind}/{name}.{ending}", data.getvalue())
        add("split.json", json.dumps(names).encode())

    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*options):
        monkeypatch.setattr("sys.argv", [SCRIPT.name, "--data=data.tar", "--crop=64", "--batch=2", *options])
        main()
        return capsys.readouterr().out.splitlines()

    first = run("--steps", "2")
    assert first[0].startswith("step 2/2, loss ")
    second = run("--steps", "4")
    assert second[0].startswith("step 4/4, loss ")
    assert second[1].startswith("4 steps: foreground IoU 0.")
    assert torch.load(tmp_path / "segment.pt", weights_only=True)["step"] == 4
    assert run("--steps", "9", "--minutes", "0") == second[1:]  # no time for more: the same model's IoU

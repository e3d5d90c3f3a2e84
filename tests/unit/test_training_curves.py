"""Fifty training steps with every backend: the loss curves differ by no more than rounding makes them differ.

Rounding grows from step to step, so its size is measured, not guessed: with one backend, the same training from weights
that a factor of 1 + 1e-7 n (n normal noise; the spacing of float32 is 1.2e-7) has shaken, and with another number of
threads.
"""

import os
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageDataset, create_transform

from timm_halonet.ops import BACKENDS

STEPS, BATCH = 50, 16
SHAKEN = 3
FACTOR = 2  # rounding comes anew with every step, the measured noise once


@pytest.fixture(scope="module")
def photos():
    folder = os.environ.get("TIMM_HALONET_DATA")
    if not folder:
        pytest.skip("set TIMM_HALONET_DATA to the folder that holds clothing64-train.tar")
    path = Path(folder) / "clothing64-train.tar"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    dataset = ImageDataset(str(path), transform=create_transform(64, is_training=False, crop_pct=1.0))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH].tolist()
    images, targets = zip(*(dataset[i] for i in chosen), strict=True)
    assert len(set(targets)) == 10
    return torch.stack(images).split(BATCH), torch.tensor(targets).split(BATCH)


def losses(photos, backend, monkeypatch, device="cpu", dtype=torch.float32, shake=0):
    """The loss of each step of a training of halonet_h0."""
    monkeypatch.setenv("TIMM_HALONET_BACKEND", backend)
    torch.manual_seed(0)
    model = timm.create_model("halonet_h0", num_classes=10)
    if shake:
        generator = torch.Generator().manual_seed(shake)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator))
    model.to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    history = []
    for x, y in zip(*photos, strict=True):
        loss = torch.nn.functional.cross_entropy(model(x.to(device, dtype)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return torch.tensor(history, dtype=torch.float64)


def write(found, name):
    """As CSV, for looking at, where TIMM_HALONET_CURVES names a folder."""
    if folder := os.environ.get("TIMM_HALONET_CURVES"):
        rows = ["step," + ",".join(found)]
        rows += [f"{i}," + ",".join(f"{float(x[i]):.10f}" for x in found.values()) for i in range(STEPS)]
        (Path(folder) / f"{name}.csv").write_text("\n".join(rows) + "\n")


def learnt(curve):
    return curve[-10:].mean() < curve[:10].mean() - 0.05


def far(a, b):
    """How far two curves have been apart up to each step: the largest difference."""
    return (a - b).abs().cummax(0).values


def runs_on(device, dtype):
    return [
        name for name, (_, can_run) in BACKENDS.items() if can_run(torch.zeros(1, device=device, dtype=dtype)) is None
    ]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_loss_curves_agree_to_float_noise(photos, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    names = runs_on(device, torch.float32)
    found = {name: losses(photos, name, monkeypatch, device) for name in names}
    noisy = {
        f"{names[0]} shaken {i}": losses(photos, names[0], monkeypatch, device, shake=i) for i in range(1, SHAKEN + 1)
    }
    if device == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        noisy[f"{names[0]} with {torch.get_num_threads()} threads"] = losses(photos, names[0], monkeypatch)
        torch.set_num_threads(threads)
    write({**found, **noisy}, f"float32-{device}")
    assert learnt(found["reference"])
    noise = torch.stack([far(x, found[names[0]]) for x in noisy.values()]).amax(0)
    for name in names:
        apart = far(found[name], found["reference"])
        assert apart[0] < 1e-5  # the first loss has no history that could grow
        worst = (apart / (noise + 1e-5)).argmax()
        assert apart[worst] <= FACTOR * (noise[worst] + 1e-5), (
            f"{name} at {worst}: {apart[worst]:.1e}, {noise[worst]:.1e}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_loss_curves_agree_in_float64(photos, device, monkeypatch):
    """With noise 1e9 times smaller, fifty steps do not bring it to the eye: here the curves are one.

    The sharper of the two tests: q.k scaled by 1.01 moves the losses by 1e-2 in twenty steps, which in float32 is what
    rounding does as well.
    """
    found = {name: losses(photos, name, monkeypatch, device, torch.float64) for name in runs_on(device, torch.float64)}
    write(found, f"float64-{device}")
    assert learnt(found["reference"])
    for curve in found.values():
        torch.testing.assert_close(curve, found["reference"], atol=1e-5, rtol=0)

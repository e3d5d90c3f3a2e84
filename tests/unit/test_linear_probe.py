"""docs/examples/linear_probe.py: what it probes, on photos whose classes are colours."""

import numpy as np
import pytest
from PIL import Image

linear_probe = pytest.importorskip("linear_probe", reason="needs scikit-learn")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 50, (32, 32, 3))
                Image.fromarray((noise + colour).astype(np.uint8)).save(folder / split / label / f"{i}.png")
    return folder


def test_features_are_the_model_s_pre_logits(photos):
    model = linear_probe.create("halonet_h0", seed=0)
    x, y = linear_probe.features(model, str(photos), "validation", 32, 4, 0)
    assert x.shape == (6, model.num_features)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_table_separates_colours(photos, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{linear_probe.START}\n{linear_probe.END}\n")
    options = [
        "--models",
        "halonet_h0",
        "--img-size",
        "32",
        "--seeds",
        "0",
        "1",
        "--workers",
        "0",
        "--markdown",
        str(page),
    ]
    assert linear_probe.main(["--data-dir", str(photos), *options]) == 0
    assert "| halonet_h0, random weights | 32 | 100.0, 100.0 | 100.0 |" in page.read_text()


def test_labels_without_meaning_are_not_learnt():
    generator = np.random.default_rng(0)
    split = generator.normal(size=(200, 8)), generator.integers(0, 2, 200)
    assert linear_probe.probe(split, (generator.normal(size=(200, 8)), generator.integers(0, 2, 200)), 0) < 65


def test_a_share_of_every_class():
    labels = np.repeat([0, 1, 2], [50, 10, 3])
    kept = linear_probe.a_share(labels, 0.2, 0)
    assert np.bincount(labels[kept]).tolist() == [10, 2, 2]
    assert kept.tolist() != linear_probe.a_share(labels, 0.2, 1).tolist()
    with pytest.raises(SystemExit):
        linear_probe.main(["--data-dir", "x", "--models", "halonet_h0", "--img-size", "32", "--train-share", "0"])

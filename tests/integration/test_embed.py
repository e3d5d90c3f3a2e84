"""`timm-halonet embed` on a local Ray: order, labels, equality with timm, bad files, interruptions."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_halonet.cli import main
from timm_halonet.photos import load_model

ray = pytest.importorskip("ray", reason="needs the extra ray")
pq = pytest.importorskip("pyarrow.parquet")

from timm_halonet.embedding import Job, session  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all tests here."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def photos(tmp_path):
    """Nine photos of different sizes in three folders, none like the other."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    for n in range(9):
        path = folder / ("ant", "bee", "cat")[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60 + 9 * n, 100 - 5 * n, 3), np.uint8)).save(path)
    return folder


def timms(checkpoint, files):
    """Features and probabilities as timm has them."""
    from timm.data import create_transform, resolve_data_config

    model = load_model(f"local-dir:{checkpoint}")
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        return model.forward_head(model.forward_features(x), pre_logits=True).numpy(), model(x).softmax(-1).numpy()


def embed(checkpoint, photos, out, *more):
    return main(
        ["embed", str(photos), "--out", str(out), "--model", f"local-dir:{checkpoint}", "--device", "cpu", *more]
    )


def test_rows_are_timms_features_in_the_order_of_the_paths(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "x.parquet"
    assert embed(checkpoint, photos, out, "--batch-size", "2", "--part-size", "4") == 0
    assert f"{out}: 9 photos, features of halonet_h0" in capsys.readouterr().out
    table = pq.read_table(out)
    assert table.column_names == ["path", "label", "model", "features"]
    files = sorted(photos.rglob("*.png"))
    assert table["path"].to_pylist() == [str(file) for file in files]
    assert table["label"].to_pylist() == ["ant"] * 3 + ["bee"] * 3 + ["cat"] * 3
    assert {*table["model"].to_pylist()} == {"halonet_h0"}
    features, _ = timms(checkpoint, files)
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), features, rtol=1e-4, atol=1e-5)
    assert np.abs(np.diff(features, axis=0)).max() > 1e-2  # or any order would do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["halonet_h0.test_r64", "photos", "x.parquet"]


def test_an_interrupted_run_goes_on_and_names_bad_files(checkpoint, photos, tmp_path, capsys):
    (photos / "ant" / "0.png").write_bytes(b"x")
    (photos / "cat" / "8.png").write_bytes((photos / "cat" / "8.png").read_bytes()[:3000])
    out = tmp_path / "x.parquet"
    job = Job([photos], out, load_model(f"local-dir:{checkpoint}"), output="probabilities", batch_size=2, part_size=3)
    with session() as resources:
        steps = job.run(resources)
        while not (first := Path(f"{out}.parts") / "part-000000.parquet").exists():
            next(steps)
        steps.close()  # as by Ctrl-C
    with pytest.raises(RuntimeError, match="parts are missing"):
        job.finish()
    assert not out.exists() and not (Path(f"{out}.parts") / "part-000002.parquet").exists()
    before = first.stat()

    argv = ["--output", "probabilities", "--batch-size", "2"]
    assert embed(checkpoint, photos, out, *argv, "--part-size", "3") == 1
    said = capsys.readouterr()
    done = int(said.out.split(" of 9 photos are done already")[0])
    assert done in (3, 6)
    assert "bee" not in said.err and f"{photos}/cat/8.png: not an image that Pillow can read" in said.err
    assert f"{photos}/ant/0.png" not in said.err  # named in the first run, not read again
    assert f"2 of 9 files could not be read; {out}.skipped.csv lists them" in said.err
    lines = Path(f"{out}.skipped.csv").read_text().splitlines()
    assert lines[0] == "path,error" and [line.split(",")[0] for line in lines[1:]] == [
        str(photos / "ant" / "0.png"),
        str(photos / "cat" / "8.png"),
    ]
    table = pq.read_table(out)
    files = [f for f in sorted(photos.rglob("*.png")) if f.name not in ("0.png", "8.png")]
    assert table["path"].to_pylist() == [str(file) for file in files]
    _, expected = timms(checkpoint, files)
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()), expected, rtol=1e-4, atol=1e-5)
    names = ["cat", "dog", "bee"]
    assert table["prediction"].to_pylist() == [names[i] for i in expected.argmax(1)]
    assert table.schema.metadata[b"label_names"] == b'["cat", "dog", "bee"]'
    assert before.st_size and not Path(f"{out}.parts").exists()


def test_shards(checkpoint, photos, tmp_path, capsys):
    shards, files = tmp_path / "shards", sorted(photos.rglob("*.png"))
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for n in range(3):
                for kind, content in (("png", files[3 * number + n].read_bytes()), ("cls", str(n).encode())):
                    info = tarfile.TarInfo(f"{n}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (shards / "2.tar").write_bytes((shards / "0.tar").read_bytes()[:700])
    shutil.copy(shards / "1.tar", shards / "3.tar")
    out = tmp_path / "x.parquet"
    assert embed(checkpoint, shards, out, "--batch-size", "2") == 1
    assert f"{shards}/2.tar: the shard cannot be read on (" in capsys.readouterr().err
    table = pq.read_table(out)
    assert table["path"].to_pylist() == [f"{shards}/{s}.tar/{n}.png" for s in (0, 1, 3) for n in range(3)]
    assert table["label"].to_pylist() == ["0", "1", "2"] * 3
    expected, _ = timms(checkpoint, [*files[:6], *files[3:6]])
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), expected, rtol=1e-4, atol=1e-5)

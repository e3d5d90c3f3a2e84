"""What `timm-halonet embed` does apart from Ray: sources, shards, parts, and what it refuses before it starts."""

import builtins
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from timm_halonet.cli import main
from timm_halonet.embedding import Job
from timm_halonet.embedding.parts import Part, Parts, cut
from timm_halonet.embedding.pipeline import Decoder, vectors
from timm_halonet.embedding.shards import read_samples
from timm_halonet.embedding.sources import Source, find_sources
from timm_halonet.photos import load_model


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for n, name in enumerate(["cat/b.png", "cat/a.png", "dog/old/c.png", "d.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (n, 10 * n, 20 * n)).save(folder / name)
    return folder


def make_shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(value, size=(70, 80)):
    content = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(content, "PNG")
    return content.getvalue()


def test_ray_is_missing(checkpoint, photos, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    argv = ["embed", str(photos), "--model", f"local-dir:{checkpoint}", "--out", str(tmp_path / "x.parquet")]
    assert main(argv) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("timm-halonet: error: embed needs Ray Data (") and "pip install 'timm_halonet[ray]'" in line


def test_labels_are_folder_names_and_the_order_is_that_of_the_paths(photos):
    sources, shards = find_sources([photos])
    assert not shards
    assert [(os.path.relpath(s.path, photos), s.label) for s in sources] == [
        ("cat/a.png", "cat"),
        ("cat/b.png", "cat"),
        ("d.png", None),
        ("dog/old/c.png", "old"),  # the folder that holds it, as timm has it
    ]
    files = [str(photos / "dog/old/c.png"), str(photos / "cat")]
    assert [(os.path.basename(s.path), s.label) for s in find_sources(files)[0]] == [
        ("c.png", None),
        ("a.png", None),
        ("b.png", None),
    ]


def test_what_the_run_itself_writes_is_left_out(photos):
    (photos / "x.parquet.parts").mkdir()
    (photos / "x.parquet.parts" / "part-000000.parquet").touch()
    (photos / "x.parquet").touch()
    sources, _ = find_sources([photos], [str(photos / "x.parquet"), str(photos / "x.parquet.parts")])
    assert len(sources) == 4


def test_places_that_pyarrow_knows(photos):
    pytest.importorskip("pyarrow")
    (photos / "cat" / ".hidden.png").touch()
    sources, _ = find_sources([f"file://{photos}"])
    local, _ = find_sources([photos])
    assert [(s.path.removeprefix("file://"), s.label, s.size) for s in sources] == [
        (s.path, s.label, s.size) for s in local
    ]
    [one], _ = find_sources([f"file://{photos}/d.png"])
    assert (one.path, one.label) == (f"file://{photos}/d.png", None)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_sources([f"file://{photos}/nowhere"])


def test_photos_and_shards_together(photos, tmp_path):
    shard = make_shard(tmp_path / "0.tar", [])
    with pytest.raises(ValueError, match=r"0.tar is a shard and .*d.png is not"):
        find_sources([shard, photos / "d.png"])
    assert find_sources([shard])[1]


def test_samples_of_a_shard(tmp_path):
    pytest.importorskip("pyarrow")
    files = [
        ("a/1.cls", b"7\n"),
        ("a/1.jpg", b"one"),
        ("a/1.seg.png", b"mask"),
        ("2.json", b'{"label": "bee"}'),
        ("2.PNG", b"two"),
        ("3.txt", b"text"),
    ]
    samples = list(read_samples(str(make_shard(tmp_path / "0.tar", files))))
    assert [(s.name, s.label()) for s in samples] == [("a/1.jpg", "7"), ("2.png", "bee"), ("3", "")]
    assert [s.image() for s in samples[:2]] == [b"one", b"two"]
    with pytest.raises(ValueError, match=r"no photo among the sample's files \(txt\)"):
        samples[2].image()


DATA = dict(
    input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="center",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip


def decode_shard(path, batch_size=2):
    batch = {"source": np.array([5]), "path": np.array([os.fsencode(path)], object)}
    return list(Decoder(DATA, batch_size).shards(batch))


def test_a_broken_shard_gives_what_it_has_and_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    shard = make_shard(tmp_path / "0.tar", [(f"{n}.png", png(n)) for n in range(5)])
    whole = decode_shard(shard)
    assert [batch["name"].tolist() for batch in whole] == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]
    assert [int(x[0, 0, 0]) for batch in whole for x in batch["image"]] == [0, 1, 2, 3, 4]
    assert {*whole[0]["source"]} == {5} and not any(batch["error"].any() for batch in whole)
    content = shard.read_bytes()
    start = content.index(b"3.png")
    shard.write_bytes(content[: start + 520])  # within the file of the fourth
    rows = [row for b in decode_shard(shard) for row in zip(b["name"], b["error"], strict=True)]
    assert [name for name, _ in rows] == ["0.png", "1.png", "2.png", ""][: len(rows) - 1] + [""]
    assert rows[-1][1].startswith("the shard cannot be read on (") and not any(error for _, error in rows[:-1])
    assert len(rows) >= 3
    for junk in (b"junk" * 1000, b""):
        shard.write_bytes(junk)
        [batch] = decode_shard(shard)
        assert batch["name"].tolist() == [""] and "cannot be read" in batch["error"][0]


def test_a_photo_that_cannot_be_read_is_one_rows_error(photos):
    (photos / "cat" / "a.png").write_bytes(b"x")
    paths = [photos / "d.png", photos / "cat" / "a.png", photos / "nowhere.png", photos]
    batch = {"source": np.arange(4), "path": np.array([os.fsencode(path) for path in paths], object)}
    found = Decoder(DATA, 2).photos(batch)
    assert found["error"].tolist() == [
        "",
        "not an image that Pillow can read (1 bytes)",
        "No such file or directory",
        "not a regular file",
    ]
    assert found["image"].shape == (4, 3, 32, 32) and found["image"].dtype == np.uint8
    assert int(found["image"][0, 2, 0, 0]) == 20 * 3


class Maps(torch.nn.Module):
    def forward(self, x):
        return x


def test_a_model_without_vectors_is_refused():
    with pytest.raises(ValueError, match=r"Maps does not give one vector a photo but \(1, 3, 8, 8\)"):
        vectors(Maps(), torch.zeros(1, 3, 8, 8), "probabilities")


# Parts


def sources(*names):
    return [Source(name, None, 1, 2) for name in names]


@pytest.fixture
def store(tmp_path):
    pa = pytest.importorskip("pyarrow")
    fields = [("path", pa.string()), ("values", pa.list_(pa.float32(), 2)), ("error", pa.string())]
    return Parts(tmp_path / "x.parts", pa.schema(fields), {"model": "a", "output": "features"})


def columns(part, *bad):
    names = [s.path for s in part.sources]
    return {
        "path": names,
        "values": [[part.number, n] for n in range(len(names))],
        "error": ["broken" if name in bad else None for name in names],
    }


def test_parts_are_joined_in_order_without_bad_rows(store, tmp_path):
    import pyarrow.parquet as pq

    out, skipped = tmp_path / "x.parquet", tmp_path / "x.parquet.skipped.csv"
    parts = cut(sources("a", "b", "c", "d", "e"), 2)
    assert [len(part.sources) for part in parts] == [2, 2, 1]
    for part in reversed(parts):
        store.write(part, columns(part, "b", "e"))
    assert all(store.is_done(part) for part in parts)
    assert store.join(parts, out, skipped) == (3, 2)
    assert pq.read_table(out).to_pydict() == {"path": ["a", "c", "d"], "values": [[0, 0], [1, 0], [1, 1]]}
    assert skipped.read_text() == "path,error\nb,broken\ne,broken\n"
    assert not store.folder.exists()
    for part in parts:
        store.write(part, columns(part))
    assert store.join(parts, out, skipped) == (5, 0)
    assert not skipped.exists()  # of the earlier run


def test_a_part_is_done_only_for_the_same_files(store):
    part = Part(0, sources("a", "b"))
    assert not store.is_done(part)
    store.write(part, columns(part))
    assert store.is_done(part)
    others = [
        sources("a"),
        sources("b", "a"),
        sources("a", "b", "c"),
        [*sources("a"), Source("b", None, 1, 3)],  # changed since
        [*sources("a"), Source("b", "cat", 1, 2)],
    ]
    assert not any(store.is_done(Part(0, other)) for other in others)
    path = store.folder / "part-000000.parquet"
    for spoiled in (path.read_bytes()[:100], b""):
        path.write_bytes(spoiled)
        assert not store.is_done(part)


def test_parts_of_another_model_are_kept(store):
    part = Part(0, sources("a", "b"))
    store.write(part, columns(part))
    store.settings = {"model": "b", "output": "features"}
    with pytest.raises(ValueError, match=r"x.parts has finished parts of another run \(model 'a', now 'b'\)"):
        store.is_done(part)
    assert (store.folder / "part-000000.parquet").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "x.csv"], "--out must end with .parquet"),
        (["--out", "nowhere/x.parquet"], "there is no folder nowhere"),
        (["--out", "there.parquet"], "there.parquet exists; --force replaces it"),
        (["--out", "x.parquet", "--batch-size", "0"], "batch_size=0"),
        (["--out", "x.parquet", "--part-size", "0"], "part_size=0"),
        (["--out", "x.parquet", "--workers", "0"], "need workers >= 1, got 0"),
        (["--out", "x.parquet", "--device", "abacus"], "unknown device 'abacus'"),
    ],
)
def test_errors(argv, message, checkpoint, photos, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(photos.parent)
    (photos.parent / "there.parquet").write_text("kept")
    assert main(["embed", "photos", "--model", f"local-dir:{checkpoint}", *argv]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("timm-halonet: error: ") and message in line
    assert (photos.parent / "there.parquet").read_text() == "kept"


def test_no_gpu_in_the_cluster(checkpoint, photos, tmp_path):
    pytest.importorskip("ray")
    model = load_model(f"local-dir:{checkpoint}")
    job = Job([photos], tmp_path / "x.parquet", model, device="cuda:0")
    with pytest.raises(ValueError, match="--device cuda:0: Ray sees no GPU"):
        next(job.run({"CPU": 4.0}))
    assert job.total == 4 and job.kept == 0

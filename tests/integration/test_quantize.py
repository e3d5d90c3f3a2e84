"""docs/examples/quantize.py: an int8 HaloNet agrees with the float one, and what is left in float is."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import quantize  # noqa: E402


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / split / str(label) / "0.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, photos):
    out = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model = timm.create_model("halonet_h0", num_classes=10, depths=(1, 1, 1, 1), zero_init_last=False)
    model.eval().requires_grad_(False)
    quantize.export(model, out / "float.onnx", 64)
    images = (x for x, _ in quantize.photos(str(photos), "train", model, 64, None))
    return model, quantize.quantise(out / "float.onnx", out, images)


def test_weights_are_integers_and_attention_is_not(files):
    _, files = files
    assert quantize.integer_share(files["float"]) == 0
    for name in ("static int8", "dynamic int8"):
        assert quantize.integer_share(files[name]) > 0.8
        assert files[name].stat().st_size < 0.5 * files["float"].stat().st_size
    graph = onnx.load(str(files["static int8"])).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    inputs = {kind: {made_by.get(x) for n in graph.node if n.op_type == kind for x in n.input[:2]} for kind in
              ("Conv", "MatMul")}  # fmt: skip
    assert inputs["Conv"] == {"DequantizeLinear"}
    assert "QuantizeLinear" not in inputs["MatMul"] and len(inputs["MatMul"]) > 1


def test_logits_stay_close(files, photos):
    import onnxruntime

    model, files = files
    sessions = {name: onnxruntime.InferenceSession(str(file)) for name, file in files.items()}
    seen = 0
    for image, label in quantize.photos(str(photos), "validation", model, 64, 5):
        wanted = model(torch.from_numpy(image)).numpy()
        for name, session in sessions.items():
            error = np.linalg.norm(session.run(None, {"x": image})[0] - wanted) / np.linalg.norm(wanted)
            assert error < (1e-4 if name == "float" else 0.25), name
        seen += 1
        assert 0 <= label < 10
    assert seen == 5


def test_the_table_counts_right_answers(files, photos):
    model, files = files
    found = quantize.evaluate(files, quantize.photos(str(photos), "validation", model, 64, None), 1)
    with torch.no_grad():
        right = sum(
            int(model(torch.from_numpy(x)).argmax()) == y
            for x, y in quantize.photos(str(photos), "validation", model, 64, None)
        )
    assert found["float"][:2] == (right, 10)
    lines = quantize.table(files, found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| float", "| static int8", "| dynamic int8"]

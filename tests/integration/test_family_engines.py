"""Every family in ONNX Runtime and OpenVINO: what they compute is what PyTorch does, in repeated runs."""

import pytest
import torch

from ..support.families import FAMILIES, small


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request):
    """(program, image, the model's logits)"""
    family = FAMILIES[request.param]
    model = small(family).requires_grad_(False)
    image = torch.randn(1, 3, *(family.fixed_size or (72, 104)))
    return torch.export.export(model, (image,)), image, model(image)


def close(actual, expected):
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() < 2e-5 * expected.norm()


def test_openvino(exported):
    ov = pytest.importorskip("openvino")
    program, image, expected = exported
    converted = ov.convert_model(program, input=image.shape)
    compiled = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for _ in range(3):
        close(compiled(image.numpy())[0], expected)


def test_onnx_runtime(exported, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program, image, expected = exported
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(program, (), path, dynamo=True, input_names=["x"], external_data=False)
    session = runtime.InferenceSession(path)
    for _ in range(2):
        close(session.run(None, {"x": image.numpy()})[0], expected)

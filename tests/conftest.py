import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if not torch.cuda.is_available():
    # Whether Triton interprets is settled where its own functions and ours are imported, and timm imports it. Here, for
    # test_triton.py; not for all tests by the environment, which would let the op choose the interpreted kernels.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # no Triton
        from timm_halonet.ops import triton_kernels  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

import timm

import timm_halonet  # noqa: F401

# a process of pytest-xdist has its share of the cores
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint folder of an untrained halonet_h0 with three classes, in the layout of its Hub repository."""
    folder = tmp_path / "halonet_h0.test_r64"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("halonet_h0", num_classes=3)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "halonet_h0",
        "num_classes": 3,
        "num_features": 256,
        "label_names": ["cat", "dog", "bee"],
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "crop_pct": 1.0,
            "first_conv": "stem.conv1.conv",
            "classifier": "head.fc",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def pooling_takes_any_size():
    """Whether this PyTorch exports max pooling for odd and even maps; 2.11 only for the example's kind."""
    every = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    pool, x = torch.nn.MaxPool2d(3, 2, 1), torch.randn(2, 3, 80, 96)
    program = torch.export.export(pool, (x,), dynamic_shapes=(every,))
    try:
        program.module()(torch.randn(1, 3, 65, 65))
    except (AssertionError, RuntimeError):
        return False
    return True


def pytest_collection_modifyitems(items):
    """Everything in tests/integration is an integration test."""
    folder = Path(__file__).parent / "integration"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.integration)

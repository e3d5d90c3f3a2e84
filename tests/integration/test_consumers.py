"""Libraries that build a backbone by its name alone; none of this code imports timm_halonet.

A subprocess each, so that nothing the other tests imported has registered the models. `python -c` code asserts, prints
"ok", and exits.
"""

import os
import subprocess
import sys

import pytest

COMMON = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.manual_seed(0)
"""


def run(code, tmp_path, **env):
    code = COMMON + code + '\nprint("ok")'
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **env}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("ok")


def test_segmentation_models_pytorch(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    run(
        """
import segmentation_models_pytorch as smp
model = smp.Unet("tu-halonet_h0", encoder_weights=None, classes=3)
for size in (64, 256):
    out = model.train()(torch.randn(2, 3, size, size))
    assert out.shape == (2, 3, size, size), out.shape
    out.mean().backward()
    assert model.eval()(torch.randn(1, 3, size, size)).shape == (1, 3, size, size)
assert type(model.encoder.model.stages_0[0]).__name__ == "HaloBottleneck"

deep = smp.DeepLabV3Plus("tu-halonet_h0", encoder_weights=None, encoder_output_stride=16).eval()
features = deep.encoder(torch.randn(1, 3, 64, 64))
assert features[-1].shape[-2:] == (4, 4), features[-1].shape
assert deep(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)
""",
        tmp_path,
    )


def test_segmentation_models_pytorch_export_and_compile(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    run(
        """
import segmentation_models_pytorch as smp
model = smp.Unet("tu-halonet_h0", encoder_weights=None, classes=2).eval()
x = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, atol=1e-4, rtol=1e-4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
    y = torch.randn(2, 3, 96, 128)
    torch.testing.assert_close(compiled(y), model(y), atol=1e-4, rtol=1e-4)
""",
        tmp_path,
    )


def test_torchvision_mask_rcnn(tmp_path):
    run(
        """
import timm
from collections import OrderedDict
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork

class Backbone(torch.nn.Module):
    out_channels = 64
    def __init__(self):
        super().__init__()
        self.body = timm.create_model("halonet_h0", features_only=True, out_indices=(1, 2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64)
    def forward(self, x):
        return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))

from torchvision.models.detection.anchor_utils import AnchorGenerator
anchors = AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4)
model = MaskRCNN(Backbone(), num_classes=3, rpn_anchor_generator=anchors, min_size=300, max_size=400)
images = [torch.rand(3, 300, 400), torch.rand(3, 300, 400)]
masks = torch.zeros(1, 300, 400, dtype=torch.uint8)
masks[:, 50:120, 60:200] = 1
target = dict(boxes=torch.tensor([[60.0, 50.0, 200.0, 120.0]]), labels=torch.tensor([1]), masks=masks)
losses = model.train()(images, [target, target])
assert set(losses) >= {"loss_mask", "loss_box_reg", "loss_classifier", "loss_objectness"}
sum(losses.values()).backward()
assert model.backbone.body.stem_conv1.conv.weight.grad.abs().sum() > 0
with torch.inference_mode():
    [out] = model.eval()(images[:1])
assert out["masks"].shape[1:] == (1, 300, 400)
""",
        tmp_path,
    )


def test_transformers(tmp_path):
    pytest.importorskip("transformers")
    run(
        """
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers import TimmBackbone, TimmBackboneConfig
x = torch.randn(2, 3, 96, 64)
config = TimmWrapperConfig(architecture="halonet_h0", num_labels=5, do_pooling=True)
for cls in (TimmWrapperForImageClassification, TimmWrapperModel):
    model = cls(config).eval()
    with torch.inference_mode():
        first = model(pixel_values=x)[0]
        model.save_pretrained("saved")
        again = cls.from_pretrained("saved").eval()(pixel_values=x)[0]
    assert first.shape[:2] in ((2, 5), (2, 256)), first.shape
    torch.testing.assert_close(again, first)

config = TimmBackboneConfig(backbone="halonet_h0", use_pretrained_backbone=False, out_indices=[1, 3])
backbone = TimmBackbone(config).eval()
with torch.inference_mode():
    maps = backbone(x).feature_maps
    backbone.save_pretrained("backbone")
    # its own from_pretrained takes timm names only, of any model: a saved one comes back by its two files
    from safetensors.torch import load_file
    loaded = TimmBackbone(TimmBackboneConfig.from_pretrained("backbone")).eval()
    loaded.load_state_dict(load_file("backbone/model.safetensors"))
    again = loaded(x).feature_maps
assert [tuple(m.shape) for m in maps] == [(2, 32, 24, 16), (2, 128, 6, 4)], [m.shape for m in maps]
for a, b in zip(maps, again):
    torch.testing.assert_close(a, b)
""",
        tmp_path,
    )


def test_fastai(tmp_path):
    pytest.importorskip("fastai")
    run(
        """
from fastai.vision.learner import create_timm_model
model, cfg = create_timm_model("halonet_h0", n_out=4, pretrained=False)
assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
""",
        tmp_path,
    )


def test_open_clip(tmp_path):
    pytest.importorskip("open_clip")
    run(
        """
from open_clip.timm_model import TimmModel
for pool in ("avg", "abs_attn"):
    tower = TimmModel("halonet_h0", embed_dim=32, image_size=64, pool=pool, proj="linear")
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 32)
""",
        tmp_path,
    )

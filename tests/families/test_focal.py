"""Focal Transformers: their structure and options. What holds for every family is in test_every_family.py."""

import pytest
import timm
import torch
from torch.export import Dim

from ..support.families import FAMILIES, small

# channels, depth of the third stage, heads, drop path
MODELS = {
    "focal_transformer_tiny": (96, 6, (3, 6, 12, 24), 0.2),
    "focal_transformer_small": (96, 18, (3, 6, 12, 24), 0.3),
    "focal_transformer_base": (128, 18, (4, 8, 16, 32), 0.5),
    "focal_transformer_tiny_conv": (96, 6, (3, 6, 12, 24), 0.2),
    "focal_transformer_small_conv": (96, 18, (3, 6, 12, 24), 0.3),
    "focal_transformer_base_conv": (128, 18, (4, 8, 16, 32), 0.5),
}
RINGS, POOLED = (3, 3, 3, 0), (7, 5, 3, 1)
FOCAL = FAMILIES["focal"]


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    dim, third, heads, drop_path = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, third, 2]
    info = [(f["num_chs"], f["reduction"]) for f in model.feature_info]
    assert info == [(dim, 4), (2 * dim, 8), (4 * dim, 16), (8 * dim, 32)]
    layers = [stage.blocks[0].attn for stage in model.stages]
    assert [(m.num_heads, m.ring_size, m.pooled_windows) for m in layers] == list(
        zip(heads, RINGS, POOLED, strict=True)
    )
    assert model.stages[3].blocks[1].drop_path2.drop_prob == pytest.approx(drop_path)


def test_options():
    x = torch.randn(2, 3, 96, 64)
    assert small(FOCAL, global_pool="catavgmax").head_hidden_size == 2 * 128
    assert small(FOCAL, global_pool="", num_classes=0)(x).shape == (2, 128, 3, 2)
    whole, features = small(FOCAL).forward_intermediates(x, indices=[3], norm=True)
    torch.testing.assert_close(whole, features[0])


@pytest.mark.slow
def test_exported_with_dynamic_sizes():
    """Those with, in every stage, more than one window, of which the last one is whole where the example's was."""
    model = small(FOCAL, depths=1).requires_grad_(False)
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 256, 320),), dynamic_shapes=shapes).module()
    x = torch.randn(3, 3, 299, 317)
    torch.testing.assert_close(exported(x), model(x))


def test_maps_are_channels_last_behind_the_stem():
    features = small(FOCAL).forward_intermediates(torch.randn(2, 3, 64, 96), intermediates_only=True)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def test_an_output_stride_is_refused_in_words():
    """DeepLab asks for one."""
    with pytest.raises(TypeError, match=r"FocalTransformer has one output stride.*output_stride=16.*FPN, Unet"):
        timm.create_model("focal_transformer_tiny", output_stride=16, device="meta")
    with pytest.raises(ValueError, match=r"4 feature maps.*\(0, 4\)"):
        timm.create_model("focal_transformer_tiny", features_only=True, out_indices=(0, 4), device="meta")

"""Batch norms that become a part of the weights before them, as timm's `reparameterize_model` asks for."""

import io

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import timm_halonet
from timm_halonet.layers import HaloAttention
from timm_halonet.layers.fold_norm import fold_into_values
from timm_halonet.layers.halo_attention import are_one_convolution


def _norms(model):
    return [name for name, x in model.named_modules() if isinstance(x, nn.BatchNorm2d)]


def _with_statistics(model):
    """As if it had been trained: nothing is 0 or 1 any more."""
    generator = torch.Generator().manual_seed(0)
    for norm in (x for x in model.modules() if isinstance(x, nn.BatchNorm2d)):
        for x, low, high in (
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.5, 2),
            (norm.weight.data, 0.5, 1.5),
            (norm.bias.data, -1, 1),
        ):
            x.uniform_(low, high, generator=generator)
    return model.eval()


def _small(**kwargs):
    torch.manual_seed(0)
    kwargs = {"depths": (1, 2, 1, 1), "num_classes": 5, "num_features": 32, "zero_init_last": False, **kwargs}
    return _with_statistics(timm.create_model("halonet_h0", **kwargs).double())


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"value_ratio": 2.0, "expansion": 1.25}, {"output_stride": 16}, {"block_size": 7, "halo_size": 2}],
    ids=str,
)
def test_a_model_computes_the_same_without_batch_norms(kwargs):
    model = _small(**kwargs)
    images = torch.randn(2, 3, 70, 53, dtype=torch.float64)
    with torch.no_grad(), timm_halonet.use_backend("reference"):
        wanted = model(images)
        folded = reparameterize_model(model)
        torch.testing.assert_close(folded(images), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(images), wanted, rtol=0, atol=0)  # a copy was changed
    assert _norms(folded) == ["stem.conv1.bn", "final_conv.bn"] and len(_norms(model)) > 20


def test_keys_outside_of_the_image_keep_the_norm_behind_attention():
    model = _small(mask_border=False)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad(), timm_halonet.use_backend("reference"):
        folded = reparameterize_model(model)
        torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)
    assert sum("post_attn" in name for name in _norms(folded)) == 5
    assert not [name for name in _norms(folded) if "conv1_1x1" in name or "conv3_1x1" in name or "shortcut" in name]


def test_other_norms_stay():
    model = timm.create_model("halonet_h0", depths=(1, 1, 1, 1), norm_layer="groupnorm").eval()
    folded = reparameterize_model(model)
    assert str(folded) == str(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_attention_with_a_bias(bias, stride):
    """A bias that there is stays; q, k and v still come from one convolution at stride 1."""
    torch.manual_seed(0)
    layer = HaloAttention(12, 24, stride=stride, num_heads=3, dim_head=4, block_size=4, halo_size=1, qkv_bias=bias)
    if bias:
        for conv in (layer.q, layer.kv):
            nn.init.normal_(conv.bias)
    norm = _with_statistics(timm.layers.BatchNormAct2d(24, act_layer=nn.ReLU))
    layer, norm, x = layer.double(), norm.double(), torch.randn(2, 12, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        wanted = norm(layer(x))
        left = fold_into_values(layer, norm)
        torch.testing.assert_close(left(layer(x)), wanted, rtol=1e-9, atol=1e-9)
    assert isinstance(left, nn.ReLU)
    assert layer.q.bias is not None and are_one_convolution(layer.q, layer.kv, x.float()) == (stride == 1)


def test_a_folded_model_is_saved_scripted_and_compiled_for_other_engines():
    torch.manual_seed(0)
    model = _with_statistics(timm.create_model("halonet_h0", depths=(1, 1, 1, 1), num_classes=3))
    model = reparameterize_model(model.requires_grad_(False))
    assert not any(x.requires_grad for x in model.parameters())
    images = torch.randn(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        wanted = model(images)
        for other in (
            torch.load(file, weights_only=False),
            torch.jit.script(model),
            torch.export.export(model, (images,)).module(),
        ):
            torch.testing.assert_close(other(images), wanted, rtol=1e-3, atol=1e-4)

"""HaloNets: the paper's sizes, timm's own halonet_h1. What holds for every family is in test_every_family.py."""

import pytest
import timm
import torch
from timm.models.byoanet import halonet_h1 as timm_halonet_h1

import timm_halonet  # noqa: F401
from timm_halonet.layers import HaloAttention

from ..support.families import ARCHITECTURES

# the paper's millions of parameters
PUBLISHED = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_papers(name):
    assert ARCHITECTURES[f"halonet_{name}"][0] / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


def test_structure():
    model = timm.create_model("halonet_h5", device="meta")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HaloAttention)}
    assert len(layers) == sum((3, 3, 23, 3))
    first = layers["stages.1.0.self_attn"]
    assert (first.query_stride, first.num_heads, first.dim_head_qk, first.dim_head_v) == (2, 8, 16, 40)
    assert (layers["stages.0.0.self_attn"].num_heads, layers["stages.3.1.self_attn"].dim_head_qk) == (4, 64)
    assert all(m.q.bias is None and m.kv.bias is None and not list(m.buffers()) for m in layers.values())
    assert model.num_features == 1536
    hybrid = timm.create_model("halonet_h7_conv12", device="meta")
    assert {n.split(".")[1] for n, m in hybrid.named_modules() if isinstance(m, HaloAttention)} == {"2", "3"}


def test_zero_gamma():
    model = timm.create_model("halonet_h0")
    assert all(float(b.conv3_1x1.bn.weight.detach().abs().max()) == 0 for stage in model.stages for b in stage)


@pytest.mark.slow
def test_h7_at_600_px():
    model = timm.create_model("halonet_h7").eval()
    with torch.inference_mode():
        features = model.forward_intermediates(torch.randn(1, 3, 600, 600), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [300, 150, 75, 38, 19]


def test_a_crop_of_padding_never_shows():
    """A model's features over the part of a map that sees no border are those of a larger image: no hidden padding."""
    torch.manual_seed(0)
    layer = HaloAttention(32, num_heads=2, block_size=8, halo_size=3).eval()
    x = torch.randn(1, 32, 40, 40)
    whole, part = layer(x), layer(x[:, :, :29, :])  # 29 rows: the last block is ragged
    torch.testing.assert_close(whole[:, :, :24], part[:, :, :24])
    assert not torch.allclose(whole[:, :, 24:29], part[:, :, 24:29])


def test_options():
    def parameters(name, **kwargs):
        return sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters())

    assert parameters("halonet_h0", base_width=128) > 3 * parameters("halonet_h0")
    assert abs(parameters("halonet_h4", base_width=128) / 1e6 - 68.4) < 0.06


def test_timm_options_load_timms_h1_exactly():
    """The second choices of every open point make this package's model timm's own halonet_h1."""
    torch.manual_seed(0)
    theirs = timm_halonet_h1(num_classes=4).eval()
    ours = timm.create_model("halonet_h1", num_classes=4, num_heads=8, mask_border=False, strided_rel="grid").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_wrong_state_dicts():
    model = timm.create_model("halonet_h1")
    before = model.head.fc.weight.clone()
    with pytest.raises(ValueError, match=r"\(27, 8\).*\(27, 16\).*timm's own halonet_h1"):
        model.load_state_dict(timm_halonet_h1().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(timm.create_model("halonet_h0").state_dict())
    assert torch.equal(model.head.fc.weight, before)


def test_replaces_timms_h1_without_a_trace():
    assert timm.models.model_entrypoint("halonet_h1").__module__ == "timm_halonet.models.halonet"
    assert "halonet_h1" not in timm.list_models(module="byoanet")
    assert "halonet50ts" in timm.list_models(module="byoanet")
    assert timm.list_models("halonet_h?", module="halonet") == [f"halonet_h{i}" for i in range(8)]
    assert timm.is_model("halonet_h7_conv123")
    assert not timm.is_model("halonet_h8")

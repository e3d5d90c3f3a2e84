"""LESA ResNets: their structure and options. What holds for every family is in test_every_family.py."""

import pytest
import timm
import torch

from timm_halonet.families.lesa.attention import LocallyEnhancedSelfAttention

from ..support.families import FAMILIES, small

# channels within a bottleneck of the first stage
MODELS = {
    "lesa_resnet50": 64,
    "lesa_wide_resnet50_2": 128,
}
DEPTHS = (3, 4, 6, 3)
LESA = FAMILIES["lesa"]


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    width = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    places = [n for n, m in model.named_modules() if isinstance(m, LocallyEnhancedSelfAttention)]
    assert places == [f"stages.2.{i}.self_attn" for i in range(1, 6)] + [f"stages.3.{i}.self_attn" for i in range(3)]
    assert [tuple(model.get_submodule(n).local[0].weight.shape[:2]) for n in (places[0], places[-1])] == [
        (4 * width, width // 2),
        (8 * width, width),
    ]
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["fixed_input_size"], cfg["pool_size"]) == ((3, 224, 224), True, (14, 14))
    assert timm.create_model(name, device="meta", rel_pos="height_width").pretrained_cfg["fixed_input_size"] is False


@pytest.mark.parametrize(("size", "table"), [((64, 64), 31), ((65, 64), 39), ((48, 80), 29)], ids=str)
def test_image_size(size, table):
    model, x = small(LESA, img_size=size), torch.randn(2, 3, *size)
    assert model.stages[2][1].self_attn.pos_embed.table.shape[1] == table  # 2 * height * width - 1
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = [(-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in (1, 2, 3, 4)]
    assert [tuple(f.shape[2:]) for f in features] == expected
    assert model(x).shape == (2, 10)
    for other in ((size[1] + 32, size[0]), (size[0], size[1] + 16)):
        with pytest.raises(ValueError, match=r"flattened.*img_size=.*height_width"):
            model(torch.randn(2, 3, *other))


def test_transposed_map_is_refused():
    """As many positions as the table has, but of another meaning."""
    with pytest.raises(ValueError, match="maps of 3x5 pixels, got 5x3"):
        small(LESA, img_size=(48, 80))(torch.randn(1, 3, 80, 48))


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("lesa_resnet50", depths=(1, 1, 2, 1), num_classes=0)
    for block, dim in ((model.stages[2][1], 256), (model.stages[3][0], 512)):
        attn = block.self_attn
        assert float(attn.qkv.weight.std()) == pytest.approx(dim**-0.5, rel=0.02)
        assert float(attn.pos_embed.table.std()) == pytest.approx((dim // 8) ** -0.5, rel=0.02)
        assert not block.conv3_1x1.bn.weight.any()


def test_options():
    x = torch.randn(2, 3, 64, 64)
    assert small(LESA, global_pool="", num_classes=0)(x).shape == (2, 2048, 4, 4)
    features = small(LESA, features_only=True, feature_cls="getter")
    assert [tuple(f.shape[1:]) for f in features(x)] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (2048, 4, 4)]
    assert small(LESA, output_stride=8)(x).shape == (2, 10)
    pooled = small(LESA)
    pooled.reset_classifier(3, "max")
    assert pooled(x).shape == (2, 3) and pooled.head.global_pool.pool_type == "max"


def test_a_fifth_map_for_decoders_that_count_on_it():
    """At 1/32, pooled from the last; the other four stay what they are, and so do the weights' names."""
    kwargs = {**LESA.kwargs, "features_only": True}
    torch.manual_seed(0)
    four = timm.create_model("lesa_resnet50", **kwargs).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = four(x)
    assert four.feature_info.reduction() == [2, 4, 8, 16]
    for indices in ((0, 1, 2, 3, 4), [2, 4], (4,)):
        five = timm.create_model("lesa_resnet50", out_indices=indices, **kwargs).eval()
        five.load_state_dict(four.state_dict())
        maps = five(x)
        assert five.feature_info.reduction() == [2 ** (i + 1) for i in indices]
        assert five.feature_info.channels() == [y.shape[1] for y in maps]
        for i, y in zip(indices, maps, strict=True):
            torch.testing.assert_close(y, expected[i] if i < 4 else expected[3][:, :, ::2, ::2])
        torch.jit.script(five)
    with pytest.raises(ValueError, match=r"4 feature maps.*\(0, 5\)"):
        timm.create_model("lesa_resnet50", out_indices=(0, 5), **kwargs)


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet"])
def test_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-lesa_resnet50", encoder_weights=None, classes=2, **LESA.kwargs).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)

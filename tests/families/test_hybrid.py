"""SE-ResNets with halo attention in the last stage: sizes by formula, plain weights, blocks beyond the map."""

import logging

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_halonet  # noqa: F401
from timm_halonet.layers import HaloAttention
from timm_halonet.ops.blocked import blocked_forward
from timm_halonet.ops.options import Options

from ..support.families import ARCHITECTURES

DEPTHS = {"seresnet50_halo8": (3, 4, 6, 3), "seresnet50_halo32": (3, 4, 6, 3), "seresnet101_halo8": (3, 4, 23, 3)}
BLOCK_SIZES = {"seresnet50_halo8": 8, "seresnet50_halo32": 32, "seresnet101_halo8": 8}
TINY = dict(depths=(1, 1, 1, 2), zero_init_last=False, num_classes=5)


def build(name="seresnet50_halo8", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


# ---- what it is ----


def seresnet_parameters(depths, block_size=None, halo_size=3, heads=8):
    """Of an SE-ResNet with 1000 classes; with a block size, of one whose last stage attends."""

    def norm(chs):
        return 2 * chs

    total = 3 * 64 * 7 * 7 + norm(64)
    chs = 64
    for stage, depth in enumerate(depths):
        width, out = 64 * 2**stage, 256 * 2**stage
        middle = 9 * width * width
        if block_size and stage == 3:
            table = (2 * (block_size + 2 * halo_size) - 1) * width // heads
            middle = 3 * width * width + 2 * table  # q, k and v of the stage's width, and two tables
        reduced = out // 16
        squeeze = 2 * out * reduced + reduced + out
        for block in range(depth):
            total += chs * width + norm(width) + middle + norm(width) + width * out + norm(out) + squeeze
            total += chs * out + norm(out) if block == 0 else 0
            chs = out
    return total + chs * 1000 + 1000


@pytest.mark.parametrize("name", DEPTHS)
def test_parameters(name):
    plain = timm.create_model(name.partition("_")[0], device="meta")
    assert seresnet_parameters(DEPTHS[name]) == sum(p.numel() for p in plain.parameters())
    assert seresnet_parameters(DEPTHS[name], BLOCK_SIZES[name]) == ARCHITECTURES[name][0]


@pytest.mark.parametrize("name", DEPTHS)
def test_structure(name):
    model = timm.create_model(name, device="meta")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HaloAttention)}
    assert list(layers) == [f"layer4.{i}.conv2" for i in range(3)]
    assert [m.query_stride for m in layers.values()] == [2, 1, 1]
    for m in layers.values():
        assert (m.block_size, m.halo_size, m.num_heads) == (BLOCK_SIZES[name], 3, 8)
        assert (m.dim_head_qk, m.dim_head_v) == (64, 64)
    assert all(block.se is not None for stage in (model.layer1, model.layer4) for block in stage)


def test_init_weights_again_keeps_the_attentions_own():
    model = build(depths=(1, 1, 1, 1), zero_init_last=True)
    layer = model.layer4[0].conv2
    nn.init.zeros_(layer.q.weight)
    nn.init.zeros_(layer.pos_embed.height_rel)
    model.init_weights()
    assert layer.q.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert layer.pos_embed.height_rel.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert all(float(block.bn3.weight.detach().abs().max()) == 0 for block in (*model.layer1, *model.layer4))


# ---- plain SE-ResNet weights ----


@pytest.mark.integration
def test_plain_seresnet_weights_load_into_the_convolutional_part(tmp_path, caplog):
    torch.manual_seed(0)
    plain = timm.create_model("seresnet50", zero_init_last=False).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    with caplog.at_level(logging.WARNING):
        overlay = dict(file=str(tmp_path / "plain.pt"))
        model = timm.create_model("seresnet50_halo32", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert [r.name for r in caplog.records if "layer4.2.conv2.weight" in r.message] == ["timm_halonet.models.hybrid"]
    theirs, ours = plain.state_dict(), model.state_dict()
    here = {name for name in ours if name not in theirs}
    assert {name.split(".")[2] for name in here} == {"conv2"}
    assert {name for name in theirs if name not in ours} == {f"layer4.{i}.conv2.weight" for i in range(3)}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name not in here)

    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = plain.forward_intermediates(x, intermediates_only=True)
        found = model.forward_intermediates(x, intermediates_only=True)
    for i in range(4):  # the stem and stages 1 to 3
        torch.testing.assert_close(found[i], expected[i])
    assert found[4].shape == expected[4].shape
    assert not torch.allclose(found[4], expected[4])
    # features_only, another number of classes and of channels: as timm does it for any model
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    features = timm.create_model("seresnet50_halo8", features_only=True, **kwargs).eval()
    with torch.inference_mode():
        torch.testing.assert_close(features(x)[3], expected[3])
    grey = timm.create_model("seresnet50_halo8", in_chans=1, num_classes=3, **kwargs)
    torch.testing.assert_close(grey.conv1.weight.detach(), theirs["conv1.weight"].sum(1, keepdim=True))


@pytest.mark.integration
def test_own_weights_and_those_that_do_not_fit(tmp_path, caplog):
    def load(state_dict):
        torch.save(state_dict, tmp_path / "weights.pt")
        overlay = dict(file=str(tmp_path / "weights.pt"))
        return build(num_classes=1000, pretrained=True, pretrained_cfg_overlay=overlay)

    own = build(num_classes=1000).state_dict()
    own = {name: x + 1 if x.is_floating_point() else x for name, x in own.items()}
    with caplog.at_level(logging.WARNING, "timm_halonet"):
        loaded = load(own).state_dict()
    assert not caplog.records
    assert all(torch.equal(loaded[name], x) for name, x in own.items())
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.0\.se\.fc1\.weight"):  # nothing else may be missing
        load(timm.create_model("resnet50", layers=TINY["depths"]).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer3\.1"):
        load(timm.create_model("seresnet50", layers=(1, 1, 2, 2)).state_dict())
    own["conv1.weight"][0] = torch.nan
    with pytest.raises(ValueError, match=r"conv1\.weight.*147 values are NaN"):
        load(own)


# ---- sizes ----


@pytest.mark.parametrize(("stride", "last"), [(32, (3, 2)), (16, (5, 4)), (8, (10, 7))])
def test_output_stride(stride, last):
    model = build(output_stride=stride, features_only=True)
    features = model(torch.randn(1, 3, 75, 50))
    assert features[-1].shape[2:] == last
    assert model.feature_info.reduction()[-1] == stride


def naive_attention(layer, x):
    """Every pixel of a map attends to every pixel: plain loops' worth of indexing, no blocks."""
    n, _, height, width = x.shape
    heads, d, s = layer.num_heads, layer.dim_head_qk, layer.query_stride

    def pixels(y):
        return y.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)  # batch, heads, pixels, dim

    q = pixels(layer.q(x))
    k, v = pixels(layer.kv(x)).split([d, layer.dim_head_v], dim=-1)
    rows, cols = (torch.arange(size) for size in (height, width))
    centre = layer.block_size + 3 * layer.halo_size - 1  # the row for no distance, see `halo_attention`
    ry = layer.pos_embed.height_rel[centre + rows[None, :] - rows[::s, None]]  # query row, key row, dim
    rx = layer.pos_embed.width_rel[centre + cols[None, :] - cols[::s, None]]
    q_map = q.unflatten(2, (len(rows[::s]), len(cols[::s])))
    logits = torch.einsum("nhyxd,yud->nhyxu", q_map, ry)[..., None]
    logits = logits + torch.einsum("nhyxd,xwd->nhyxw", q_map, rx)[..., None, :]
    logits = logits.flatten(4).flatten(2, 3) + q @ k.transpose(2, 3) * d**-0.5
    out = logits.softmax(-1) @ v  # batch, heads, queries, dim
    return out.transpose(2, 3).reshape(n, -1, *q_map.shape[2:4])


@pytest.mark.parametrize("size", [(10, 10), (7, 13), (1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_larger_than_the_map_is_global_attention(size, stride):
    torch.manual_seed(0)
    layer = HaloAttention(32, num_heads=2, block_size=32, halo_size=3, stride=stride)
    x = torch.randn(2, 32, *size)
    torch.testing.assert_close(layer(x), naive_attention(layer, x), atol=1e-5, rtol=1e-4)


def test_block_32_on_a_small_map_costs_what_the_pixels_cost():
    q = torch.randn(1, 10, 10, 1, 64)

    def flops(block_size, halo_size):
        table = torch.randn(2 * (block_size + 2 * halo_size) - 1, 64)
        options = Options(block_size, halo_size, 1, 0.125, False, True, 1)
        with FlopCounterMode(display=False) as counter:
            blocked_forward(q, q, q, table, table, options)
        return counter.get_total_flops()

    pairs = 100 * 100  # a full block of 32 would have 32 ** 2 queries and 38 ** 2 keys, 148 times as many
    assert flops(10, 0) >= 2 * pairs * 64  # the sum of values; products in place escape the counter
    assert flops(32, 3) < 2 * flops(10, 0)  # the products of q with the larger tables are what is added


# ---- training, compilation, memory formats ----


def test_channels_last():
    model = build()
    x = torch.randn(2, 3, 128, 96)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)

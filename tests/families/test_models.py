"""The models: exact sizes, any image size, options, wrong arguments and images refused."""

import pytest
import timm
import torch
from timm.models.byoanet import halonet_h1 as timm_halonet_h1
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

import timm_halonet  # noqa: F401
from timm_halonet.layers import HaloAttention
from timm_halonet.models.halonet import HaloNet, cfgs
from timm_halonet.registry import listing

# trainable parameters with 1000 classes; the second number is the paper's, in millions (None: not published, or the
# paper sized it differently)
PARAMETERS = {
    "halonet_h0": (5_502_248, 5.5),
    "halonet_h1": (8_101_352, 8.1),
    "halonet_h2": (9_405_608, 9.4),
    "halonet_h3": (11_842_792, 11.8),
    "halonet_h4": (19_103_464, 19.1),
    "halonet_h5": (30_718_952, 30.7),
    "halonet_h6": (43_458_280, 43.4),
    "halonet_h7": (67_434_728, 67.4),
    "halonet_h4_conv12": (19_466_152, None),
    "halonet_h7_conv1": (67_338_440, None),
    "halonet_h7_conv12": (66_964_520, None),
    "halonet_h7_conv123": (54_093_480, None),
}


def test_every_architecture_is_listed():
    assert set(PARAMETERS) == set(cfgs) == set(timm.list_models("halonet_h*"))
    rows = {row["model"]: row["parameters"] for row in listing() if row["model"] in cfgs}
    assert rows == {k: n for k, (n, _) in PARAMETERS.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = timm.create_model(name, device="meta")
    exact, published = PARAMETERS[name]
    assert isinstance(model, HaloNet)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == exact
    if published is not None:
        assert abs(exact / 1e6 - published) <= 0.06


def testmultiply_adds(monkeypatch):
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "reference")  # plain operators, which the counter knows
    model = timm.create_model("halonet_h1", device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 256, 256, device="meta"))
    assert abs(counter.get_total_flops() / 2e9 - 3.0) < 0.1  # a multiply-add is two flops


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


def test_zero_gamma_and_no_weight_decay():
    model = timm.create_model("halonet_h0")
    assert all(float(b.conv3_1x1.bn.weight.detach().abs().max()) == 0 for stage in model.stages for b in stage)
    tables = model.no_weight_decay()
    assert len(tables) == 2 * 16
    assert all(name.endswith(("height_rel", "width_rel")) for name in tables)
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)
    decayed = {id(p) for p in groups[1]["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if name in tables)


@pytest.mark.parametrize("size", [(32, 32), (300, 400), (225, 97), (1024, 64), (33, 50), (7, 9)], ids=str)
def test_any_size(size):
    model = timm.create_model("halonet_h0", num_classes=7)
    x = torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = [x.shape[2:]]
    for feature in features:
        expected.append(tuple(-(-n // 2) for n in expected[-1]))
        assert feature.shape[2:] == expected[-1]
    if size != (7, 9):  # a last map of one pixel leaves batch norm two values a channel; fine, but no gradient to test
        loss = model.train()(x).square().mean()
        loss.backward()
        # zero gammas keep gradients from inside the blocks at first; the rest must have them
        assert torch.isfinite(loss)
        assert model.stem.conv1.conv.weight.grad.abs().sum() > 0
    out = model.eval()(x)
    assert out.shape == (2, 7)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("train", [False, True])
def test_every_parameter_gets_a_gradient(train):
    model = timm.create_model("halonet_h0", num_classes=3, zero_init_last=False).train(train)
    model(torch.randn(3, 3, 70, 41)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


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
    def model(**kw):
        torch.manual_seed(0)
        return timm.create_model("halonet_h0", num_classes=5, zero_init_last=False, **kw).eval()

    x = torch.randn(2, 3, 96, 64)
    base = model()(x)
    for kw in (
        dict(act_layer="silu"),
        dict(mask_border=False),
        dict(strided_rel="grid"),
        dict(scale_pos_embed=True),
        dict(block_size=4),
        dict(halo_size=1),
    ):
        out = model(**kw)(x)
        assert out.shape == base.shape
        assert not torch.allclose(out, base), kw
    assert sum(p.numel() for p in model(base_width=128).parameters()) > 3 * sum(p.numel() for p in model().parameters())
    assert model(depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4))(x).shape == base.shape
    assert model(conv_stages=(1, 2))(x).shape == base.shape
    assert model(num_features=64)(x).shape == base.shape
    wide = timm.create_model("halonet_h4", base_width=128, device="meta")
    assert abs(sum(p.numel() for p in wide.parameters()) / 1e6 - 68.4) < 0.06
    dropped = timm.create_model("halonet_h0", drop_path_rate=0.5, drop_rate=0.2).train()
    assert dropped.stages[3][2].drop_path.drop_prob == 0.5
    assert dropped.head.drop.p == 0.2 if hasattr(dropped.head.drop, "p") else dropped.head.drop_rate == 0.2


def test_timm_options_load_timms_h1_exactly():
    """The second choices of every open point make this package's model timm's own halonet_h1."""
    torch.manual_seed(0)
    theirs = timm_halonet_h1(num_classes=4).eval()
    ours = timm.create_model("halonet_h1", num_classes=4, num_heads=8, mask_border=False, strided_rel="grid").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        (dict(block_siz=8), TypeError, "'block_siz'.*block_size"),
        (dict(block_size=0), ValueError, "block_size=0"),
        (dict(halo_size=-2), ValueError, "halo_size=-2"),
        (dict(num_heads=7), ValueError, "stage 1: 64 query channels.*7 heads"),
        (dict(num_heads=(4, 8)), ValueError, r"\(4, 8\)"),
        (dict(base_width=65), ValueError, "65 query channels"),
        (dict(conv_stages=(5,)), ValueError, r"1 to 4.*\(5,\)"),
        (dict(depths=(3, 0, 3, 3)), ValueError, r"\(3, 0, 3, 3\)"),
        (dict(block_size=8, strided_rel="no"), ValueError, "'no'"),
    ],
)
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("halonet_h0", **kw)


@pytest.mark.parametrize("shape", [(3, 64, 64), (0, 3, 64, 64), (1, 3, 0, 64), (1, 4, 64, 64), (64,)], ids=str)
def test_wrong_images(shape):
    model = timm.create_model("halonet_h0")
    with pytest.raises(ValueError) as e:
        model(torch.zeros(shape))
    assert str(shape) in str(e.value)


def test_wrong_state_dicts():
    model = timm.create_model("halonet_h1")
    before = model.head.fc.weight.clone()
    with pytest.raises(ValueError, match=r"\(27, 8\).*\(27, 16\).*timm's own halonet_h1"):
        model.load_state_dict(timm_halonet_h1().state_dict())
    broken = model.state_dict()
    broken["stem.conv1.conv.weight"] = torch.full_like(broken["stem.conv1.conv.weight"], float("nan"))
    with pytest.raises(ValueError, match=r"stem.conv1.conv.weight.*9408 values are NaN"):
        model.load_state_dict(broken)
    with pytest.raises(ValueError, match="none of its 2 tensors"):
        model.load_state_dict({"a.weight": torch.zeros(1), "b": torch.zeros(1)})
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

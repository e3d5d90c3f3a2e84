"""LESA ResNets: exact sizes, and what timm expects of a model."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from timm_halonet.families.lesa.attention import LocallyEnhancedSelfAttention
from timm_halonet.families.lesa.lesa import LesaResNet, cfgs
from timm_halonet.registry import image_sizes

# channels within a bottleneck of the first stage, parameters with 1000 classes, multiply-adds at 224 px
MODELS = {
    "lesa_resnet50": (64, 23_777_512, 6.18e9),
    "lesa_wide_resnet50_2": (128, 61_145_896, 16.53e9),
}
DEPTHS = (3, 4, 6, 3)
# two layers, of 64 and 128 channels
SMALL = dict(depths=(1, 1, 2, 1), base_width=16, num_classes=10, zero_init_last=False)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("lesa_resnet50", **{**SMALL, "img_size": 64, **kwargs}).eval()


def any_size(**kwargs):
    return small(rel_pos="height_width", **kwargs)


def test_listed():
    assert set(MODELS) == set(cfgs) == set(timm.list_models("lesa_*"))
    assert timm.list_pretrained("lesa_*") == []
    assert {image_sizes()[name] for name in MODELS} == {224}


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    width, parameters, macs = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    assert isinstance(model, LesaResNet)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, abs=0.005e9)
    places = [n for n, m in model.named_modules() if isinstance(m, LocallyEnhancedSelfAttention)]
    assert places == [f"stages.2.{i}.self_attn" for i in range(1, 6)] + [f"stages.3.{i}.self_attn" for i in range(3)]
    assert [tuple(model.get_submodule(n).local[0].weight.shape[:2]) for n in (places[0], places[-1])] == [
        (4 * width, width // 2),
        (8 * width, width),
    ]
    info = [(f["num_chs"], f["reduction"]) for f in model.feature_info]
    assert info == [(64, 2), (256, 4), (512, 8), (2048, 16)]
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["fixed_input_size"], cfg["pool_size"]) == ((3, 224, 224), True, (14, 14))
    assert timm.create_model(name, device="meta", rel_pos="height_width").pretrained_cfg["fixed_input_size"] is False


@pytest.mark.parametrize(("size", "table"), [((64, 64), 31), ((65, 64), 39), ((48, 80), 29)], ids=str)
def test_image_size(size, table):
    model, x = small(img_size=size), torch.randn(2, 3, *size)
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
        small(img_size=(48, 80))(torch.randn(1, 3, 80, 48))


@pytest.mark.parametrize("size", [(64, 64), (96, 33), (31, 130), (1, 1)], ids=str)
def test_any_size_with_two_tables(size):
    out = any_size()(torch.randn(2, 3, *size))
    assert out.shape == (2, 10) and torch.isfinite(out).all()


@pytest.mark.parametrize("build", [small, any_size])
def test_every_parameter_gets_a_gradient(build):
    model = build().train()
    model(torch.randn(3, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("lesa_resnet50", depths=(1, 1, 2, 1), num_classes=0)
    for block, dim in ((model.stages[2][1], 256), (model.stages[3][0], 512)):
        attn = block.self_attn
        assert float(attn.qkv.weight.std()) == pytest.approx(dim**-0.5, rel=0.02)
        assert float(attn.pos_embed.table.std()) == pytest.approx((dim // 8) ** -0.5, rel=0.02)
        assert not block.conv3_1x1.bn.weight.any()


def test_decay_groups():
    model = any_size()
    tables = model.no_weight_decay()
    assert len(tables) == 2 * 2
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)[1]["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if name in tables)
    assert small().no_weight_decay() == {f"stages.{at}.self_attn.pos_embed.table" for at in ("2.1", "3.0")}
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.conv1.conv.weight", "stages.2.0.conv2_kxk.conv.weight", "stages.2.1.self_attn.qkv.weight"]
    assert [layers[name] for name in (*order, "head.fc.weight")] == sorted(
        {layers[n] for n in (*order, "head.fc.weight")}
    )


def test_options():
    x = torch.randn(2, 3, 64, 64)
    base = small()(x)
    for kw in (dict(num_heads=4), dict(rel_pos="height_width"), dict(act_layer="silu")):
        out = small(**kw)(x)
        assert out.shape == base.shape and not torch.allclose(out, base), kw
    assert small(in_chans=5)(torch.randn(1, 5, 64, 64)).shape == (1, 10)
    assert small(global_pool="", num_classes=0)(x).shape == (2, 2048, 4, 4)
    assert small(num_classes=0)(x).shape == (2, 2048)
    for kw in (dict(), dict(feature_cls="getter")):
        features = small(features_only=True, **kw)
        assert [tuple(f.shape[1:]) for f in features(x)] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (2048, 4, 4)]
    assert small(features_only=True, out_indices=(1, 3)).feature_info.reduction() == [4, 16]
    assert small(output_stride=8)(x).shape == (2, 10)
    dropped = small(drop_path_rate=0.4, drop_rate=0.2)
    assert dropped.stages[3][-1].drop_path.drop_prob == pytest.approx(0.4)
    dropped.reset_classifier(3, "max")
    assert dropped(x).shape == (2, 3) and dropped.head.global_pool.pool_type == "max"


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        (dict(depths=(1, 1, 1)), ValueError, r"four depths.*\(1, 1, 1\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"\(1, 0, 1, 1\)"),
        (dict(base_width=0), ValueError, "base_width >= 1.*0"),
        (dict(num_heads=24), ValueError, "dim=64, num_heads=24"),
        (dict(rel_po="flattened"), TypeError, "rel_po"),
    ],
)
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message):
        small(**kw)


def test_wrong_weights():
    model = small()
    with pytest.raises(ValueError, match="foreign state dict"):
        model.load_state_dict({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(1, 2, 64, 64\)"):
        model(torch.randn(1, 2, 64, 64))


def test_grad_checkpointing_changes_nothing():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    state, results = {k: v.clone() for k, v in model.state_dict().items()}, []
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_compile():
    torch._dynamo.reset()
    model, again, x = small(depths=(1, 1, 1, 1)).train(), small(depths=(1, 1, 1, 1)).train(), torch.randn(2, 3, 64, 64)
    expected, out = model(x), torch.compile(again, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    for result in (expected, out):
        result.square().mean().backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_compile_with_two_tables():
    torch._dynamo.reset()
    model = any_size(depths=(1, 1, 1, 1)).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(2, 3, 64, 96), (3, 3, 75, 50)]:
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), model(x))


def test_scripted_traced_exported_with_two_tables(pooling_takes_any_size):
    """timm's suite does this to the other form, at its one size."""
    model = any_size().requires_grad_(False)
    scripted, traced = torch.jit.script(model), torch.fx.symbolic_trace(model)
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes).module()
    for size in [(2, 3, 64, 96), (1, 3, 75, 50), (3, 3, 160, 144)]:
        x = torch.randn(size)
        others = [scripted, traced]
        if size[2:] != (75, 50) or pooling_takes_any_size:  # the stem's map is 38 x 25, the example's 48 x 64
            others.append(exported)
        for other in others:
            torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast, dtype):
    model, x = small(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        if autocast:
            with torch.autocast("cpu", dtype):
                out = model(x)
        else:
            out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.05 * expected.norm()

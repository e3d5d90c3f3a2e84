"""Focal Transformers: exact sizes, and what timm expects of a model."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from timm_halonet.families.focal.focal import FocalTransformer, cfgs
from timm_halonet.registry import image_sizes

# channels, depth of the third stage, heads, drop path; parameters with 1000 classes; multiply-adds at 224 px
MODELS = {
    "focal_transformer_tiny": (96, 6, (3, 6, 12, 24), 0.2, 28_827_460, 4.92e9),
    "focal_transformer_small": (96, 18, (3, 6, 12, 24), 0.3, 51_004_348, 9.43e9),
    "focal_transformer_base": (128, 18, (4, 8, 16, 32), 0.5, 89_631_944, 16.37e9),
    "focal_transformer_tiny_conv": (96, 6, (3, 6, 12, 24), 0.2, 30_772_324, 5.17e9),
    "focal_transformer_small_conv": (96, 18, (3, 6, 12, 24), 0.3, 52_949_212, 9.67e9),
    "focal_transformer_base_conv": (128, 18, (4, 8, 16, 32), 0.5, 93_085_256, 16.79e9),
}
RINGS, POOLED = (3, 3, 3, 0), (7, 5, 3, 1)
SMALL = dict(dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), num_classes=10, drop_path_rate=0.0)


def small(name="focal_transformer_tiny", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def with_biases(model):
    """Position biases large enough to show."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(p)
    return model


def test_listed():
    assert set(MODELS) == set(cfgs) == set(timm.list_models("focal_transformer_*"))
    assert timm.list_pretrained("focal_transformer_*") == []
    assert {image_sizes()[name] for name in MODELS} == {224}


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    dim, third, heads, drop_path, parameters, macs = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    assert isinstance(model, FocalTransformer)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, abs=0.01e9)
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, third, 2]
    info = [(f["num_chs"], f["reduction"]) for f in model.feature_info]
    assert info == [(dim, 4), (2 * dim, 8), (4 * dim, 16), (8 * dim, 32)]
    layers = [stage.blocks[0].attn for stage in model.stages]
    assert [(m.num_heads, m.ring_size, m.pooled_windows) for m in layers] == list(
        zip(heads, RINGS, POOLED, strict=True)
    )
    assert model.stages[3].blocks[1].drop_path2.drop_prob == pytest.approx(drop_path)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("name", ["focal_transformer_tiny", "focal_transformer_tiny_conv"])
@pytest.mark.parametrize("size", [(32, 32), (75, 130), (225, 97), (1, 1)], ids=str)
def test_any_size(name, size):
    model, x = small(name), torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = tuple(-(-n // 4) for n in size)
    for i, feature in enumerate(features):
        assert feature.shape == (2, 16 * 2**i, *expected)
        expected = tuple(-(-n // 2) for n in expected)
    out = model(x)
    assert out.shape == (2, 10) and torch.isfinite(out).all()


@pytest.mark.parametrize("padding", ["circular", "masked"])
def test_every_parameter_gets_a_gradient(padding):
    model = small(padding=padding).train()
    model(torch.randn(2, 3, 130, 120)).square().mean().backward()  # more than one window in the third stage
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_decay_groups():
    model = small()
    tables = model.no_weight_decay()
    assert len(tables) == 3 * 5 - 1  # no ring in the last stage
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)[1]["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if name in tables)
    for coarse in (True, False):
        layers = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert layers["stem.proj.weight"] == 0
        assert layers["head.fc.weight"] == max(layers.values()) > layers["stages.3.blocks.0.attn.proj.weight"]
        first, second = layers["stages.2.downsample.proj.weight"], layers["stages.2.blocks.1.mlp.fc1.bias"]
        assert first == second if coarse else first == layers["stages.2.blocks.0.norm1.bias"] < second


def test_options():
    x = torch.randn(2, 3, 96, 64)
    base = with_biases(small())(x)
    for kw in (dict(padding="masked"), dict(window_size=4), dict(ring_sizes=(1, 2, 3, 3)), dict(pooled_windows=3)):
        out = with_biases(small(**kw))(x)
        assert out.shape == base.shape and not torch.allclose(out, base), kw
    torch.testing.assert_close(with_biases(small(img_size=96))(x), base)
    assert small(in_chans=5)(torch.randn(1, 5, 64, 64)).shape == (1, 10)
    assert small(global_pool="catavgmax").head_hidden_size == 2 * 128
    assert small(global_pool="", num_classes=0)(x).shape == (2, 128, 3, 2)
    features = small(features_only=True, out_indices=(0, 3))
    assert [tuple(f.shape[1:]) for f in features(x)] == [(16, 24, 16), (128, 3, 2)]
    assert features.feature_info.reduction() == [4, 32]
    dropped = small(drop_path_rate=0.4, drop_rate=0.2)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in dropped.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    dropped.reset_classifier(3, "max")
    assert dropped(x).shape == (2, 3) and dropped.head.drop.p == 0.2 and not dropped.head.training
    dropped.reset_classifier(0)
    assert dropped(x).shape == (2, 128) and isinstance(dropped.get_classifier(), torch.nn.Identity)


def test_pruning():
    x = torch.randn(1, 3, 64, 64)
    model = small()
    whole, expected = model.forward_intermediates(x, indices=[0, 3], norm=True)
    torch.testing.assert_close(whole, expected[1])
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    out, features = model.forward_intermediates(x, indices=[0, 2])
    assert len(model.stages) == 3 and model.num_features == 64
    torch.testing.assert_close(features[0], expected[0])
    torch.testing.assert_close(out, features[1])
    model.reset_classifier(4, "avg")
    assert model(x).shape == (1, 4)


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        (dict(window_siz=8), TypeError, "'window_siz'.*window_size"),
        (dict(num_heads=3), ValueError, "16 channels.*num_heads=3"),
        (dict(ring_sizes=(3, 3)), ValueError, r"ring_sizes.*four stages.*\(3, 3\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"depths=\(1, 0, 1, 1\)"),
        (dict(mlp_ratio=0.0), ValueError, "mlp_ratio=0.0"),
    ],
)
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message):
        small(**kw)


def test_wrong_weights_and_images():
    model = small()
    with pytest.raises(ValueError, match="foreign state dict"):
        model.load_state_dict({"layer1.0.weight": torch.zeros(1)})
    for shape in [(3, 64, 64), (0, 3, 64, 64), (1, 4, 64, 64)]:
        with pytest.raises(ValueError) as e:
            model(torch.zeros(shape))
        assert str(shape) in str(e.value)
    with pytest.raises(ValueError, match="'NHWC'"):
        model.forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NHWC")


def test_grad_checkpointing_changes_nothing():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("padding", ["circular", "masked"])
def test_scripted_traced_exported(padding):
    model = with_biases(small(padding=padding, depths=1)).requires_grad_(False)
    x = torch.randn(2, 3, 75, 130)
    exported = torch.export.export(model, (x,)).module()
    traced = torch.jit.trace(model, x, check_trace=False)
    for other in (exported, traced):
        torch.testing.assert_close(other(x + 1), model(x + 1))
    scripted, symbolic = torch.jit.script(model), torch.fx.symbolic_trace(model)
    for size in [(1, 3, 50, 150), (3, 3, 130, 128)]:
        x = torch.randn(size)
        for other in (scripted, symbolic):
            torch.testing.assert_close(other(x), model(x))


@pytest.mark.slow
def test_exported_with_dynamic_sizes():
    """Those with, in every stage, more than one window, of which the last one is whole where the example's was."""
    model = with_biases(small(depths=1)).requires_grad_(False)
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 256, 320),), dynamic_shapes=shapes).module()
    x = torch.randn(3, 3, 299, 317)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("padding", ["circular", "masked"])
def test_compile(padding):
    torch._dynamo.reset()
    model, again = (with_biases(small(padding=padding, depths=1)).train() for _ in range(2))
    x = torch.randn(2, 3, 64, 150)
    expected, out = model(x), torch.compile(again, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    for result in (expected, out):
        result.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast, dtype):
    model, x = with_biases(small()), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        if autocast:
            with torch.autocast("cpu", dtype):
                out = model(x)
        else:
            out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_maps_are_channels_last_behind_the_stem():
    features = small().forward_intermediates(torch.randn(2, 3, 64, 96), intermediates_only=True)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)

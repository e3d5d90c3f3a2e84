"""EAMLP: exact sizes, and what timm expects of a model. The weights are in test_eamlp_weights.py."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from timm_halonet.families.eamlp.eamlp import EAMLP, cfgs
from timm_halonet.registry import listing

# dim, depth, heads, MLP ratio; parameters with 1000 classes, billions of multiply-adds at 224 px
MODELS = {
    "eamlp_7": (256, 7, 4, 2, 6_096_206, 1.465),
    "eamlp_14": (384, 14, 6, 3, 29_801_422, 6.45),
    "eamlp_19": (448, 19, 7, 3, 54_470_798, 11.60),
}
SMALL = dict(dim=24, depth=4, num_heads=2, num_slots=8, stem_dim=8, stem_slots=6, num_classes=10)


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("eamlp_7", **{**SMALL, **kwargs}).eval()
    for p in model.parameters():  # large enough for every part to show in the output
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    return model


def test_listed():
    assert set(MODELS) == set(cfgs) == set(timm.list_models("eamlp_*"))
    rows = {row["model"]: row for row in listing() if row["model"] in MODELS}
    assert {name: row["parameters"] for name, row in rows.items()} == {name: m[4] for name, m in MODELS.items()}
    assert {(row["weights"], row["image_size"]) for row in rows.values()} == {("-", 224)}


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    from timm_halonet.registry import multiply_adds

    dim, depth, heads, ratio, parameters, macs = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    assert isinstance(model, EAMLP)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert list(model.buffers()) == []
    assert multiply_adds(model, 224) / 1e9 == pytest.approx(macs, abs=0.005)
    assert (model.num_features, len(model.blocks)) == (dim, depth)
    layers = [block.attn for block in model.blocks]
    assert {(m.num_heads, m.dim_head, m.key_memory.out_features) for m in layers} == {(4 * heads, 64, 64)}
    assert {block.mlp.fc1.out_features for block in model.blocks} == {ratio * dim}
    assert [f["reduction"] for f in model.feature_info] == [16] * depth
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("size", [(32, 32), (75, 130), (225, 97), (7, 9), (1, 1)], ids=str)
def test_any_size(size):
    model, x = small(), torch.randn(2, 3, *size)
    height, width = (-(-n // 16) for n in size)
    out, features = model.forward_intermediates(x)
    assert {f.shape for f in features} == {(2, 24, height, width)}
    assert out.shape == (2, 1 + height * width, 24)
    torch.testing.assert_close(out, model.forward_features(x))
    padded = F.pad(x, (0, 16 * width - size[1], 0, 16 * height - size[0]))
    torch.testing.assert_close(model(x), model(padded))
    assert torch.isfinite(model(x)).all()


def test_every_parameter_gets_a_gradient():
    model = small().train().double()
    model(torch.randn(3, 3, 97, 70).double()).square().mean().backward()
    without = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-12}
    # in the blocks these shift a slot's logits of all tokens alike, which the softmax over tokens takes back
    expected = ("norm1.bias", "attn.q.bias", "attn.key_memory.bias")
    assert without == {f"blocks.{n}.{name}" for n in range(4) for name in expected}


def test_decay_groups():
    model = small()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in groups[1]["params"]}
    assert id(model.cls_token) not in decayed and id(model.blocks[0].attn.key_memory.weight) in decayed
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["cls_token"] == layers["tokens_to_token.project.weight"] == 0
    assert layers["blocks.0.norm1.bias"] < layers["blocks.3.mlp.fc1.bias"] == layers["norm.weight"]
    assert layers["head.weight"] == max(layers.values())
    scales = [group["lr_scale"] for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5)]
    assert max(scales) == 1.0 and min(scales) < 0.1


def test_options():
    x = torch.randn(2, 3, 64, 48)
    base = small()
    torch.testing.assert_close(small(img_size=96)(x), base(x))
    tokens = base.forward_features(x)
    for pool, expected in (
        ("token", tokens[:, 0]),
        ("avg", tokens[:, 1:].mean(1)),
        ("max", tokens[:, 1:].amax(1)),
        ("", tokens),
    ):
        base.reset_classifier(0, pool)
        torch.testing.assert_close(base(x), expected)
        torch.testing.assert_close(small(num_classes=0, global_pool=pool)(x).shape, expected.shape)
    base.reset_classifier(3, "avg")
    assert base(x).shape == (2, 3) and not base.head.training
    model = small(drop_path_rate=0.3, drop_rate=0.2, proj_drop_rate=0.1).train()
    assert [getattr(b.drop_path2, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert (model.head_drop.p, model.blocks[0].attn.proj_drop.p, model.blocks[0].mlp.drop1.p) == (0.2, 0.1, 0.1)
    assert not torch.allclose(model(x), model(x))
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.head.training
    for kw in (dict(act_layer="relu"), dict(mlp_ratio=3.0), dict(expansion=2), dict(num_slots=4)):
        assert not torch.allclose(small(**kw)(x), small()(x)), kw


def test_features():
    x = torch.randn(1, 3, 64, 40)
    model = small()
    features = timm.create_model("eamlp_7", **SMALL, features_only=True, out_indices=(0, 2)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert features.feature_info.channels() == [24, 24] and features.feature_info.reduction() == [16, 16]
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(features(x), expected)
    maps, prefixes = model.forward_intermediates(
        x, indices=[3], return_prefix_tokens=True, norm=True, intermediates_only=True
    )[0]
    torch.testing.assert_close(torch.cat([prefixes, maps.flatten(2).mT], dim=1), model.forward_features(x))
    tokens = model.forward_intermediates(x, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(tokens, expected[1].flatten(2).mT)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.blocks) == 3 and model.num_classes == 0
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 2], intermediates_only=True), expected)


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        (dict(num_slot=8), TypeError, "'num_slot'.*num_slots"),
        (dict(dim=25), ValueError, "25 channels.*num_heads=2"),
        (dict(num_slots=0), ValueError, "num_slots=0"),
        (dict(depth=0), ValueError, "depth=0"),
        (dict(global_pool="map"), ValueError, "'token', 'avg'.*got 'map'"),
    ],
)
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message):
        small(**kw)


@pytest.mark.parametrize("shape", [(3, 64, 64), (0, 3, 64, 64), (1, 3, 0, 64), (1, 4, 64, 64)], ids=str)
def test_wrong_images(shape):
    with pytest.raises(ValueError) as e:
        small()(torch.zeros(shape))
    assert str(shape) in str(e.value)
    with pytest.raises(ValueError, match="'NHWC'"):
        small().forward_intermediates(torch.zeros(1, 3, 16, 16), output_fmt="NHWC")


def test_scripted_traced_exported_compiled():
    torch._dynamo.reset()
    model = small(depth=2).requires_grad_(False)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    forms = [
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"),
        torch.export.export(model, (torch.randn(2, 3, 75, 110),), dynamic_shapes=(dynamic,)).module(),
    ]
    for size in [(2, 3, 64, 96), (3, 3, 75, 50)]:
        x = torch.randn(size)
        for form in forms:
            torch.testing.assert_close(form(x), model(x))


def test_grad_checkpointing_changes_nothing():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        features = model.forward_intermediates(x, intermediates_only=True)
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()], features))
    torch.testing.assert_close(results[0], results[1])

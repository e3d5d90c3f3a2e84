"""U-HaloNet: exact sizes, and what timm expects of a model. The weights are in test_uhalonet_weights.py."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.export import Dim

from timm_halonet.layers import HaloAttention
from timm_halonet.models.uhalonet import UHaloNet, cfgs
from timm_halonet.registry import listing
from timm_halonet.report.attention import attention_of

# dims, depths, heads, drop path of the authors' models; parameters with 1000 classes
MODELS = {
    "uhalonet_micro": ((32, 64, 128, 256), (2, 2, 9, 2), (1, 2, 4, 8), 0.0, 4_389_672),
    "uhalonet_tiny": ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), 0.2, 31_523_176),
    "uhalonet_small": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), 0.3, 52_831_336),
    "uhalonet_base": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), 0.5, 93_327_336),
}
SMALL = dict(dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), num_classes=10, layer_scale=0.5)


def test_listed():
    assert set(MODELS) == set(cfgs) == set(timm.list_models("uhalonet_*"))
    rows = {row["model"]: row for row in listing() if str(row["model"]).startswith("u")}
    assert {name: row["parameters"] for name, row in rows.items()} == {name: m[-1] for name, m in MODELS.items()}
    assert {(row["weights"], row["image_size"]) for row in rows.values()} == {("stm_in1k (download)", 224)}
    assert timm.list_pretrained("uhalonet_*") == sorted(f"{name}.stm_in1k" for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    dims, depths, heads, drop_path, parameters = MODELS[name]
    model = timm.create_model(name, device="meta")
    assert isinstance(model, UHaloNet)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert [len(stage.blocks) for stage in model.stages] == list(depths)
    assert [(f["num_chs"], f["reduction"]) for f in model.feature_info] == list(zip(dims, (4, 8, 16, 32), strict=True))
    layers = [m for m in model.modules() if isinstance(m, HaloAttention)]
    assert len(layers) == sum(depths)
    assert {(m.block_size, m.halo_size, m.dim_head_qk, m.dim_head_v) for m in layers} == {(7, 3, 32, 32)}
    assert tuple(stage.blocks[0].attn.num_heads for stage in model.stages) == heads
    norms = [(n.rpartition(".")[2], m.eps) for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {eps for part, eps in norms if part in ("norm1", "norm2")} == {1e-5}
    assert {eps for part, eps in norms if part not in ("norm1", "norm2")} == {1e-6}
    last = model.stages[3].blocks[-1].drop_path2
    assert getattr(last, "drop_prob", 0.0) == pytest.approx(drop_path)
    assert float(timm.create_model(name, depths=1).stages[0].blocks[0].ls1.gamma[0]) == pytest.approx(1e-6)
    assert model.num_features == dims[3] * 3 // 2
    cfg = model.pretrained_cfg
    release = "https://github.com/OpenGVLab/STM-Evaluation/releases/download/cls-ckpt"
    assert cfg["url"] == f"{release}/unified_halonet_{name.partition('_')[2]}.pth"
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert cfg["license"] == "mit"


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("uhalonet_micro", **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize("size", [(32, 32), (75, 130), (225, 97), (7, 9), (1, 1)], ids=str)
def test_any_size(size):
    model, x = small(), torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = tuple(-(-n // 2) for n in size)
    for feature, channels in zip(features, SMALL["dims"], strict=True):
        expected = tuple(-(-n // 2) for n in expected)
        assert feature.shape == (2, channels, *expected)
    out = model(x)
    assert out.shape == (2, 10)
    assert torch.isfinite(out).all()


def test_every_parameter_gets_a_gradient():
    model = small().train()
    model(torch.randn(3, 3, 97, 70)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_decay_groups():
    model = small()
    tables = model.no_weight_decay()
    assert len(tables) == 2 * 5
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)[1]["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if name in tables)
    for coarse in (True, False):
        matcher = model.group_matcher(coarse=coarse)
        layers = timm.models.group_parameters(model, matcher, reverse=True)
        assert layers["stem.0.weight"] == 0
        assert layers["head.fc.weight"] == max(layers.values()) > layers["stages.3.blocks.0.proj.weight"]
        first, second = layers["stages.1.downsample.0.weight"], layers["stages.1.blocks.1.proj.weight"]
        assert first == second if coarse else first == layers["stages.1.blocks.0.mlp.fc1.bias"] < second
    scales = [group["lr_scale"] for group in param_groups_layer_decay(model, 0.05, tables, layer_decay=0.5)]
    assert max(scales) == 1.0 and min(scales) < 0.1


def test_options():
    x = torch.randn(2, 3, 96, 64)
    base = small()(x)
    for kw in (dict(mask_border=False), dict(block_size=4), dict(halo_size=1), dict(act_layer="relu")):
        out = small(**kw)(x)
        assert out.shape == base.shape
        assert not torch.allclose(out, base), kw
    torch.testing.assert_close(small(img_size=96)(x), base)
    assert small(global_pool="catavgmax").head_hidden_size == 2 * 96
    assert small(global_pool="", num_classes=0)(x).shape == (2, 96, 3, 2)
    even = small(dims=16, num_heads=2).forward_intermediates(x, intermediates_only=True)
    assert [f.shape[1:] for f in even] == [(16, 24 >> i, 16 >> i) for i in range(4)]
    dropped = small(drop_path_rate=0.4, drop_rate=0.2)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in dropped.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert not torch.allclose(dropped.train()(x), dropped(x))
    assert dropped.head.drop.p == 0.2
    dropped.reset_classifier(3)
    assert dropped(x).shape == (2, 3) and dropped.head.training and dropped.head.drop.p == 0.2
    dropped.reset_classifier(0, "max")
    assert dropped(x).shape == (2, 96) and isinstance(dropped.get_classifier(), torch.nn.Identity)
    dropped.eval().reset_classifier(3)
    assert not any(m.training for m in dropped.modules())


@pytest.mark.parametrize(("stride", "sizes"), [(16, (24, 12, 6, 6)), (8, (24, 12, 12, 12))])
def test_output_stride(stride, sizes):
    model, x = small(output_stride=stride), torch.randn(1, 3, 96, 96)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [f.shape[-1] for f in features] == list(sizes)
    assert [f["reduction"] for f in model.feature_info] == [96 // size for size in sizes]
    # without attention the dilated convolutions see what the strided ones saw
    plain, dilated = small(layer_scale=0.0), small(layer_scale=0.0, output_stride=stride)
    expected, out = (m.forward_intermediates(x, intermediates_only=True)[-1] for m in (plain, dilated))
    step = 32 // stride
    torch.testing.assert_close(out[:, :, ::step, ::step], expected)


def test_pruning():
    x = torch.randn(1, 3, 64, 64)
    model = small()
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    out, features = model.forward_intermediates(x, indices=[0, 2])
    assert len(model.stages) == 3 and model.num_features == model.head_hidden_size == 32
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(out, expected[1])
    model.reset_classifier(4, "avg")
    assert model(x).shape == (1, 4)


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        (dict(block_siz=8), TypeError, "'block_siz'.*block_size"),
        (dict(zero_init_last=True), TypeError, "'zero_init_last'"),
        (dict(block_size=0), ValueError, "block_size=0"),
        (dict(halo_size=-2), ValueError, "halo_size=-2"),
        (dict(num_heads=3), ValueError, "stage 1: 8 channels.*3 heads"),
        (dict(num_heads=(1, 2)), ValueError, r"four stages.*\(1, 2\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"\(1, 0, 1, 1\)"),
        (dict(dims=1), ValueError, r"\(1, 1, 1, 1\)"),
        (dict(head_ratio=0.0), ValueError, "head_ratio=0.0"),
        (dict(output_stride=4), ValueError, "8, 16 or 32, got 4"),
    ],
)
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message):
        small(**kw)


@pytest.mark.parametrize("shape", [(3, 64, 64), (0, 3, 64, 64), (1, 3, 0, 64), (1, 4, 64, 64)], ids=str)
def test_wrong_images(shape):
    model = small()
    for call in (model, model.forward_intermediates):
        with pytest.raises(ValueError) as e:
            call(torch.zeros(shape))
        assert str(shape) in str(e.value)
    with pytest.raises(ValueError, match="'NHWC'"):
        model.forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NHWC")


def test_scripted_traced_exported():
    model = small(depths=1).requires_grad_(False)
    scripted = torch.jit.script(model)
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_function" and "halo" in node.target.__name__]
    assert len(calls) == 4
    every_dim = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    # every map has more than one block at this size
    exported = torch.export.export(model, (torch.randn(2, 3, 264, 320),), dynamic_shapes=(every_dim,)).module()
    for size in [(2, 3, 64, 96), (1, 3, 75, 50), (3, 3, 299, 331)]:
        x = torch.randn(size)
        expected = model(x)
        torch.testing.assert_close(scripted(x), expected)
        torch.testing.assert_close(traced(x), expected)
        if size[2] > 256:
            torch.testing.assert_close(exported(x), expected)


def test_compile():
    torch._dynamo.reset()
    model = small(depths=1).requires_grad_(False)  # training step: test_export.py compiles one of halonet_h0
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(2, 3, 64, 96), (3, 3, 75, 50)]:
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), model(x))


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_channels_last_behind_the_stem(memory_format):
    model = small().to(memory_format=memory_format)
    x = torch.randn(2, 3, 64, 96).to(memory_format=memory_format)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    inputs = []
    for m in model.modules():
        if isinstance(m, HaloAttention):
            m.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x)
    assert len(inputs) == 5 and all(f.is_contiguous(memory_format=torch.channels_last) for f in inputs)


def test_attend():
    found = attention_of(small(), torch.randn(1, 3, 100, 150), (0.5, 0.9))
    assert [a.name.split(".")[1] for a in found] == ["0", "1", "2", "3"]
    assert all(float(a.weights.sum()) == pytest.approx(1.0, abs=1e-5) for a in found)

"""LESA ResNets: exact sizes, the function that the authors' weights define, and what timm expects of a model."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from timm_halonet.layers import LocallyEnhancedSelfAttention
from timm_halonet.models import LesaResNet, _image_sizes
from timm_halonet.models.lesa import cfgs, checkpoint_filter_fn

# channels within a bottleneck of the first stage, parameters with 1000 classes, multiply-adds at 224 px
MODELS = {
    "lesa_resnet50": (64, 23_777_512, 6.18e9),
    "lesa_wide_resnet50_2": (128, 61_145_896, 16.53e9),
}
DEPTHS = (3, 4, 6, 3)
SMALL = dict(depths=(1, 1, 2, 1), base_width=16, num_classes=10, zero_init_last=False)  # 3 layers of 64, 128 channels


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("lesa_resnet50", **{**SMALL, "img_size": 64, **kwargs}).eval()


def any_size(**kwargs):
    return small(rel_pos="height_width", **kwargs)


def test_listed():
    assert set(MODELS) == set(cfgs) == set(timm.list_models("lesa_*"))
    assert timm.list_pretrained("lesa_*") == []
    assert {_image_sizes()[name] for name in MODELS} == {224}


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


# ---- the authors' checkpoints: names, shapes and function, written out without looking at the modules ----


def official_shapes(width, two_tables=False, classes=1000):
    def batch_norm(name, channels):
        stats = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        return {**stats, f"{name}.num_batches_tracked": ()}

    shapes = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    in_chs = 64
    for s, depth in enumerate(DEPTHS):
        c, out_chs = width * 2**s, 256 * 2**s
        for b in range(depth):
            at = f"layer{s + 1}.{b}"
            shapes[f"{at}.conv1.weight"] = (c, in_chs, 1, 1)
            shapes.update(batch_norm(f"{at}.bn1", c))
            if s == 3 or (s == 2 and b):
                at_attn = f"{at}.conv2"
                if two_tables:
                    shapes.update({f"{at_attn}.rel_height": (27, c // 16), f"{at_attn}.rel_width": (27, c // 16)})
                else:
                    shapes[f"{at_attn}.relative"] = (c // 4, 2 * 196 - 1)
                    shapes[f"{at_attn}.flatten_index"] = (196 * 196,)
                shapes[f"{at_attn}.qkv_transform.weight"] = (2 * c, c, 1)
                shapes.update(batch_norm(f"{at_attn}.bn_qkv", 2 * c))
                shapes.update(batch_norm(f"{at_attn}.bn_similarity", 16 if two_tables else 24))
                shapes.update(batch_norm(f"{at_attn}.bn_output", c if two_tables else 2 * c))
                shapes[f"{at_attn}.x_transform.0.weight"] = (c, c // 8, 3, 3)
                shapes[f"{at_attn}.x_transform.1.weight"] = (c, c, 1, 1)
                shapes.update(batch_norm(f"{at_attn}.bn_x", c))
                shapes[f"{at_attn}.reasoning.1.weight"] = (c, 2 * c, 1, 1)
                shapes.update(batch_norm(f"{at_attn}.reasoning.2", c))
                shapes[f"{at_attn}.projection.0.weight"] = (c, c, 1, 1)
                shapes.update(batch_norm(f"{at_attn}.projection.1", c))
            else:
                shapes[f"{at}.conv2.weight"] = (c, c, 3, 3)
                shapes.update(batch_norm(f"{at}.bn2", c))
            shapes[f"{at}.conv3.weight"] = (out_chs, c, 1, 1)
            shapes.update(batch_norm(f"{at}.bn3", out_chs))
            if b == 0:
                shapes[f"{at}.downsample.0.weight"] = (out_chs, in_chs, 1, 1)
                shapes.update(batch_norm(f"{at}.downsample.1", out_chs))
            in_chs = out_chs
    return {**shapes, "fc.weight": (classes, 2048), "fc.bias": (classes,)}


def official_state_dict(width=64, two_tables=False):
    """Random, with everything large enough to show in the output."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in official_shapes(width, two_tables).items():
        x = torch.randn(shape, generator=generator)
        if key.endswith(("num_batches_tracked", "flatten_index")):
            x = torch.zeros(shape, dtype=torch.long)
        elif key.endswith("running_var"):
            x = x.abs() + 0.5
        elif key.endswith(("relative", "rel_height", "rel_width")):
            x = 0.2 * x
        elif len(shape) > 1:
            x = x * x[0].numel() ** -0.5
        elif key.endswith("weight"):
            x = 1 + 0.2 * x
        else:
            x = 0.2 * x
        state[key] = x
    return state


def bn(state, name, x):
    stats = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *stats, training=False, eps=1e-5)


def naive_logit_terms(state, q, k, height, width, i):
    """q, k: (batch, heads, dim, N). The terms of query i with every key, [(batch, heads, N), ...]."""
    n, j = height * width, torch.arange(height * width)
    terms = [torch.einsum("bgc,bgcj->bgj", q[..., i], k)]
    if "relative" in state:
        dim = q.shape[2]
        for_q, for_k = state["relative"][:dim], state["relative"][dim : 2 * dim]
        with_q = torch.einsum("bgc,cj->bgj", q[..., i], for_q[:, i - j + n - 1])
        with_k = torch.einsum("bgcj,cj->bgj", k, for_k[:, j - i + n - 1])
        return [*terms, with_q, with_k]
    reach_y, reach_x = len(state["rel_height"]) // 2, len(state["rel_width"]) // 2
    dy = (j // width - i // width).clamp(-reach_y, reach_y)
    dx = (j % width - i % width).clamp(-reach_x, reach_x)
    rows = state["rel_height"][dy + reach_y] + state["rel_width"][dx + reach_x]
    return [*terms, torch.einsum("bgc,jc->bgj", q[..., i], rows)]


def naive_lesa(state, x, heads=8):
    """The layer, up to the activation behind it."""
    batch, c, height, width = x.shape
    n, dim = height * width, c // heads // 2
    local = F.conv2d(x, state["x_transform.0.weight"], padding=1, groups=heads)
    local = bn(state, "bn_x", F.conv2d(local, state["x_transform.1.weight"]))
    qkv = bn(state, "bn_qkv", F.conv1d(x.flatten(2), state["qkv_transform.weight"]))
    qkv = qkv.reshape(batch, heads, 4 * dim, n)
    q, k, v = qkv[:, :, :dim], qkv[:, :, dim : 2 * dim], qkv[:, :, 2 * dim :]
    terms = [naive_logit_terms(state, q, k, height, width, i) for i in range(n)]
    logits = torch.cat([torch.stack(kind, 2) for kind in zip(*terms, strict=True)], 1)  # heads of a kind together
    logits = bn(state, "bn_similarity", logits)
    probs = sum(logits.split(heads, 1)).softmax(-1)
    out = []
    for g in range(heads):
        for channel in range(2 * dim):
            out.append(torch.einsum("bij,bj->bi", probs[:, g], v[:, g, channel]))
            if "relative" in state:
                row = state["relative"][2 * dim + channel]
                by_key = torch.stack([row[i + n - 1 - torch.arange(n)] for i in range(n)])
                out.append(torch.einsum("bij,ij->bi", probs[:, g], by_key))
    context = bn(state, "bn_output", torch.stack(out, 1))
    if "relative" in state:
        context = context[:, ::2] + context[:, 1::2]
    context = context.reshape(x.shape)
    gate = F.conv2d(torch.cat([local, context], 1).relu(), state["reasoning.1.weight"])
    gate = bn(state, "reasoning.2", gate).relu()
    gate = bn(state, "projection.1", F.conv2d(gate, state["projection.0.weight"])).sigmoid()
    return local + gate * context


def naive_model(state, x):
    """The model from the authors' state dict; returns the features at 1/2, 1/4, 1/8 and 1/16, and the logits."""
    x = bn(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)).relu()
    features = [x]
    x = F.max_pool2d(x, 3, 2, 1)
    for s, depth in enumerate(DEPTHS):
        for b in range(depth):
            stride = 2 if s in (1, 2) and b == 0 else 1
            own = {
                k.removeprefix(f"layer{s + 1}.{b}."): v for k, v in state.items() if k.startswith(f"layer{s + 1}.{b}.")
            }
            y = bn(own, "bn1", F.conv2d(x, own["conv1.weight"])).relu()
            if "conv2.weight" in own:
                y = bn(own, "bn2", F.conv2d(y, own["conv2.weight"], stride=stride, padding=1)).relu()
            else:
                y = naive_lesa({k.removeprefix("conv2."): v for k, v in own.items()}, y).relu()
            y = bn(own, "bn3", F.conv2d(y, own["conv3.weight"]))
            if b == 0:
                x = bn(own, "downsample.1", F.conv2d(x, own["downsample.0.weight"], stride=stride))
            x = (x + y).relu()
        if s != 2:
            features.append(x)
    return features, x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("two_tables", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_authors(name, two_tables):
    with torch.device("meta"):
        theirs = {k: torch.empty(shape) for k, shape in official_shapes(MODELS[name][0], two_tables).items()}
    model = timm.create_model(name, device="meta", rel_pos="height_width" if two_tables else "flattened")
    own = {k: x.shape for k, x in model.state_dict().items()}
    for state in ({"net": theirs}, {"net": {f"module.{k}": x for k, x in theirs.items()}}, theirs):
        converted = checkpoint_filter_fn(state, model)
        assert {k: x.shape for k, x in converted.items()} == own
    again = checkpoint_filter_fn(converted, model)
    assert again.keys() == converted.keys() and all(again[k] is x for k, x in converted.items())


@pytest.mark.parametrize(("two_tables", "size"), [(False, (224, 224)), (True, (256, 96))])
def test_is_the_function_that_the_weights_define(two_tables, size):
    state = official_state_dict(two_tables=two_tables)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    double = {key: value.double() for key, value in state.items()}
    features, logits = naive_model(double, x)
    model = timm.create_model("lesa_resnet50", rel_pos="height_width" if two_tables else "flattened").eval()
    model.load_state_dict(checkpoint_filter_fn({"net": {f"module.{k}": v for k, v in state.items()}}, model))
    model.double()
    with torch.inference_mode():
        ours = model.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(model(x), logits, atol=1e-9, rtol=1e-9)
    for a, b in zip(ours, features, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# ---- the layer ----

LAYER_NAMES = {  # ours -> the authors'
    "local.0": "x_transform.0",
    "local.1": "x_transform.1",
    "local.2": "bn_x",
    "qkv": "qkv_transform",
    "bn_qkv": "bn_qkv",
    "pos_embed.table": "relative",
    "pos_embed.height_rel": "rel_height",
    "pos_embed.width_rel": "rel_width",
    "bn_logits": "bn_similarity",
    "bn_context": "bn_output",
    "gate.1": "reasoning.1",
    "gate.2": "reasoning.2",
    "gate.4": "projection.0",
    "gate.5": "projection.1",
}


def layer_and_state(**kwargs):
    """A layer in float64 with random statistics, and its parameters under the authors' names."""
    torch.manual_seed(0)
    layer = LocallyEnhancedSelfAttention(**kwargs, dtype=torch.float64).eval()
    for name, x in layer.state_dict().items():
        if x.is_floating_point() and ("running" in name or "bn_" in name):
            x.uniform_(0.5, 1.5)
    state = {}
    for name, x in layer.state_dict().items():
        ours = next(prefix for prefix in LAYER_NAMES if name.startswith(prefix))
        state[LAYER_NAMES[ours] + name[len(ours) :]] = x
    state["qkv_transform.weight"] = state["qkv_transform.weight"][..., 0]
    return layer, state


@pytest.mark.parametrize(("heads", "dim"), [(8, 16), (1, 6), (2, 12)])
@pytest.mark.parametrize("size", [(3, 5), (4, 1)], ids=str)
def test_flattened_table(heads, dim, size):
    layer, state = layer_and_state(dim=dim, feat_size=size, num_heads=heads)
    x = torch.randn(2, dim, *size, dtype=torch.float64)
    expected = naive_lesa(state, x, heads).relu()
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (2, 2), (6, 9), (1, 7)], ids=str)
def test_height_and_width_tables(size):
    """Of a 3x5 map, on smaller and larger ones."""
    layer, state = layer_and_state(dim=12, feat_size=(3, 5), num_heads=2, rel_pos="height_width")
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_lesa(state, x, 2).relu(), atol=1e-12, rtol=1e-12)


def test_context_is_global_and_local_is_local():
    layer, _ = layer_and_state(dim=16, feat_size=(5, 5))
    x = torch.randn(1, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    for part, reach in ((layer.local, 9), (layer._context, 25)):
        (seen,) = torch.autograd.grad(part(x)[0, :, 2, 2].square().sum(), x)
        assert int((seen.abs().sum(1) > 0).sum()) == reach


def test_stride_pools():
    layer, state = layer_and_state(dim=16, feat_size=(4, 6), stride=2)
    x = torch.randn(1, 16, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.avg_pool2d(naive_lesa(state, x), 2).relu())


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(dim=24), "dim=24, num_heads=8"),
        (dict(dim=16, num_heads=0), "num_heads=0"),
        (dict(feat_size=(0, 4)), r"\(0, 4\)"),
        (dict(rel_pos="both"), "'flattened' or 'height_width', got 'both'"),
    ],
)
def test_wrong_layer_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        LocallyEnhancedSelfAttention(**{"dim": 16, "feat_size": (4, 4), **kw})


# ---- the model in timm ----


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
    features = small(features_only=True, out_indices=(1, 3))
    assert [tuple(f.shape[1:]) for f in features(x)] == [(256, 16, 16), (2048, 4, 4)]
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
    state = official_state_dict()
    del state["layer4.2.conv2.bn_similarity.weight"]
    model = timm.create_model("lesa_resnet50")
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.3\.2\.self_attn\.bn_logits\.weight"):
        model.load_state_dict(checkpoint_filter_fn({"net": state}, model))


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


def test_scripted_traced_exported_with_two_tables():
    """timm's suite does this to the other form, at its one size."""
    model = any_size().requires_grad_(False)
    scripted, traced = torch.jit.script(model), torch.fx.symbolic_trace(model)
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes).module()
    for size in [(2, 3, 64, 96), (1, 3, 75, 50), (3, 3, 160, 144)]:
        x = torch.randn(size)
        for other in (scripted, traced, exported):
            torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision(how):
    model, x = small(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        if how == "bfloat16":
            out = model.bfloat16()(x.bfloat16())
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()

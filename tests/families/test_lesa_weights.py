"""The authors' checkpoints of LESA ResNets: their names and shapes, and the function they define.

No weights are downloaded: the checkpoints are random ones of the authors' names and shapes, written out here without
looking at the modules, as is the function.
"""

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_halonet.families.lesa.attention import LocallyEnhancedSelfAttention
from timm_halonet.families.lesa.lesa import checkpoint_filter_fn

from .test_lesa import DEPTHS, MODELS


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
        theirs = {k: torch.empty(shape) for k, shape in official_shapes(MODELS[name], two_tables).items()}
    model = timm.create_model(name, device="meta", rel_pos="height_width" if two_tables else "flattened")
    own = {k: x.shape for k, x in model.state_dict().items()}
    for state in ({"net": theirs}, {"net": {f"module.{k}": x for k, x in theirs.items()}}, theirs):
        converted = checkpoint_filter_fn(state, model)
        assert {k: x.shape for k, x in converted.items()} == own
    again = checkpoint_filter_fn(converted, model)
    assert again.keys() == converted.keys() and all(again[k] is x for k, x in converted.items())


@pytest.mark.parametrize(
    ("two_tables", "size"), [pytest.param(False, (224, 224), marks=pytest.mark.integration), (True, (240, 32))]
)
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


def test_loading_is_strict():
    state = official_state_dict()
    del state["layer4.2.conv2.bn_similarity.weight"]
    model = timm.create_model("lesa_resnet50")
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.3\.2\.self_attn\.bn_logits\.weight"):
        model.load_state_dict(checkpoint_filter_fn({"net": state}, model))


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

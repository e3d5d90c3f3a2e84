"""The authors' checkpoints of Focal Transformers: their names and shapes, and the function they define.

No weights are downloaded: the checkpoints are random ones of the authors' names and shapes, written out here without
looking at the modules, as is the function.
"""

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_halonet.families.focal.attention import FocalAttention
from timm_halonet.families.focal.focal import checkpoint_filter_fn

from ..support.families import FAMILIES
from .test_focal import MODELS, POOLED, RINGS

SMALL = {**FAMILIES["focal"].kwargs, "num_classes": 10}

# millions of parameters in the authors' layout, where the ring has 132 keys, 12 of them twice
OFFICIAL = {
    "focal_transformer_tiny": 28.880380,
    "focal_transformer_small": 51.141940,
    "focal_transformer_base": 89.815400,
    "focal_transformer_tiny_conv": 30.825,
    "focal_transformer_small_conv": 53.087,
    "focal_transformer_base_conv": 93.269,
}


def official_shapes(dim, depths, heads, conv, classes=1000):
    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name, channels):
        return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}

    def embed(name, outputs, inputs, kernel):
        return {
            f"{name}.proj.weight": (outputs, inputs, kernel, kernel),
            f"{name}.proj.bias": (outputs,),
            **norm(f"{name}.norm", outputs),
        }

    shapes = embed("patch_embed", dim, 3, 7 if conv else 4)
    for s, depth in enumerate(depths):
        c, h, n = dim * 2**s, heads[s], POOLED[s]
        for b in range(depth):
            at = f"layers.{s}.blocks.{b}"
            shapes.update(linear(f"{at}.pool_layers.0", 1, 49))
            shapes.update(norm(f"{at}.norm1", c))
            shapes[f"{at}.attn.relative_position_bias_table"] = (169, h)
            shapes[f"{at}.attn.relative_position_index"] = (49, 49)
            if RINGS[s]:
                shapes[f"{at}.attn.relative_position_bias_table_to_neighbors"] = (1, h, 49, 132)
                shapes[f"{at}.attn.valid_ind_rolled"] = (132,)
            shapes[f"{at}.attn.relative_position_bias_table_to_windows.0"] = (h, (6 + n) ** 2)
            shapes[f"{at}.attn.relative_position_index_0"] = (49, n * n)
            shapes.update(linear(f"{at}.attn.qkv", 3 * c, c))
            shapes.update(linear(f"{at}.attn.proj", c, c))
            shapes.update(norm(f"{at}.norm2", c))
            shapes.update(linear(f"{at}.mlp.fc1", 4 * c, c))
            shapes.update(linear(f"{at}.mlp.fc2", c, 4 * c))
        if s < 3:
            shapes.update(embed(f"layers.{s}.downsample", 2 * c, c, 3 if conv else 2))
    return {**shapes, **norm("norm", 8 * dim), **linear("head", classes, 8 * dim)}


def is_buffer(name):
    return "_index" in name or "valid_ind" in name


def official_state_dict(*args):
    """Random, with everything large enough to show in the output."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in official_shapes(*args).items():
        x = torch.randn(shape, generator=generator)
        if is_buffer(key):
            x = torch.zeros(shape, dtype=torch.long)
        elif "pool_layers" in key:
            x = 0.1 * x
        elif len(shape) > 1 and "table" not in key:
            x = x * x[0].numel() ** -0.5
        elif "norm" in key and key.endswith("weight"):
            x = 1 + 0.2 * x
        else:
            x = 0.3 * x
        state[key] = x
    return state


def four_copies(window=7, ring=3):
    """Where the keys of the authors' ring are, from the window's first pixel: what copies of the window, moved to the
    bottom right, bottom left, top right and top left, have outside it."""
    keys = []
    for down in (ring, -ring):
        for right in (ring, -ring):
            for y in range(down, down + window):
                for x in range(right, right + window):
                    if not (0 <= y < window and 0 <= x < window):
                        keys.append((y, x))
    return keys


def naive_attention(state, x, heads, n, ring_keys, padding, window=7):
    """Of a map (height, width, channels), window by window; `ring_keys` as (row, column) from the window's first."""
    height, width, c = x.shape
    d = c // heads
    down, across = -(-height // window), -(-width // window)
    whole = x.new_zeros(down * window, across * window, c)
    whole[:height, :width] = x

    def project(pixels):
        """(count, channels) -> q, k, v (heads, count, d)"""
        out = pixels @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]
        return out.reshape(-1, 3, heads, d).permute(1, 2, 0, 3)

    pooled = x.new_zeros(down, across, c)
    for i in range(down):
        for j in range(across):
            own = whole[i * window : (i + 1) * window, j * window : (j + 1) * window].flatten(0, 1)
            pooled[i, j] = (own * state["pool_layers.0.weight"][0][:, None]).sum(0) + state["pool_layers.0.bias"]
    own_keys = [(y, x) for y in range(window) for x in range(window)]
    by_offset = torch.stack(  # queries, keys, heads
        [
            torch.stack(
                [
                    state["attn.relative_position_bias_table"][
                        (qy - ky + window - 1) * (2 * window - 1) + qx - kx + window - 1
                    ]
                    for ky, kx in own_keys
                ]
            )
            for qy, qx in own_keys
        ]
    ).permute(2, 0, 1)
    out = torch.zeros_like(whole)
    for i in range(down):
        for j in range(across):
            pixels, biases = [], []
            for kind, keys in enumerate((own_keys, ring_keys)):
                for place, (y, xx) in enumerate(keys):
                    row, col = i * window + y, j * window + xx
                    if padding == "circular":
                        row, col = row % len(whole), col % whole.shape[1]
                    elif not (0 <= row < height and 0 <= col < width):
                        continue
                    pixels.append(whole[row, col])
                    table = by_offset if kind == 0 else state["attn.relative_position_bias_table_to_neighbors"][0]
                    biases.append(table[:, :, place])
            rows = window + n - 1
            for ky in range(n):
                for kx in range(n):
                    row, col = i + ky - n // 2, j + kx - n // 2
                    if 0 <= row < down and 0 <= col < across:
                        pixels.append(pooled[row, col])
                        at = [(qy - ky + n - 1) * rows + qx - kx + n - 1 for qy, qx in own_keys]
                        biases.append(state["attn.relative_position_bias_table_to_windows.0"][:, at])
            q = project(torch.stack([whole[i * window + y, j * window + xx] for y, xx in own_keys]))[0]
            _, k, v = project(torch.stack(pixels))
            probs = (q @ k.transpose(1, 2) * d**-0.5 + torch.stack(biases, 2)).softmax(-1)
            got = (probs @ v).transpose(0, 1).reshape(window, window, c)
            out[i * window : (i + 1) * window, j * window : (j + 1) * window] = got
    return out[:height, :width] @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def naive_model(state, x, depths, heads, conv, padding="circular"):
    """The model from the authors' state dict, of one image; returns the stages' outputs and the logits."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def embed(x, name, stride):
        pad = {(True, 4): 2, (True, 2): 1}.get((conv, stride), 0)
        x = F.conv2d(x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], stride=stride, padding=pad)
        return norm(x.permute(0, 2, 3, 1), f"{name}.norm")

    x = embed(x, "patch_embed", 4)
    stages = []
    for s, depth in enumerate(depths):
        for b in range(depth):
            at = f"layers.{s}.blocks.{b}"
            own = {k.removeprefix(f"{at}."): value for k, value in state.items() if k.startswith(f"{at}.")}
            ring_keys = four_copies() if RINGS[s] else []
            y = naive_attention(own, norm(x, f"{at}.norm1")[0], heads[s], POOLED[s], ring_keys, padding)
            x = x + y
            y = F.gelu(norm(x, f"{at}.norm2") @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
            x = x + y @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
        stages.append(x.permute(0, 3, 1, 2))
        if s < 3:
            x = embed(stages[-1], f"layers.{s}.downsample", 2)
    return stages, norm(x, "norm").mean((1, 2)) @ state["head.weight"].T + state["head.bias"]


def shapes_of(name):
    dim, third, heads, *_ = MODELS[name]
    return official_shapes(dim, (2, 2, third, 2), heads, name.endswith("_conv"))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_authors(name):
    parameters = sum(torch.Size(shape).numel() for key, shape in shapes_of(name).items() if not is_buffer(key))
    digits = 3 if name.endswith("_conv") else 6
    assert round(parameters / 1e6, digits) == OFFICIAL[name]
    with torch.device("meta"):
        theirs = {k: torch.empty(shape) for k, shape in shapes_of(name).items()}
    model = timm.create_model(name, device="meta")
    own = {k: x.shape for k, x in model.state_dict().items()}
    for state in ({"model": theirs, "epoch": 299}, {"model": {f"module.{k}": x for k, x in theirs.items()}}, theirs):
        converted = checkpoint_filter_fn(state, model)
        assert {k: x.shape for k, x in converted.items()} == own
    again = checkpoint_filter_fn(converted, model)
    assert again.keys() == converted.keys() and all(again[k] is x for k, x in converted.items())


@pytest.mark.parametrize(
    ("conv", "size", "padding"),
    [
        (False, (192, 192), "circular"),
        (False, (224, 224), "circular"),
        pytest.param(False, (256, 256), "circular", marks=pytest.mark.integration),
        pytest.param(True, (224, 224), "circular", marks=pytest.mark.integration),
        (True, (256, 160), "masked"),
    ],
)
def test_is_the_function_that_the_weights_define(conv, size, padding):
    depths, heads = (1, 1, 2, 1), (1, 2, 4, 8)
    state = {k: x if is_buffer(k) else x.double() for k, x in official_state_dict(32, depths, heads, conv).items()}
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    stages, logits = naive_model(state, x, depths, heads, conv, padding)
    name = "focal_transformer_tiny_conv" if conv else "focal_transformer_tiny"
    model = timm.create_model(name, dim=32, depths=depths, num_heads=heads, padding=padding).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": state}, model))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), logits, atol=1e-9, rtol=1e-9)
        for ours, theirs in zip(model.forward_intermediates(x, intermediates_only=True), stages, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_loading_is_strict():
    state = official_state_dict(16, SMALL["depths"], SMALL["num_heads"], False, 10)
    model = timm.create_model("focal_transformer_tiny", **SMALL)
    model.load_state_dict(checkpoint_filter_fn(state, model))
    del state["layers.2.blocks.1.attn.relative_position_bias_table_to_neighbors"]
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.2\.blocks\.1\.attn\.ring_bias"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


# ---- the layer ----


def random_layer(**kwargs):
    torch.manual_seed(0)
    layer = FocalAttention(**{**dict(dim=6, num_heads=2, window_size=3, ring_size=2), **kwargs}, dtype=torch.float64)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def under_the_authors_names(layer):
    state = {f"attn.{k}": x for k, x in layer.state_dict().items()}
    for part in ("weight", "bias"):
        state[f"pool_layers.0.{part}"] = state.pop(f"attn.pool.{part}")
    state["attn.relative_position_bias_table"] = layer.window_bias.flatten(1).T
    state["attn.relative_position_bias_table_to_windows.0"] = layer.pooled_bias.flatten(1)
    if layer.ring_bias is not None:
        state["attn.relative_position_bias_table_to_neighbors"] = layer.ring_bias[None]
    return state


@pytest.mark.parametrize("padding", ["circular", "masked"])
@pytest.mark.parametrize("size", [(9, 6), (7, 11), (1, 1), (2, 13)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 2, 3), (2, 3, 1), (3, 0, 5), (1, 1, 3)], ids=str)
def test_layer(sizes, size, padding):
    window, ring, n = sizes
    layer = random_layer(window_size=window, ring_size=ring, pooled_windows=n, padding=padding)
    reach = range(-ring, window + ring)
    inside = range(window)
    ring_keys = [(y, x) for y in reach for x in reach if not (y in inside and x in inside)]  # each once, row by row
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    ours = layer(x)
    for a, b in zip(ours, x, strict=True):
        theirs = naive_attention(under_the_authors_names(layer), b, 2, n, ring_keys, padding, window)
        torch.testing.assert_close(a, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("padding", "pooled", "pixels"), [("masked", 1, 9), ("masked", 3, 25), ("circular", 1, 25)])
def test_what_a_corner_sees(padding, pooled, pixels):
    """Window of 3, ring of 1 on a 12x12 map: the first window, a ring that goes on at the other side or does not, and
    all the pixels of the pooled windows."""
    layer = random_layer(ring_size=1, pooled_windows=pooled, padding=padding)
    x = torch.randn(1, 12, 12, 6, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(layer(x)[0, 0, 0].square().sum(), x)
    seen = seen[0].abs().sum(-1) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    reach = range(-1, 4) if padding == "circular" else range(4)
    for row in reach:
        for col in reach:
            expected[row, col] = True
    expected[: 3 * (pooled // 2 + 1), : 3 * (pooled // 2 + 1)] = True
    assert torch.equal(seen, expected)


def test_initial_values():
    torch.manual_seed(0)
    for attn in (FocalAttention(64, 4), timm.create_model("focal_transformer_tiny", **SMALL).stages[1].blocks[0].attn):
        assert torch.equal(attn.pool.weight, torch.full((1, 49), 1 / 49)) and not attn.pool.bias.any()
        assert not attn.window_bias.any()
        for table in (attn.ring_bias, attn.pooled_bias):
            assert float(table.std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(num_heads=4), "6 channels.*num_heads=4"),
        (dict(window_size=0), "window_size=0"),
        (dict(ring_size=-1), "ring_size=-1"),
        (dict(pooled_windows=4), "odd.*4"),
        (dict(padding="zeros"), "'circular' or 'masked', got 'zeros'"),
    ],
)
def test_wrong_layer_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        random_layer(**kw)

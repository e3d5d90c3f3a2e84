"""The authors' weights of EAMLP: their names and shapes, and the function they define.

No weights are downloaded: the state dict is a random one of the authors' names and shapes, written out here without
looking at the module, as is the function.
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_halonet.families.eamlp.eamlp import checkpoint_filter_fn

from .test_eamlp import MODELS
from .test_external_attention import naive_attention


def official_shapes(dim, depth, ratio, slots=64, stem=64, stem_slots=128, classes=1000, images=224):
    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name, ins, outs, bias=True):
        return {f"{name}.weight": (outs, ins), **({f"{name}.bias": (outs,)} if bias else {})}

    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, (images // 16) ** 2 + 1, dim)}
    for n, width in ((1, 3 * 49), (2, stem * 9)):
        block = f"tokens_to_token.attention{n}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", stem)
        shapes |= linear(f"{block}.attn.q_linear", width, stem) | linear(f"{block}.attn.proj", stem, stem)
        shapes |= linear(f"{block}.attn.linear_0", stem, stem_slots, bias=False)
        shapes |= linear(f"{block}.attn.linear_1", stem_slots, stem)
        shapes |= linear(f"{block}.mlp.fc1", stem, stem) | linear(f"{block}.mlp.fc2", stem, stem)
    shapes |= linear("tokens_to_token.project", stem * 9, dim)
    for n in range(depth):
        block = f"blocks.{n}"
        shapes |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
        shapes |= linear(f"{block}.attn.trans_dims", dim, 4 * dim) | linear(f"{block}.attn.proj", 4 * dim, dim)
        shapes |= linear(f"{block}.attn.linear_0", 64, slots) | linear(f"{block}.attn.linear_1", slots, 64)
        shapes |= linear(f"{block}.mlp.fc1", dim, ratio * dim) | linear(f"{block}.mlp.fc2", ratio * dim, dim)
    return shapes | norm("norm", dim) | linear("head", dim, classes)


def official_state_dict(name, **kwargs):
    """Random, with everything large enough to show in the output."""
    generator = torch.Generator().manual_seed(0)
    dim, depth, _, ratio, *_ = MODELS[name]
    state = {}
    for key, shape in official_shapes(dim, depth, ratio, **kwargs).items():
        x = torch.randn(shape, generator=generator)
        if "norm" in key and key.endswith("weight"):
            x = 1 + 0.2 * x
        elif "linear_0.weight" in key:
            x = x * 0.3  # logits of standard deviation 2 or so
        elif "linear_1.weight" not in key:
            x = 0.2 * x if len(shape) == 1 else x * shape[-1] ** -0.5
        state[key] = x
    return state


def naive_patches(x, size, stride, padding):
    """(channels, height, width) -> (patches, channels * size * size), row by row."""
    x = F.pad(x, (padding,) * 4)
    rows, cols = ((n - size) // stride + 1 for n in x.shape[1:])
    return torch.stack(
        [
            x[:, i * stride : i * stride + size, j * stride : j * stride + size].flatten()
            for i in range(rows)
            for j in range(cols)
        ]
    ), (rows, cols)


def naive_model(state, image, depth, heads):
    """The tokens before the final norm and the logits of one image (3, H, W), from the authors' state dict."""

    def pair(name):
        return state[f"{name}.weight"], state.get(f"{name}.bias")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *pair(name), eps=1e-5)

    def mlp(x, name):
        (w1, b1), (w2, b2) = pair(f"{name}.fc1"), pair(f"{name}.fc2")
        return F.gelu(x @ w1.T + b1) @ w2.T + b2

    def attention(x, name, first, heads, skip):
        pairs = [pair(f"{name}.attn.{part}") for part in (first, "linear_0", "linear_1", "proj")]
        return naive_attention(norm(x, f"{name}.norm1"), *pairs, heads, skip)

    x = image
    for n, (size, stride, padding) in enumerate([(7, 4, 2), (3, 2, 1)], start=1):
        x, sides = naive_patches(x, size, stride, padding)
        x = attention(x, f"tokens_to_token.attention{n}", "q_linear", 1, True)
        x = x + mlp(norm(x, f"tokens_to_token.attention{n}.norm2"), f"tokens_to_token.attention{n}.mlp")
        x = x.T.unflatten(1, sides)
    weight, bias = pair("tokens_to_token.project")
    x = naive_patches(x, 3, 2, 1)[0] @ weight.T + bias
    x = torch.cat([state["cls_token"][0], x])
    dim = x.shape[1]
    angles = [[p / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for p in range(len(x))]
    x = x + torch.tensor([[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in angles])
    for n in range(depth):
        x = x + attention(x, f"blocks.{n}", "trans_dims", 4 * heads, False)
        x = x + mlp(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp")
    weight, bias = pair("head")
    return x, norm(x, "norm")[0] @ weight.T + bias


@pytest.fixture(scope="module")
def official():
    return official_state_dict("eamlp_7")


@pytest.fixture(scope="module")
def checkpoint(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "eamlp_7.pth.tar"
    other = {f"module.{key}": torch.zeros_like(x) for key, x in official.items()}
    ema = {f"module.{key}": x for key, x in official.items()}
    torch.save({"epoch": 299, "state_dict": other, "state_dict_ema": ema}, path)
    return path


def pretrained(path, **kwargs):
    return timm.create_model("eamlp_7", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_authors(name):
    dim, depth, _, ratio, *_ = MODELS[name]
    with torch.device("meta"):
        theirs = {key: torch.empty(shape) for key, shape in official_shapes(dim, depth, ratio).items()}
    model = timm.create_model(name, device="meta")
    converted = checkpoint_filter_fn({"state_dict_ema": theirs, "state_dict": {}}, model)
    assert {k: x.shape for k, x in converted.items()} == {k: x.shape for k, x in model.state_dict().items()}
    assert len(converted) == len(theirs) - 1  # without pos_embed
    again = checkpoint_filter_fn(converted, model)
    assert again.keys() == converted.keys() and all(again[k] is converted[k] for k in again)


@pytest.mark.parametrize("size", [(64, 48), (112, 96), (70, 33)], ids=str)
def test_is_the_function_that_the_weights_define(official, checkpoint, size):
    _, depth, heads, *_ = MODELS["eamlp_7"]
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    double = {key: value.double() for key, value in official.items()}
    model = pretrained(checkpoint)
    with torch.inference_mode():
        logits = model(images)
        maps = model.forward_intermediates(images, indices=[depth - 1], intermediates_only=True)[0]
    height, width = (-(-n // 16) for n in size)
    for i, image in enumerate(images):
        padded = F.pad(image.double(), (0, 16 * width - size[1], 0, 16 * height - size[0]))
        tokens, expected = naive_model(double, padded, depth, heads)
        torch.testing.assert_close(logits[i], expected.float(), atol=1e-5, rtol=1e-5)
        expected = tokens[1:].T.unflatten(1, (height, width))
        torch.testing.assert_close(maps[i], expected.float(), atol=1e-5, rtol=1e-5)


def test_transfer(official, checkpoint, tmp_path):
    whole, x = pretrained(checkpoint), torch.randn(1, 1, 64, 80)
    grey = pretrained(checkpoint, in_chans=1)
    torch.testing.assert_close(grey(x), whole(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)
    assert pretrained(checkpoint, in_chans=5)(torch.randn(1, 5, 64, 80)).shape == (1, 1000)
    assert torch.equal(pretrained(checkpoint, num_classes=7).norm.weight, official["norm.weight"])
    # another size of the positions' table is no other model
    large = official_state_dict("eamlp_7", images=384)
    assert checkpoint_filter_fn(large, whole).keys() == whole.state_dict().keys()
    torch.save({**official, "norm.bias": official["norm.bias"] * math.nan}, tmp_path / "nan.pth")
    torch.save({k: x for k, x in official.items() if "head" not in k}, tmp_path / "headless.pth")
    for name, error, message in (("nan", ValueError, "256 values are NaN"), ("headless", RuntimeError, "head.weight")):
        with pytest.raises(error, match=message):
            pretrained(tmp_path / f"{name}.pth")

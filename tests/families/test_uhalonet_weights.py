"""The authors' weights of U-HaloNet: their names and shapes, the function they define, and how timm loads them.

No weights are downloaded: the checkpoints are random ones of the authors' names and shapes, written out here without
looking at the module, as is the function.
"""

import argparse
import os
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_halonet.models.uhalonet import checkpoint_filter_fn

from .test_uhalonet import MODELS


def official_shapes(dims, depths, classes=1000):
    shapes = {
        "downsample_layers.0.stem.0.weight": (dims[0] // 2, 3, 3, 3),
        "downsample_layers.0.stem.0.bias": (dims[0] // 2,),
        "downsample_layers.0.stem.1.weight": (dims[0] // 2,),
        "downsample_layers.0.stem.1.bias": (dims[0] // 2,),
        "downsample_layers.0.stem.3.weight": (dims[0], dims[0] // 2, 3, 3),
        "downsample_layers.0.stem.3.bias": (dims[0],),
        "downsample_layers.0.stem.4.weight": (dims[0],),
        "downsample_layers.0.stem.4.bias": (dims[0],),
    }
    for s in (1, 2, 3):
        shapes[f"downsample_layers.{s}.reduction.0.weight"] = (dims[s], dims[s - 1], 3, 3)
        shapes[f"downsample_layers.{s}.reduction.1.weight"] = (dims[s],)
        shapes[f"downsample_layers.{s}.reduction.1.bias"] = (dims[s],)
    for s, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        for b in range(depth):
            block = {
                "gamma_1": (1, 1, 1, c),
                "gamma_2": (1, 1, 1, c),
                "norm1.weight": (c,),
                "norm1.bias": (c,),
                "attn.kv.weight": (2 * c, c, 1, 1),
                "attn.q.weight": (c, c),
                "attn.pos_embed.height_rel": (25, 32),
                "attn.pos_embed.width_rel": (25, 32),
                "attn.proj.weight": (c, c),
                "attn.proj.bias": (c,),
                "norm2.weight": (c,),
                "norm2.bias": (c,),
                "mlp.fc1.weight": (4 * c, c),
                "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c),
                "mlp.fc2.bias": (c,),
            }
            shapes.update({f"stages.{s}.{b}.{name}": shape for name, shape in block.items()})
        shapes[f"stage_norms.{s}.weight"] = (c,)
        shapes[f"stage_norms.{s}.bias"] = (c,)
    width = dims[3] * 3 // 2
    shapes["conv_head.0.weight"] = (width, dims[3], 1, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"conv_head.1.{name}"] = (width,)
    shapes["conv_head.1.num_batches_tracked"] = ()
    shapes["head.weight"] = (classes, width)
    shapes["head.bias"] = (classes,)
    return shapes


def official_state_dict(name):
    """Random, with everything large enough to show in the output."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in official_shapes(*MODELS[name][:2]).items():
        x = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            x = torch.tensor(7)
        elif key.endswith("running_var"):
            x = x.abs() + 0.5
        elif "gamma_" in key:
            x = 0.3 + 0.1 * x
        elif key.endswith("_rel"):
            x = 0.3 * x
        elif len(shape) > 1:
            x = x * x[0].numel() ** -0.5
        elif "norm" in key and key.endswith("weight"):
            x = 1 + 0.2 * x
        else:
            x = 0.2 * x
        state[key] = x
    return state


def naive_attention(state, x, heads, block, halo):
    """Of a map (batch, H, W, C), block by block over the keys that exist; states the position of every table row."""
    height, width, channels = x.shape[1:]
    dim = channels // heads
    q = (x @ state["attn.q.weight"].T).unflatten(-1, (heads, dim))
    kv = (x @ state["attn.kv.weight"][:, :, 0, 0].T).unflatten(-1, (heads, 2 * dim))  # of each head: k, then v
    out = torch.empty_like(q)
    zero = block + 3 * halo - 1  # the row of the tables for a key in the query's own row
    for top in range(0, height, block):
        for left in range(0, width, block):
            rows, cols = slice(top, min(top + block, height)), slice(left, min(left + block, width))
            key_rows = slice(max(top - halo, 0), min(top + block + halo, height))
            key_cols = slice(max(left - halo, 0), min(left + block + halo, width))
            k, v = kv[:, key_rows, key_cols, :, :dim], kv[:, key_rows, key_cols, :, dim:]
            for y in range(rows.start, rows.stop):
                high = state["attn.pos_embed.height_rel"][key_rows.start - y + zero : key_rows.stop - y + zero]
                for xx in range(cols.start, cols.stop):
                    wide = state["attn.pos_embed.width_rel"][key_cols.start - xx + zero : key_cols.stop - xx + zero]
                    logits = torch.einsum("bnd,buwnd->bnuw", q[:, y, xx], k) * dim**-0.5
                    logits = logits + torch.einsum("bnd,ud->bnu", q[:, y, xx], high)[..., None]
                    logits = logits + torch.einsum("bnd,wd->bnw", q[:, y, xx], wide)[..., None, :]
                    probs = logits.flatten(2).softmax(-1).view_as(logits)
                    out[:, y, xx] = torch.einsum("bnuw,buwnd->bnd", probs, v)
    return out.flatten(3) @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def naive_model(state, x, depths, heads, block=7, halo=3):
    """The model from the authors' state dict; returns the stages' outputs and the logits."""

    def channel_norm(x, name):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6).permute(0, 3, 1, 2)

    stem = "downsample_layers.0.stem"
    x = F.conv2d(x, state[f"{stem}.0.weight"], state[f"{stem}.0.bias"], stride=2, padding=1)
    x = F.gelu(channel_norm(x, f"{stem}.1"))
    x = F.conv2d(x, state[f"{stem}.3.weight"], state[f"{stem}.3.bias"], stride=2, padding=1)
    x = channel_norm(x, f"{stem}.4")
    stages = []
    for s, depth in enumerate(depths):
        if s:
            x = F.conv2d(x, state[f"downsample_layers.{s}.reduction.0.weight"], stride=2, padding=1)
            x = channel_norm(x, f"downsample_layers.{s}.reduction.1")
        x = x.permute(0, 2, 3, 1)
        for b in range(depth):
            own = {key.removeprefix(f"stages.{s}.{b}."): value for key, value in state.items()}
            y = F.layer_norm(x, x.shape[-1:], own["norm1.weight"], own["norm1.bias"], 1e-5)
            x = x + own["gamma_1"] * naive_attention(own, y, heads[s], block, halo)
            y = F.layer_norm(x, x.shape[-1:], own["norm2.weight"], own["norm2.bias"], 1e-5)
            y = F.gelu(y @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
            x = x + own["gamma_2"] * (y @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"])
        x = channel_norm(x.permute(0, 3, 1, 2), f"stage_norms.{s}")
        stages.append(x)
    x = F.conv2d(x, state["conv_head.0.weight"])
    bn = [state[f"conv_head.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.gelu(F.batch_norm(x, *bn, training=False, eps=1e-5)).mean((2, 3))
    return stages, x @ state["head.weight"].T + state["head.bias"]


@pytest.fixture(scope="module")
def official():
    return official_state_dict("uhalonet_micro")


@pytest.fixture(scope="module")
def checkpoint(official, tmp_path_factory):
    """A file as the authors' training script writes it."""
    path = tmp_path_factory.mktemp("release") / "unified_halonet_micro.pth"
    torch.save({"model": official, "epoch": 299, "args": argparse.Namespace(lr=1e-3)}, path)
    return path


def pretrained(path, **kwargs):
    return timm.create_model(
        "uhalonet_micro", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs
    ).eval()


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_authors(name):
    with torch.device("meta"):
        theirs = {key: torch.empty(shape) for key, shape in official_shapes(*MODELS[name][:2]).items()}
    model = timm.create_model(name, device="meta")
    converted = checkpoint_filter_fn({"model": theirs}, model)
    own = model.state_dict()
    assert len(converted) == len(theirs)
    assert {k: x.shape for k, x in converted.items()} == {k: x.shape for k, x in own.items()}


@pytest.mark.parametrize(
    "size", [pytest.param((224, 224), marks=pytest.mark.integration), (97, 130), (33, 50)], ids=str
)
def test_is_the_function_that_the_weights_define(official, checkpoint, size):
    _, depths, heads, *_ = MODELS["uhalonet_micro"]
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    double = {key: value.double() for key, value in official.items()}
    stages, logits = naive_model(double, x.double(), depths, heads)
    model = pretrained(checkpoint)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), logits.float(), atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(model.forward_intermediates(x, intermediates_only=True), stages, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)


def test_position_tables_of_another_window_are_interpolated(official, checkpoint):
    _, depths, heads, *_ = MODELS["uhalonet_micro"]
    rows = 2 * (9 + 2 * 2) + 1  # block 10, halo 2: a window of 14, so 27 rows in place of 25
    state = {key: value.double() for key, value in official.items()}
    for key in [key for key in state if key.endswith("_rel")]:
        places = [i * 24 / (rows - 1) for i in range(rows)]  # first row on first, last on last
        table, low = state[key], [min(int(p), 23) for p in places]
        state[key] = torch.stack(
            [table[i] + (p - i) * (table[i + 1] - table[i]) for i, p in zip(low, places, strict=True)]
        )
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    _, logits = naive_model(state, x.double(), depths, heads, block=10, halo=2)
    with torch.inference_mode():
        other = pretrained(checkpoint, block_size=10, halo_size=2)(x)
        torch.testing.assert_close(other, logits.float(), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(other, pretrained(checkpoint)(x), atol=1e-2)


def test_loads_from_the_release_address(official, checkpoint, tmp_path):
    """By timm's way for addresses, which loads weights only, into a cache."""
    overlay = dict(url=checkpoint.as_uri())
    model = timm.create_model(
        "uhalonet_micro", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path)
    )
    assert (tmp_path / checkpoint.name).is_file()
    assert torch.equal(model.head.fc.weight, official["head.weight"])
    assert torch.equal(model.stages[2].blocks[8].attn.q.weight[:, :, 0, 0], official["stages.2.8.attn.q.weight"])
    assert torch.equal(model.stages[0].blocks[1].ls2.gamma, official["stages.0.1.gamma_2"].flatten())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(official, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": official, "args": Evil(tmp_path / "executed")}, path)
    for overlay in (dict(url=path.as_uri()), dict(file=str(path))):
        with pytest.raises((pickle.UnpicklingError, RuntimeError), match="mkdir"):
            timm.create_model(
                "uhalonet_micro", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / "cache")
            )
    assert not (tmp_path / "executed").exists()


def test_loading_is_strict(official, tmp_path):
    path = tmp_path / "other.pth"
    without = {k: x for k, x in official.items() if k != "stages.2.5.attn.proj.bias"}
    wrong = {**official, "stages.0.0.norm1.bias": torch.full((32,), float("nan"))}
    for state, error, message in (
        (without, RuntimeError, r"Missing key.*stages\.2\.blocks\.5\.proj\.bias"),
        (
            {**official, "stages.0.0.extra": torch.zeros(1)},
            RuntimeError,
            r"Unexpected key.*stages\.0\.blocks\.0\.extra",
        ),
        (wrong, ValueError, r"stages\.0\.blocks\.0\.norm1\.bias \(32,\): 32 values are NaN"),
        ({"layer1.weight": torch.zeros(1)}, ValueError, "foreign state dict"),
    ):
        torch.save({"model": state}, path)
        with pytest.raises(error, match=f"(?s){message}"):
            pretrained(path)


def test_transfer(official, checkpoint):
    assert torch.equal(pretrained(checkpoint, num_classes=7).final_conv.conv.weight, official["conv_head.0.weight"])
    grey = pretrained(checkpoint, in_chans=1)
    torch.testing.assert_close(grey.stem[0].weight, official["downsample_layers.0.stem.0.weight"].sum(1, keepdim=True))
    x = torch.randn(1, 3, 70, 64)
    whole = pretrained(checkpoint)
    features = pretrained(checkpoint, features_only=True)
    for a, b in zip(features(x), whole.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b)
    assert features.feature_info.channels() == [32, 64, 128, 256]
    torch.testing.assert_close(
        pretrained(checkpoint, num_classes=0)(x), whole.forward_head(whole.forward_features(x), pre_logits=True)
    )
    # a state dict of ours, for another window
    again = checkpoint_filter_fn(whole.state_dict(), timm.create_model("uhalonet_micro", block_size=8))
    assert again["stages.0.blocks.0.attn.pos_embed.width_rel"].shape == (27, 32)

"""EAMLP: its structure and options. What holds for every family is in test_every_family.py."""

import pytest
import timm
import torch
import torch.nn.functional as F

from ..support.families import FAMILIES, small

# dim, depth, heads, MLP ratio
MODELS = {
    "eamlp_7": (256, 7, 4, 2),
    "eamlp_14": (384, 14, 6, 3),
    "eamlp_19": (448, 19, 7, 3),
}
EAMLP = FAMILIES["eamlp"]


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    dim, depth, heads, ratio = MODELS[name]
    model = timm.create_model(name, device="meta").eval()
    assert list(model.buffers()) == []
    assert (model.num_features, len(model.blocks)) == (dim, depth)
    layers = [block.attn for block in model.blocks]
    assert {(m.num_heads, m.dim_head, m.key_memory.out_features) for m in layers} == {(4 * heads, 64, 64)}
    assert {block.mlp.fc1.out_features for block in model.blocks} == {ratio * dim}


@pytest.mark.parametrize("size", [(75, 130), (7, 9)], ids=str)
def test_other_sizes_are_padded(size):
    model, x = small(EAMLP), torch.randn(2, 3, *size)
    padded = F.pad(x, (0, -size[1] % 16, 0, -size[0] % 16))
    torch.testing.assert_close(model(x), model(padded))


def test_options():
    x = torch.randn(2, 3, 64, 48)
    base = small(EAMLP)
    tokens = base.forward_features(x)
    for pool, expected in (
        ("token", tokens[:, 0]),
        ("avg", tokens[:, 1:].mean(1)),
        ("max", tokens[:, 1:].amax(1)),
        ("", tokens),
    ):
        base.reset_classifier(0, pool)
        torch.testing.assert_close(base(x), expected)
        torch.testing.assert_close(small(EAMLP, num_classes=0, global_pool=pool)(x), expected)
    model = small(EAMLP, drop_rate=0.2, proj_drop_rate=0.1)
    assert (model.head_drop.p, model.blocks[0].attn.proj_drop.p, model.blocks[0].mlp.drop1.p) == (0.2, 0.1, 0.1)


def test_features():
    x = torch.randn(1, 3, 64, 40)
    model = small(EAMLP)
    maps, prefixes = model.forward_intermediates(
        x, indices=[3], return_prefix_tokens=True, norm=True, intermediates_only=True
    )[0]
    torch.testing.assert_close(torch.cat([prefixes, maps.flatten(2).mT], dim=1), model.forward_features(x))
    maps = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    tokens = model.forward_intermediates(x, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(tokens, maps.flatten(2).mT)

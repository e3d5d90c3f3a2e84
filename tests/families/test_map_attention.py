"""MapAttentionEncoder against a loop over cells and torch.nn.TransformerEncoderLayer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_halonet import MapAttentionEncoder

ATTENTIONS = ("row", "axial", "halo", "global")


def small(attention="row", **kwargs) -> MapAttentionEncoder:
    torch.manual_seed(0)
    options = dict(
        num_classes=5, dim=8, out_dim=6, num_heads=2, hidden=7, block_size=3, halo_size=1, dtype=torch.float64
    )
    return MapAttentionEncoder(attention, **{**options, **kwargs}).eval()


def random_maps(*shape, seed=0, classes=5):
    """Half of the cells unknown."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(1, classes + 1, shape, generator=generator)
    return maps * (torch.rand(shape, generator=generator) < 0.5)


def visible(attention: str, layer: int, at: tuple[int, int], cell: tuple[int, int]) -> bool:
    """Whether a query at `at` has `cell` within its neighbourhood; blocks of 3, a halo of 1."""
    if attention == "global":
        return True
    if attention == "halo":
        return all(a // 3 * 3 - 1 <= c < a // 3 * 3 + 4 for a, c in zip(at, cell, strict=True))
    along = 1 if attention == "axial" and layer == 1 else 0  # equal rows, or equal columns
    return at[along] == cell[along]


def naive(model: MapAttentionEncoder, maps: torch.Tensor) -> torch.Tensor:
    """Cell by cell, head by head, from the state dict."""
    w = model.state_dict()
    vectors = []
    for map_ in maps:
        height, width = map_.shape
        cells = [(y, x) for y in range(height) for x in range(width)]
        x = {}
        for cell in cells:
            dy, dx = cell[0] - height // 2, cell[1] - width // 2
            position = round(19 * math.exp(-(dy * dy + dx * dx) / 200))
            embedded = w["class_embed.weight"][map_[cell]] + w["position_embeds.0.weight"][position]
            x[cell] = F.layer_norm(embedded, (8,), w["norm.weight"], w["norm.bias"])
        for i in range(2):
            p = {k.removeprefix(f"layers.{i}."): v for k, v in w.items()}
            qkv = {c: p["self_attn.in_proj_weight"] @ x[c] + p["self_attn.in_proj_bias"] for c in cells}
            new = {}
            for cell in cells:
                keys = [c for c in cells if map_[c] > 0 and visible(model.attention, i, cell, c)]
                heads = []
                for h in range(2):
                    part = [slice(8 * j + 4 * h, 8 * j + 4 * h + 4) for j in range(3)]  # q, k, v of the head
                    if not keys:
                        heads.append(torch.zeros(4, dtype=torch.float64))
                        continue
                    logits = torch.stack([qkv[cell][part[0]] @ qkv[c][part[1]] / 2 for c in keys])
                    heads.append(logits.softmax(0) @ torch.stack([qkv[c][part[2]] for c in keys]))
                y = x[cell] + p["self_attn.out_proj.weight"] @ torch.cat(heads) + p["self_attn.out_proj.bias"]
                y = F.layer_norm(y, (8,), p["norm1.weight"], p["norm1.bias"])
                hidden = F.gelu(p["linear1.weight"] @ y + p["linear1.bias"])
                y = y + p["linear2.weight"] @ hidden + p["linear2.bias"]
                new[cell] = F.layer_norm(y, (8,), p["norm2.weight"], p["norm2.bias"])
            x = new
        mean = torch.stack(list(x.values())).mean(0)
        vectors.append(torch.tanh(w["head.weight"] @ mean + w["head.bias"]))
    return torch.stack(vectors)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_has_the_papers_parameters(attention):
    model = MapAttentionEncoder(attention)
    assert sum(p.numel() for p in model.parameters()) == 240_384
    assert model(random_maps(2, 40, 40, classes=40)).shape == (2, 512)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("size", [(4, 7), (7, 4), (1, 3)])
def test_equals_the_loop_with_unknown_cells(attention, size):
    model, maps = small(attention), random_maps(3, *size)
    maps[1] = 0  # nothing known
    maps[2, 0] = 0  # a row without anything known
    torch.testing.assert_close(model(maps), naive(model, maps), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(5, 4), (3, 8)])
def test_global_layers_are_torchs(size):
    model, maps = small("global"), random_maps(3, *size)
    x = torch.randn(3, *size, 8, dtype=torch.float64)
    theirs = nn.TransformerEncoderLayer(8, 2, 7, activation="gelu", batch_first=True, dtype=torch.float64).eval()
    theirs.load_state_dict(model.layers[0].state_dict())
    expected = theirs(x.flatten(1, 2), src_key_padding_mask=maps.flatten(1) == 0)
    torch.testing.assert_close(model.layers[0](x, maps != 0, size).flatten(1, 2), expected)


@pytest.mark.parametrize("size", [(5, 4), (3, 8)])
def test_row_layers_are_torchs_row_by_row(size):
    model, maps = small("row"), random_maps(3, *size)
    maps[:, :, 0] = 1  # torch's layer gives NaN for a row of masked keys
    x = torch.randn(3, *size, 8, dtype=torch.float64)
    theirs = nn.TransformerEncoderLayer(8, 2, 7, activation="gelu", batch_first=True, dtype=torch.float64).eval()
    theirs.load_state_dict(model.layers[0].state_dict())
    expected = theirs(x.flatten(0, 1), src_key_padding_mask=maps.flatten(0, 1) == 0)
    torch.testing.assert_close(model.layers[0](x, maps != 0, (1, size[1])).flatten(0, 1), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("positions", ["distance", "offsets"])
def test_gradients_are_finite_though_nothing_is_known(attention, positions):
    model = small(attention, positions=positions, dtype=torch.float32).train()
    maps = random_maps(3, 6, 5)
    maps[0] = 0
    out = model(maps)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    assert not model.class_embed.weight.grad[0].any()  # unknown stays the zero vector


@pytest.mark.parametrize("attention", ["row", "axial", "global"])
def test_distances_cannot_tell_left_from_right_but_offsets_can(attention):
    maps = random_maps(2, 5, 7)
    for flip in ((1,), (2,)):
        model = small(attention)
        torch.testing.assert_close(model(maps), model(maps.flip(flip)))
        model = small(attention, positions="offsets")
        assert (model(maps) - model(maps.flip(flip))).abs().max() > 1e-3


def test_positions_are_near_to_far_from_the_agent():
    index = MapAttentionEncoder().position_indices(40, 40)[0]
    assert index[20, 20] == 19 and index.max() == 19 and index.min() == 0
    rows, cols = MapAttentionEncoder(positions="offsets", max_offset=3).position_indices(9, 4)
    assert rows.flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    assert cols.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(attention, dtype):
    model, maps = small(attention, dtype=torch.float32), random_maps(2, 6, 7)
    maps[0] = 0
    expected = model(maps)
    with torch.no_grad():
        torch.testing.assert_close(model.to(dtype)(maps).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(attention="column"), "'row', 'axial', 'halo', 'global', got 'column'"),
        (dict(positions="learned"), "'distance', 'offsets', got 'learned'"),
        (dict(dim=10, num_heads=4), "dim=10 cannot be divided among num_heads=4"),
        (dict(block_size=0), "block_size=0"),
        (dict(sigma=0.0), r"sigma=0.0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MapAttentionEncoder(**kwargs)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\) of torch.float32"),
        (torch.zeros(3, 4, dtype=torch.int64), r"got \(3, 4\)"),
        (torch.full((1, 2, 2), 6), "0 to 5, got 6 to 6"),
        (torch.full((1, 2, 2), -1), "0 to 5, got -1 to -1"),
    ],
    ids=str,
)
def test_wrong_maps_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        small()(maps)

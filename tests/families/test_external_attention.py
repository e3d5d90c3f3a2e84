"""External attention as a layer, against explicit loops over heads, slots and tokens."""

import pytest
import timm
import torch

from timm_halonet.families.eamlp.attention import ExternalAttention, ExternalAttention2d, double_normalize


def naive_weights(logits):
    """Of one head, (tokens, slots): columns to softmax, then rows to sums of one."""
    shares = torch.stack([column.exp() / column.exp().sum() for column in logits.T], dim=1)
    return torch.stack([row / (1e-9 + row.sum()) for row in shares])


def naive_attention(x, q, key, value, proj, heads, skip=False):
    """Of one image's tokens (tokens, dim); the others are pairs of weight and bias, None for no bias."""

    def linear(x, pair):
        return x @ pair[0].T + (0 if pair[1] is None else pair[1])

    queries = linear(x, q)
    parts = []
    for head in queries.chunk(heads, dim=1):
        parts.append(linear(naive_weights(linear(head, key)), value))
    out = linear(torch.cat(parts, dim=1), proj)
    return out + queries if skip else out


def test_double_normalization_is_the_papers():
    logits = 3 * torch.randn(2, 9, 4, 5, dtype=torch.double)
    weights = double_normalize(logits)
    for image in range(2):
        for head in range(4):
            torch.testing.assert_close(weights[image, :, head], naive_weights(logits[image, :, head]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9, 4, dtype=torch.double), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_double_normalization_is_safe_in_16_bits(dtype):
    logits = (32 * torch.randn(4, 196, 64, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    weights = double_normalize(logits)
    assert weights.dtype == dtype
    exact = double_normalize(logits.detach().double())
    torch.testing.assert_close(weights.detach().double(), exact, atol=0.004, rtol=0.01)
    weights.backward(torch.randn(weights.shape).to(dtype))
    assert torch.isfinite(weights).all() and torch.isfinite(logits.grad).all()
    # it takes the wider numbers: in float16 itself, rows divide zero by zero
    shares = logits.detach().softmax(1)
    plain = shares / (1e-9 + shares.sum(-1, keepdim=True))
    assert plain.isnan().any() == (dtype == torch.float16)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_over_maps(heads, bias):
    torch.manual_seed(0)
    layer = ExternalAttention2d(12, 18, num_heads=heads, num_slots=7, key_bias=bias, value_bias=bias).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 12, 5, 4, dtype=torch.double)
    out = layer(x)
    assert out.shape == (2, 18, 5, 4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    pairs = [(m.weight, m.bias) for m in (layer.q, layer.key_memory, layer.value_memory, layer.proj)]
    for image in range(2):
        tokens = torch.stack([x[image, :, i, j] for i in range(5) for j in range(4)])
        expected = naive_attention(tokens, *pairs, heads)
        torch.testing.assert_close(out[image].flatten(1).T, expected)
    assert torch.autograd.gradcheck(layer, (x[:, :, :2, :3].clone().requires_grad_(),))


def test_tokens_meet_in_the_normalisation_only():
    torch.manual_seed(0)
    layer, x = ExternalAttention(8, num_slots=5).double(), torch.randn(1, 6, 8, dtype=torch.double)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    # so a token that every slot ignores changes nothing for the others
    layer.q.weight.data, layer.q.bias.data = torch.eye(8, dtype=torch.double), torch.zeros(8, dtype=torch.double)
    layer.key_memory.weight.data = torch.rand(5, 8, dtype=torch.double)
    more = torch.cat([x, torch.full((1, 1, 8), -1e4, dtype=torch.double)], dim=1)
    torch.testing.assert_close(layer(more)[:, :6], layer(x))
    assert not torch.allclose(layer(torch.cat([x, x[:, :1]], dim=1))[:, :6], layer(x))


def test_second_memory_starts_as_a_copy():
    layer = ExternalAttention(8, num_slots=5, mirror_init=True)
    assert torch.equal(layer.value_memory.weight, layer.key_memory.weight.T)
    with torch.no_grad():
        layer.key_memory.weight.zero_()
    assert layer.value_memory.weight.abs().min() > 0  # and not tied to it
    fresh = timm.create_model("eamlp_7", depth=1)
    stem, block = fresh.tokens_to_token.attention1.attn, fresh.blocks[0].attn
    assert torch.equal(stem.value_memory.weight, stem.key_memory.weight.T)
    assert not torch.equal(block.value_memory.weight, block.key_memory.weight.T)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(num_heads=5), "12 channels.*num_heads=5"),
        (dict(num_heads=0), "num_heads=0"),
        (dict(num_slots=0), "num_slots=0"),
        (dict(num_heads=2, dim_head=4, skip=True), r"2 \* 4.*dim_out=12"),
    ],
)
def test_wrong_layers(kw, message):
    with pytest.raises(ValueError, match=message):
        ExternalAttention2d(12, **kw)

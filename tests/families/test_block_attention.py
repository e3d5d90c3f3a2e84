"""BlockSelfAttention2d against a loop over pixels, and the U-Net that holds it."""

import pytest
import torch
from torch import nn

from timm_halonet import BlockAttentionUNet, BlockSelfAttention2d
from timm_halonet.ops import blocked_attention


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def naive(layer: BlockSelfAttention2d, x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, from the layer's three matrices."""
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    b, overlap = layer.block_size, layer.window_size - layer.block_size
    before = overlap // 2 if layer.symmetric else 0
    out = torch.empty_like(x)
    for i, image in enumerate(x):
        pixels = torch.einsum("oc,chw->hwo", weight, image) + bias
        q, k, v = pixels.chunk(3, -1)
        for row in range(image.shape[1]):
            for col in range(image.shape[2]):
                top, left = row // b * b - before, col // b * b - before
                window = (
                    slice(max(top, 0), top + layer.window_size),
                    slice(max(left, 0), left + layer.window_size),
                )
                weights = torch.einsum("c,hwc->hw", q[row, col], k[window])
                weights = weights.flatten().softmax(0).view(weights.shape)
                out[i, :, row, col] = image[:, row, col] + torch.einsum("hw,hwc->c", weights, v[window])
    return out


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "block", "window"), [((9, 7), 4, 6), ((4, 10), 3, 5), ((1, 2), 2, 4), ((5, 5), 2, 2)])
def test_layer_equals_the_loop(symmetric, size, block, window):
    torch.manual_seed(0)
    layer = BlockSelfAttention2d(5, block, window, symmetric, dtype=torch.float64)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    inputs, grad = [x, *layer.parameters()], torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symmetric_layer_is_the_fused_op_and_equals_the_primitive(dtype):
    torch.manual_seed(0)
    layer = BlockSelfAttention2d(16, 6, 10, symmetric=True)
    x = torch.randn(2, 16, 15, 13)
    assert layer.fused and not BlockSelfAttention2d(16, 6, 10).fused
    q, k, v = (y.permute(0, 2, 3, 1).unsqueeze(1) for y in layer.qkv(x).chunk(3, 1))
    expected = x + blocked_attention(q, k, v, 6, 2, scale=1.0).squeeze(1).permute(0, 3, 1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    out = layer.to(dtype)(x.to(dtype))
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_one_sided_sees_only_to_the_bottom_and_right():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 12, 12)
    for symmetric, sources in ((False, range(4, 10)), (True, range(3, 9))):
        layer = BlockSelfAttention2d(4, 4, 6, symmetric)
        y = x.clone().requires_grad_()
        layer(y)[:, :, 4:8, 4:8].square().sum().backward()  # the block in the middle
        seen = y.grad[0].abs().sum(0) > 0
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[sources.start : sources.stop, sources.start : sources.stop] = True
        assert torch.equal(seen, expected)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"block_size=8, window_size=6"):
        BlockSelfAttention2d(4, 8, 6)
    with pytest.raises(ValueError, match=r"block_size=8\.0"):
        BlockSelfAttention2d(4, 8.0, 12)
    with pytest.raises(ValueError, match=r"block_size=8, window_size=11; window_size=10 or 12"):
        BlockSelfAttention2d(4, 8, 11, symmetric=True)
    with pytest.raises(ValueError, match=r"\(batch, 4, height, width\), got shape \(1, 3, 8, 8\)"):
        BlockSelfAttention2d(4)(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("symmetric", [False, True])
def test_unet_has_the_papers_parameters(symmetric):
    for layers in range(3):
        with torch.device("meta"):
            model = BlockAttentionUNet(attention_layers=layers, symmetric=symmetric)
        assert parameters(model) == 13_394_567 + layers * 12_480
    assert [up.conv[0].out_channels for up in model.decoder] == [256, 128, 64, 64]
    assert [stage[0].out_channels for stage in model.encoder.stages] == [64, 128, 256, 512, 512]


def test_attention_stands_before_the_last_upsampling():
    model = BlockAttentionUNet(width=2).eval()
    seen = []
    model.attention.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape, out.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 1, 256, 256))
    assert seen == [((1, 2, 128, 128), (1, 2, 128, 128))]


@pytest.mark.parametrize("size", [(1, 1), (16, 48), (33, 50), (64, 31)])
def test_unet_takes_any_size(size):
    torch.manual_seed(0)
    model = BlockAttentionUNet(3, 2, width=4, block_size=6, window_size=9).eval()
    assert model(torch.randn(2, 2, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_parameter_of_the_unet_gets_a_gradient(symmetric):
    torch.manual_seed(0)
    model = BlockAttentionUNet(3, 1, width=4, block_size=6, window_size=10, symmetric=symmetric)
    model(torch.randn(2, 1, 40, 35)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if ".qkv.bias" not in name and not (name.endswith(".bias") and p.ndim == 1):  # batch norm undoes some biases
            assert p.grad.any(), name


@pytest.mark.parametrize(
    ("backbone", "size", "kwargs"),
    [
        ("halonet_h0", (65, 96), {}),  # maps at 1/2 to 1/32
        ("resnet18", (64, 64), {}),
        ("convnext_atto", (64, 96), {}),  # at 1/4 to 1/32
        pytest.param("swin_tiny_patch4_window7_224", (224, 224), {}, marks=pytest.mark.integration),  # channels last
        ("resnet18", (64, 64), dict(out_indices=(1, 3))),
    ],
    ids=str,
)
def test_unet_over_timm_backbones(backbone, size, kwargs):
    torch.manual_seed(0)
    model = BlockAttentionUNet(5, 3, width=8, backbone=backbone, block_size=8, window_size=12, **kwargs)
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5, *size)
    out.square().mean().backward()
    for name in ("attention.0.qkv.weight", "decoder.0.conv.0.weight"):
        assert model.get_parameter(name).grad.any()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    plain = BlockAttentionUNet(5, 3, width=8, backbone=backbone, attention_layers=0, **kwargs)
    attended = 3 * 8 * 8 + 3 * 8
    assert parameters(model) == parameters(plain) + 2 * attended


def test_unet_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="attention_layers=-1"):
        BlockAttentionUNet(attention_layers=-1)
    with pytest.raises(ValueError, match="pretrained: arguments of a backbone, and backbone= is not given"):
        BlockAttentionUNet(pretrained=True)
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\), got shape \(1, 3, 8, 8\)"):
        BlockAttentionUNet(width=2)(torch.zeros(1, 3, 8, 8))

"""U-HaloNet: its structure and options. What holds for every family is in test_every_family.py."""

import pytest
import timm
import torch

from timm_halonet.layers import HaloAttention
from timm_halonet.report.attention import attention_of

from ..support.families import FAMILIES

# dims, depths, heads, drop path of the authors' models
MODELS = {
    "uhalonet_micro": ((32, 64, 128, 256), (2, 2, 9, 2), (1, 2, 4, 8), 0.0),
    "uhalonet_tiny": ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "uhalonet_small": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "uhalonet_base": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    dims, depths, heads, drop_path = MODELS[name]
    model = timm.create_model(name, device="meta")
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
    assert model.num_features == dims[3] * 3 // 2
    cfg = model.pretrained_cfg
    release = "https://github.com/OpenGVLab/STM-Evaluation/releases/download/cls-ckpt"
    assert cfg["url"] == f"{release}/unified_halonet_{name.partition('_')[2]}.pth"
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert cfg["license"] == "mit"


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("uhalonet_micro", **{**FAMILIES["uhalonet"].kwargs, "layer_scale": 0.5, **kwargs}).eval()


def test_layer_scale_starts_almost_at_zero():
    block = timm.create_model("uhalonet_micro", depths=1).stages[0].blocks[0]
    assert float(block.ls1.gamma[0].detach()) == float(block.ls2.gamma[0].detach()) == pytest.approx(1e-6)


def test_options():
    x = torch.randn(2, 3, 96, 64)
    assert small(global_pool="catavgmax").head_hidden_size == 2 * 96
    assert small(global_pool="", num_classes=0)(x).shape == (2, 96, 3, 2)
    even = small(dims=16, num_heads=2).forward_intermediates(x, intermediates_only=True)
    assert [f.shape[1:] for f in even] == [(16, 24 >> i, 16 >> i) for i in range(4)]


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

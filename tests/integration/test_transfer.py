"""What a user starts from with the weights that the package carries: other classes, channels, sizes, parts."""

from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.utils import freeze
from torch.nn import functional as F

CARRIED = [name for name in timm.list_pretrained("halonet_h*") if get_pretrained_cfg(name).file]
SIZES = [(64, 64), (97, 143), (33, 160)]


@pytest.fixture(scope="module", params=CARRIED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stored(name):
    """The file's tensors, in float32."""
    return {
        key: x.float() if x.is_floating_point() else x for key, x in load_file(get_pretrained_cfg(name).file).items()
    }


@pytest.fixture(scope="module")
def model(name):
    return timm.create_model(name, pretrained=True).eval()


def create(name, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def images(*size, batch=2, channels=3):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_weights_are_carried():
    assert "halonet_h0" in {name.partition(".")[0] for name in CARRIED}
    assert all(Path(get_pretrained_cfg(name).file).is_file() for name in CARRIED)


def test_other_classes(name, stored):
    torch.manual_seed(0)
    model = create(name, num_classes=7)
    state = model.state_dict()
    assert set(state) == set(stored)
    changed = [key for key, x in stored.items() if not torch.equal(state[key], x.to(state[key].dtype))]
    assert sorted(changed) == ["head.fc.bias", "head.fc.weight"]
    assert state["head.fc.weight"].shape == (7, model.num_features)
    assert model(images(64, 64)).shape == (2, 7) and model.num_classes == 7


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grey_images(name, model, size):
    """A sum over the first convolution's channels: what it was for photos whose three channels are equal."""
    grey = images(*size, channels=1)
    with torch.inference_mode():
        # weights are summed in the file's float16
        out, expected = create(name, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(out, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_more_channels(name, model):
    """Repeated weights at half their size: what it was for an image twice."""
    x = images(64, 64)
    with torch.inference_mode():
        close(create(name, in_chans=6)(torch.cat([x, x], 1)), model(x))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features(name, model, size):
    x = images(*size)
    extractor = create(name, features_only=True)
    with torch.inference_mode():
        features = extractor(x)
        last, expected = model.forward_intermediates(x)
        close(model.forward_head(last), model(x))
    assert [f.shape[1] for f in features] == extractor.feature_info.channels()
    for feature, e, reduction in zip(features, expected, extractor.feature_info.reduction(), strict=True):
        assert feature.shape[2:] == tuple(-(-n // reduction) for n in size)
        close(feature, e)


def test_some_features(name, model):
    x = images(97, 143)
    with torch.inference_mode():
        features = create(name, features_only=True, out_indices=(2, -1))(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
    for feature, e in zip(features, (expected[2], expected[-1]), strict=True):
        close(feature, e)


def test_without_classifier(name, model):
    x = images(97, 143)
    with torch.inference_mode():
        maps = model.forward_features(x)
        expected = model.forward_head(maps, pre_logits=True)
        close(create(name, num_classes=0)(x), expected)
        close(create(name, num_classes=0, global_pool="")(x), maps)
        close(maps.mean((2, 3)), expected)
        again = create(name)
        again.reset_classifier(0)
        close(again(x), expected)
        again.reset_classifier(3, "max")
        close(again(x), F.linear(maps.amax((2, 3)), again.head.fc.weight, again.head.fc.bias))
    assert again.num_classes == 3 and again.get_classifier() is again.head.fc


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_other_sizes_by_every_backend(model, size, monkeypatch):
    x = images(*size)
    outputs = {}
    for backend in ("reference", "blocked", ""):
        monkeypatch.setenv("TIMM_HALONET_BACKEND", backend)
        with torch.inference_mode():
            outputs[backend] = model(x)
    assert outputs[""].shape == (2, model.num_classes)
    close(outputs["blocked"], outputs["reference"])
    close(outputs[""], outputs["reference"])  # the machine's own choice


def test_regularisation_is_off_in_eval(name, model):
    x = images(64, 64, batch=4)
    regularised = create(name, drop_path_rate=0.5, drop_rate=0.5)
    with torch.inference_mode():
        assert torch.equal(regularised(x), model(x))
        torch.manual_seed(0)
        regularised.train()
        assert not torch.allclose(regularised(x), regularised(x), atol=1e-3)


def test_finer_maps(name, model):
    """output_stride=16: the same weights, four times as many pixels in the last stage."""
    x = images(64, 64)
    finer = create(name, output_stride=16)
    assert all(torch.equal(a, b) for a, b in zip(finer.state_dict().values(), model.state_dict().values(), strict=True))
    assert finer.forward_features(x).shape[2:] == (4, 4) and model.forward_features(x).shape[2:] == (2, 2)
    with torch.inference_mode():
        ours, theirs = (m.forward_intermediates(x, intermediates_only=True) for m in (finer, model))
    for a, b in zip(ours[:4], theirs, strict=False):
        close(a, b)


def test_training_the_classifier_alone(name, model):
    tuned = create(name, num_classes=7)
    freeze(tuned, [child for child, _ in tuned.named_children() if child != "head"])
    tuned.train()
    x, labels = images(64, 64), torch.tensor([1, 5])
    optimizer = create_optimizer_v2(tuned, opt="adamw", lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(tuned(x), labels))
        losses[-1].backward()
        optimizer.step()
    assert all(after < before for before, after in pairwise(losses))
    with torch.inference_mode():
        close(tuned.forward_features(x), model.forward_features(x))  # nothing else moved, statistics included


def test_layers_near_the_image_learn_less(name):
    tuned = create(name, num_classes=7)
    groups = create_optimizer_v2(tuned, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.8).param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    scale = {key: group_of[id(p)]["lr_scale"] for key, p in tuned.named_parameters()}
    assert scale["head.fc.weight"] == 1.0 and scale["stem.conv1.conv.weight"] == min(scale.values()) < 0.1
    depth = [scale[f"stages.{i}.0.conv1_1x1.conv.weight"] for i in range(4)]
    assert depth == sorted(set(depth))
    tables = [p for key, p in tuned.named_parameters() if key.endswith(("height_rel", "width_rel"))]
    assert tables and {group_of[id(p)]["weight_decay"] for p in tables} == {0.0}


def test_another_shape_is_refused(name):
    with pytest.raises(RuntimeError, match=r"size mismatch for stages.0.0.self_attn.pos_embed.height_rel"):
        create(name, halo_size=1)

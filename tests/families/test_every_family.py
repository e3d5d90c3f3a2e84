"""What holds for every family: sizes, gradients, groups of the optimizer, features, exports, precisions, refusals."""

import copy
import re

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.export import Dim

from timm_halonet.families.eamlp.eamlp import EAMLP
from timm_halonet.families.focal.focal import FocalTransformer
from timm_halonet.layers import HaloAttention
from timm_halonet.models._pyramid import PyramidNet
from timm_halonet.registry import image_sizes, listing, multiply_adds

from ..support.families import ARCHITECTURES, FAMILIES, Family, small

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_any_size = {name: family for name, family in FAMILIES.items() if family.fixed_size is None}
exportable = {name: family for name, family in FAMILIES.items() if family.dynamic_export}


def images(family: Family, *size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Of this size, or of the only one that the family takes."""
    return torch.randn(batch, 3, *(family.fixed_size or size), generator=torch.Generator().manual_seed(seed))


def gradients(run, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = run(x)
    out.float().square().mean().backward() if out.dtype.itemsize == 2 else out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def own_head(family: Family) -> bool:
    """Whether the family's classifier and features are not timm's code."""
    return issubclass(family.model_class, PyramidNet | EAMLP)


# ---- the real architectures ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    parameters, image_size, _ = ARCHITECTURES[name]
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert model.num_classes == 1000
    assert model.pretrained_cfg["input_size"] == (3, image_size, image_size)


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name, counts in ARCHITECTURES.items() if counts[2]])
def test_multiply_adds(name):
    _, image_size, macs = ARCHITECTURES[name]
    model = timm.create_model(name, device="meta").eval()
    assert multiply_adds(model, image_size) / 1e9 == pytest.approx(macs, abs=0.005)


@every_family
def test_small_model_has_the_architectures_names(family):
    options = {name: value for name, value in family.kwargs.items() if name in ("rel_pos", "padding")}
    model, real = small(family), timm.create_model(family.architecture, device="meta", **options)
    assert type(model) is type(real) is family.model_class
    assert [name for name in model.state_dict() if name not in real.state_dict()] == []


@pytest.mark.integration
def test_listing():
    rows = {row["model"]: row for row in listing()}
    found = [(name, row["parameters"], row["image_size"]) for name, row in rows.items()]
    assert found == [(name, parameters, size) for name, (parameters, size, _) in ARCHITECTURES.items()]
    for name in (name for name in rows if not name.startswith("halonet_h")):
        assert rows[name]["weights"] == ("stm_in1k (download)" if name.startswith("uhalonet_") else "-")


def test_every_architecture_is_registered():
    assert image_sizes() == {name: size for name, (_, size, _) in ARCHITECTURES.items()}
    ours = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm_halonet.")]
    assert set(ours) == set(ARCHITECTURES)
    others = [name for name in ours if not name.startswith("halonet_h")]  # these get checkpoints from time to time
    with_weights = [name for name in timm.list_pretrained() if name.partition(".")[0] in others]
    assert sorted(with_weights) == sorted(f"{name}.stm_in1k" for name in others if name.startswith("uhalonet_"))


# ---- sizes, features, head ----


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (33, 130), (7, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("family", of_any_size.values(), ids=of_any_size)
def test_any_size(family, size):
    model, x = small(family), images(family, *size)
    with torch.inference_mode():
        features = model.forward_intermediates(x, intermediates_only=True)
        out = model(x)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), out)
    expected = [(2, channels, -(-size[0] // step), -(-size[1] // step)) for channels, step in family.features]
    assert [tuple(feature.shape) for feature in features] == expected
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == list(family.features)
    assert out.shape == (2, 10) and torch.isfinite(out).all() and out.std() > 0


@every_family
def test_features(family):
    model, x = small(family), images(family, 64, 40)
    last = len(family.features) - 1
    expected = model.forward_intermediates(x, indices=[0, last], intermediates_only=True)
    whole, maps = model.forward_intermediates(x, indices=[0, last])
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(whole, model.forward_features(x))
    one = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    torch.testing.assert_close(one, expected[:1])
    features = small(family, features_only=True, out_indices=(0, last))
    torch.testing.assert_close(features(x), expected)
    chosen = [family.features[0], family.features[last]]
    assert list(zip(features.feature_info.channels(), features.feature_info.reduction(), strict=True)) == chosen


@every_family
def test_pruning(family):
    model, x = small(family), images(family, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    out, features = model.forward_intermediates(x, indices=[0, 2])
    torch.testing.assert_close(features, expected)
    assert sum(p.numel() for p in model.parameters()) < before
    if isinstance(model, PyramidNet):
        torch.testing.assert_close(out, expected[1])
        assert len(model.stages) == 3 and model.num_features == model.head_hidden_size == family.features[2][0]
        model.reset_classifier(4, "avg")
        assert model(x).shape == (2, 4)


@every_family
def test_classes_and_channels(family):
    x = images(family, 64, 48)
    model = small(family)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
    torch.testing.assert_close(small(family, num_classes=0)(x), pooled)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == pooled.shape and isinstance(model.get_classifier(), nn.Identity)
    grey = small(family, in_chans=1)
    assert grey(x[:, :1]).shape == (2, 10)
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\).*\(2, 3, "):
        grey(x)
    if "img_size" not in family.kwargs:
        torch.testing.assert_close(small(family, img_size=96)(x), small(family)(x))


@every_family
def test_options(family):
    base = small(family)(images(family, 96, 130))
    for kwargs in family.options:
        out = small(family, **kwargs)(images(family, 96, 130))
        assert out.shape == base.shape
        assert error(out, base) > 1e-3, kwargs


@every_family
def test_rates(family):
    x = images(family, 64, 64)
    model = small(family, drop_path_rate=0.4)
    rates = sorted({round(m.drop_prob, 4) for m in model.modules() if isinstance(m, DropPath) and m.drop_prob})
    assert rates == pytest.approx([0.4 * i / (family.blocks - 1) for i in range(1, family.blocks)], abs=1e-4)
    torch.testing.assert_close(model(x), small(family)(x))  # off in eval mode
    for m in model.modules():
        m.training = isinstance(m, DropPath)
    torch.manual_seed(0)
    assert error(model(x), small(family)(x)) > 1e-3
    model = small(family, drop_rate=0.5)
    pooled = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(pooled), small(family)(x))
    model.train()
    assert not torch.equal(model.forward_head(pooled), model.forward_head(pooled))
    if own_head(family):
        for training in (True, False):
            model.train(training).reset_classifier(3)
            assert all(m.training == training for m in model.modules())


# ---- training ----


@pytest.mark.filterwarnings("error")
@every_family
def test_every_parameter_gets_a_gradient(family):
    model = small(family).train().double()
    _, grads = gradients(model, model, images(family, 130, 97, batch=3).double())
    assert all(grad.isfinite().all() for grad in grads.values())
    without = {name for name, grad in grads.items() if not grad.abs().max() > 1e-12}
    assert without == {name for name in grads if re.search(family.no_gradient, name)}


@every_family
def test_grad_checkpointing_changes_nothing(family):
    model, x = small(family).train(), images(family, 64, 64)
    results, runs = [], []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        before = len(runs)
        results.append(gradients(model, model, x))
        results[-1] += (model.forward_intermediates(x, intermediates_only=True),)
        runs[before:] = [len(runs) - before]
    torch.testing.assert_close(results[0], results[1])
    assert runs[1] > 1.25 * runs[0], "nothing was computed again"


@every_family
def test_weight_decay(family):
    model = small(family)
    tables = model.no_weight_decay()
    assert len(tables) == family.num_tables
    assert tables == {name for name, _ in model.named_parameters() if name.endswith(family.tables)}
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and name not in tables), name


@every_family
def test_groups_of_layers(family):
    model = small(family)
    for coarse, number in zip((True, False), family.groups, strict=True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert list(layers) == [name for name, _ in model.named_parameters()]
        order = list(layers.values())  # parameters come from the image to the classifier
        assert order == sorted(order) and set(order) == set(range(number))
        # names that no pattern has end up behind all: the classifier's, and no other's
        assert {name for name, at in layers.items() if at == number - 1} == {
            name for name in layers if name.startswith(("head.", "fc."))
        }
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(family.groups[1])}


# ---- state dicts ----


@every_family
def test_state_dict(family):
    model, x = small(family), images(family, 64, 64)
    other = timm.create_model(family.architecture, **{"num_classes": 10, **family.kwargs}).eval()
    assert error(other(x), model(x)) > 1e-3
    before = {name: value.clone() for name, value in other.state_dict().items()}
    foreign = FAMILIES["eamlp" if family.architecture != "eamlp_7" else "focal"]
    name = next(iter(before))
    broken = {**model.state_dict(), name: torch.full_like(before[name], torch.nan)}
    less = {key: value for key, value in model.state_dict().items() if key != name}
    more = {**model.state_dict(), "extra.weight": torch.zeros(1)}
    for state, kind, message in (
        ({"backbone.a": torch.zeros(1), "b": torch.zeros(1)}, ValueError, "foreign state dict.*none of its 2 tensors"),
        (small(foreign).state_dict(), (ValueError, RuntimeError), "foreign state dict|Missing key"),
        (broken, ValueError, rf"{re.escape(name)}.*{before[name].numel()} values are NaN"),
        (less, RuntimeError, f"Missing key.*{re.escape(name)}"),
        (more, RuntimeError, r"Unexpected key.*extra\.weight"),
        (small(family, num_classes=3).state_dict(), RuntimeError, "size mismatch"),
    ):
        with pytest.raises(kind, match=f"(?s){message}"):
            other.load_state_dict(state)
        if kind is ValueError:
            torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


# ---- refusals ----


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        pytest.param(family, wrong, id=f"{name} {wrong[0]}")
        for name, family in FAMILIES.items()
        for wrong in family.wrong
    ],
)
def test_wrong_arguments(family, wrong):
    kwargs, kind, message = wrong
    with pytest.raises(kind, match=message):
        timm.create_model(family.architecture, device="meta", **{**family.kwargs, **kwargs})


@every_family
def test_wrong_images(family):
    model = small(family)
    calls = [model, model.forward_intermediates] if isinstance(model, PyramidNet) else [model]
    for shape in [(3, 64, 64), (64,), (0, 3, 64, 64), (1, 3, 0, 64), (1, 4, 64, 64)]:
        for call in calls:
            with pytest.raises(ValueError, match=re.escape(str(shape))):
                call(torch.zeros(shape))
    if own_head(family):
        with pytest.raises(ValueError, match="'NHWC'"):
            model.forward_intermediates(images(family, 16, 16), output_fmt="NHWC")


# ---- half precision ----

slow_on_cpus = pytest.mark.integration


@pytest.mark.parametrize(
    "how",
    ["bfloat16 autocast", "bfloat16", *(pytest.param(f"float16{a}", marks=slow_on_cpus) for a in ("", " autocast"))],
)
@every_family
def test_half_precision(family, how):
    model, x = small(family), images(family, 64, 96)
    dtype = getattr(torch, how.split()[0])
    expected, grads = gradients(model, model, x)
    if how.endswith("autocast"):
        with torch.autocast("cpu", dtype):
            out, half_grads = gradients(model, model, x)
    else:
        half = copy.deepcopy(model).to(dtype)
        out, half_grads = gradients(half, half, x.to(dtype))
    assert out.dtype == dtype
    assert error(out, expected) < 0.05
    flat, half_flat = (torch.cat([g.float().flatten() for g in found.values()]) for found in (grads, half_grads))
    assert error(half_flat, flat) < 0.15


# ---- exports and compilers ----


@pytest.mark.integration
@every_family
def test_scripted_and_traced(family):
    model = small(family).requires_grad_(False)
    scripted, symbolic = torch.jit.script(model), torch.fx.symbolic_trace(model)
    halo = [node for node in symbolic.graph.nodes if node.op == "call_function" and "halo" in node.target.__name__]
    assert len(halo) == sum(isinstance(m, HaloAttention) for m in model.modules())  # each is one call
    for size in [(64, 96), (75, 130)]:
        x = images(family, *size)
        traced = torch.jit.trace(model, x, check_trace=False)
        for other in (scripted, symbolic, traced):
            torch.testing.assert_close(other(x + 1), model(x + 1))


@pytest.mark.integration
@every_family
def test_exported_for_one_size(family):
    model, x = small(family).requires_grad_(False), images(family, 75, 130)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    x = images(family, 75, 130, batch=3, seed=1)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.integration
@pytest.mark.parametrize("family", exportable.values(), ids=exportable)
def test_exported_for_any_size(family, pooling_takes_any_size):
    """The HaloNets: tests/integration/test_export.py; the Focal Transformers: test_focal.py."""
    model = small(family).requires_grad_(False)
    example, *others = family.dynamic_export
    every_dim = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    exported = torch.export.export(model, (images(family, *example),), dynamic_shapes=(every_dim,)).module()
    for size in [*others, *([family.other_export] if family.other_export and pooling_takes_any_size else [])]:
        x = images(family, *size, batch=3)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.integration
@every_family
def test_compiled_training_step(family):
    torch._dynamo.reset()
    model = small(family)  # eval: batch statistics of few pixels would amplify rounding
    dynamic = family.fixed_size is None and not issubclass(family.model_class, FocalTransformer)  # takes minutes there
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(64, 96), (97, 150)]:
        x = images(family, *size)
        torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x), atol=1e-4, rtol=1e-3)

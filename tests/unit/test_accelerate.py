"""accelerate: timm's halo models keep their outputs, gradients, names and objects, and take any size besides."""

import copy
import importlib.util
import io
import os
import pickle
import sys

import pytest
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from PIL import Image
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models.byoanet import halonet_h1
from torch import nn

from timm_halonet import HaloAttention, accelerate

# name: (image size of the weights, layers replaced, layers that stay and fix the size)
MODELS = {
    "halonet26t": (256, 3, 0),
    "halonet50ts": (256, 5, 0),
    "sehalonet33ts": (256, 4, 0),
    "eca_halonext26ts": (256, 3, 0),
    "haloregnetz_b": (224, 5, 0),
    "halo2botnet50ts_256": (256, 5, 1),
    "lamhalobotnet50ts_256": (256, 3, 1),
    "timm's halonet_h1": (256, 19, 0),
}


def build(name="halonet26t", **kwargs):
    torch.manual_seed(0)
    kwargs = {"zero_init_last": False, "num_classes": 10, **kwargs}  # or a block's last norm would hide its attention
    return (halonet_h1(**kwargs) if "'s " in name else timm.create_model(name, **kwargs)).eval()


def halo_layers(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().mean().backward()
    return out.detach(), [x.grad, *(p.grad for p in model.parameters())]


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def same_function(ours, theirs, x):
    (out, grads), (expected, expected_grads) = gradients(ours, x), gradients(theirs, x)
    close(out, expected)
    close(*(torch.cat([g.flatten() for g in some]) for some in (grads, expected_grads)))
    for grad, exact in zip(grads, expected_grads, strict=True):
        close(grad, exact, 1e-4)  # of a single one, a sum over the whole map may nearly cancel


LAYERS = [
    dict(),
    dict(stride=2),
    dict(stride=2, scale_pos_embed=True, qkv_bias=True),
    dict(stride=2, avg_down=True),
    dict(block_size=7, halo_size=2, stride=2, qk_ratio=0.33),  # haloregnetz_b: attends at stride 1 and pools
    dict(block_size=7, halo_size=2),
    dict(dim_head=16, halo_size=2, num_heads=4),
]


@pytest.mark.parametrize("kwargs", LAYERS, ids=str)
def test_a_layer_is_the_same_function(kwargs):
    torch.manual_seed(0)
    theirs = HaloAttn(48, 64, **kwargs)
    ours = accelerate(copy.deepcopy(theirs))
    assert type(ours) is HaloAttention
    b = theirs.block_size
    for size in [(b, b), (2 * b, 3 * b)]:  # with b = 7, an odd map that timm's pooling cuts a row off
        same_function(ours, theirs, torch.randn(2, 48, *size))


@pytest.mark.parametrize("kwargs", LAYERS, ids=str)
def test_other_sizes_are_the_layers_of_this_package(kwargs, monkeypatch):
    torch.manual_seed(0)
    theirs = HaloAttn(48, 64, **kwargs)
    layer = HaloAttention(48, 64, mask_border=False, strided_rel="grid", **kwargs)
    layer.load_state_dict(theirs.state_dict())
    ours = accelerate(theirs)
    # whatever attribute the layer's forward comes to use must be there
    assert vars(layer).keys() <= vars(ours).keys()
    layer.contiguous_output = True  # the only one that is not an argument of the layer
    assert {name: value for name, value in vars(layer).items() if name[0] != "_"}.items() <= vars(ours).items()
    drops_rows = ours.block_size == 7 and "stride" in kwargs  # pools like timm's, which drops an odd map's last row
    for size in [(2, 3) if drops_rows else (1, 1), (18, 11), (9, 30)]:
        x = torch.randn(2, 48, *size)
        monkeypatch.setenv("TIMM_HALONET_BACKEND", "reference")
        expected = layer(x)
        monkeypatch.delenv("TIMM_HALONET_BACKEND")
        close(ours(x), expected[:, :, : size[0] // 2, : size[1] // 2] if drops_rows else expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_its_objects_and_names(name):
    model = build(name)
    size, replaced, fixed = MODELS[name]
    assert model.pretrained_cfg["input_size"][1] == size
    frozen = halo_layers(model, HaloAttn)[0].train().q.weight.requires_grad_(False)
    before = {path: id(x) for path, x in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]}
    modes = {path: module.training for path, module in model.named_modules()}
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    assert len(halo_layers(model, HaloAttn)) == replaced
    assert accelerate(model) is model
    assert len(halo_layers(model, HaloAttention)) == replaced and not halo_layers(model, HaloAttn)
    assert len(halo_layers(model, BottleneckAttn)) == fixed
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, parameters)
    after = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    assert {path: id(x) for path, x in after} == before
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]
    model.load_state_dict(build(name).state_dict())


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("halonet26t", "haloregnetz_b") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_a_model_is_the_same_function(name):
    model, x = build(name), torch.randn(2, 3, MODELS[name][0], MODELS[name][0])
    if "'s " in name:
        # At random weights a few of its activations lie so near the kink of the ReLU that timm's own gradients with one
        # thread and with two are up to 2e-3 apart. Rounding aside, they agree:
        with torch.inference_mode():
            close(accelerate(copy.deepcopy(model))(x), model(x))
        model, x = model.double(), x.double()
    same_function(accelerate(copy.deepcopy(model)), model, x)


@pytest.mark.parametrize("name", MODELS)
def test_other_image_sizes(name):
    model = accelerate(build(name))
    x = torch.randn(1, 3, 37, 70)
    if MODELS[name][2]:  # BottleneckAttn holds tables for one size of the map
        with pytest.raises(AssertionError):
            model(x)
    else:
        out = model(x)
        assert out.shape == (1, 10) and torch.isfinite(out).all()


def test_another_fixed_size():
    """Where BottleneckAttn fixes the size, timm's own argument sets it: 288 px give HaloAttn 18 pixels, not 16."""
    model = build("halo2botnet50ts_256", img_size=288)
    x = torch.randn(1, 3, 288, 288)
    with pytest.raises(AssertionError):
        model(x)
    assert torch.isfinite(accelerate(model)(x)).all()


def test_hooks_and_shared_layers_are_kept():
    attn = HaloAttn(16)
    model = nn.Sequential(attn, nn.ReLU(), attn)
    calls = []
    handle = attn.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    attn.kv.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("kv"))
    accelerate(model)(torch.randn(1, 16, 8, 8)).sum().backward()
    assert calls == [HaloAttention, HaloAttention, "kv", "kv"]
    assert model[0] is model[2] is attn
    handle.remove()
    model(torch.randn(1, 16, 8, 8))
    assert len(calls) == 4


@pytest.mark.parametrize("kwargs", LAYERS, ids=str)
@pytest.mark.parametrize("how", ["eager", "scripted", "compiled", "no gradients"])
def test_outputs_have_the_memory_format_of_timms(kwargs, how):
    """Contiguous for both formats of the input, so that views of it that timm's layer allows are allowed."""
    torch.manual_seed(0)
    theirs = HaloAttn(48, 64, **kwargs)
    ours = accelerate(copy.deepcopy(theirs))
    if how == "scripted":
        ours = torch.jit.script(ours)
    elif how == "compiled":
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    b = theirs.block_size
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 48, b, 2 * b).contiguous(memory_format=memory_format)
        with torch.set_grad_enabled(how != "no gradients"):
            expected, out = theirs(x), ours(x)
        assert out.stride() == expected.stride() and out.is_contiguous()
        close(out.view(2, -1), expected.view(2, -1))
    if how == "eager":  # this package's own layer stays in channels_last
        layer = HaloAttention(48, 64, **kwargs)
        assert layer(x).is_contiguous(memory_format=torch.channels_last) and not layer(x).is_contiguous()


def test_idempotent():
    model = accelerate(build())
    attributes = [dict(vars(module)) for module in halo_layers(model, HaloAttention)]
    assert accelerate(model) is model
    assert [dict(vars(module)) for module in halo_layers(model, HaloAttention)] == attributes
    ours = timm.create_model("halonet_h0", depths=(1, 1, 1, 1))  # this package's own has nothing to replace
    assert accelerate(ours) is ours and halo_layers(ours, HaloAttention)[0].mask_border


class Subclass(HaloAttn):
    pass


def with_forward(attn):
    attn.forward = lambda x: x
    return attn


def with_tables(attn):
    attn.pos_embed = nn.Identity()
    return attn


def with_hook(attn):
    attn.pos_embed.register_forward_hook(print)
    return attn


REFUSED = [
    (lambda: nn.Conv2d(3, 3, 1), "Conv2d contains no HaloAttn"),
    (lambda: timm.create_model("resnet18"), "ResNet contains no HaloAttn"),
    (lambda: nn.Sequential(HaloAttn(16), Subclass(16)), r"^1 \(Subclass\) cannot be .*test_accelerate.Subclass"),
    (lambda: Subclass(16), r"^the model itself \(Subclass\)"),
    (lambda: nn.Sequential(HaloAttn(16), with_forward(HaloAttn(16))), r"^1 \(HaloAttn\).*forward of its own"),
    (lambda: nn.ModuleDict({"a": with_tables(HaloAttn(16))}), r"^a \(HaloAttn\).*pos_embed is a torch.*Identity"),
    (lambda: with_hook(HaloAttn(16)), "hooks on its pos_embed would never run"),
    (lambda: torch.compile(nn.Sequential(HaloAttn(16))), "OptimizedModule.*accelerate the model first"),
    (lambda: nn.Sequential(HaloAttn(16), torch.compile(nn.ReLU())), r"^1 \(OptimizedModule\) is compiled already"),
    (lambda: torch.jit.script(nn.Sequential(HaloAttn(16))), "TorchScript module: accelerate the model before"),
    (lambda: HaloAttn, "takes a torch.nn.Module, got type"),
    (lambda: None, "got NoneType"),
    (lambda: "halonet26t", "got str"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_known_is_refused_and_left_alone(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    if isinstance(model, nn.Module):
        assert not halo_layers(model, HaloAttention)


def test_module_compiled_in_place_is_refused():
    model = nn.Sequential(HaloAttn(16))
    model.compile()
    with pytest.raises(ValueError, match=r"the model itself \(Sequential\) is compiled already"):
        accelerate(model)


def test_a_changed_class_is_refused(monkeypatch):
    def forward(self, x):
        return x

    monkeypatch.setattr(HaloAttn, "forward", forward)
    with pytest.raises(ValueError, match="forward of its own"):
        accelerate(HaloAttn(16))


# ---- what users do with a model ----


def layer_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), HaloAttn(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_copies_pickles_and_files():
    model, x = accelerate(layer_model()), torch.randn(1, 3, 37, 30)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert halo_layers(copied, HaloAttention)
        assert torch.equal(copied(x), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(half):
    model, x = layer_model(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    model = accelerate(model.to(half))
    close(model(x.to(half)).float(), expected, 0.02)
    close(model.double()(x.double()).float(), expected, 0.02)


def test_meta_device():
    with torch.device("meta"):
        model = accelerate(build("halonet50ts"))
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(1, 3, 50, 70, device="meta")).shape == (1, 10)


@pytest.mark.integration
def test_compiled_and_scripted_afterwards():
    torch._dynamo.reset()
    model = accelerate(layer_model())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    scripted = torch.jit.script(model)
    for size in [(32, 32), (37, 30)]:
        x = torch.randn(2, 3, *size)
        out, grads = gradients(model, x)
        close(scripted(x), out)
        compiled_out, compiled_grads = gradients(compiled, x)
        close(compiled_out, out)
        for grad, expected in zip(compiled_grads, grads, strict=True):
            close(grad, expected, 1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_features_only(when):
    model = build(features_only=True, out_indices=(2, 4))
    x = torch.randn(1, 3, 256, 256)
    expected = [feature.clone() for feature in model(x)]
    model = accelerate(model) if when == "before" else accelerate(copy.deepcopy(model))
    for feature, theirs in zip(model(x), expected, strict=True):
        close(feature, theirs)
    assert [f.shape[1:] for f in model(torch.randn(1, 3, 70, 50))] == [(512, 9, 7), (2048, 3, 2)]
    whole = accelerate(build())
    intermediates = whole.forward_intermediates(x, indices=(2, 4), intermediates_only=True)
    for feature, theirs in zip(intermediates, expected, strict=True):
        close(feature, theirs)


# ---- one line before timm's loops ----


def train(model, steps, ema=None, optimizer=None):
    """A training loop as timm's train.py has it, on noise; the losses, and logits of the moving average."""
    generator = torch.Generator().manual_seed(1)
    loss_fn = timm.loss.LabelSmoothingCrossEntropy(0.1)
    optimizer = optimizer or timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.02)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=steps, warmup_epochs=2, warmup_lr=1e-5)
    scaler = timm.utils.NativeScaler(device="cpu")
    ema = ema or timm.utils.ModelEmaV3(model, decay=0.5)
    model.train()
    losses = timm.utils.AverageMeter()
    history = []
    for step in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=generator)
        target = torch.randint(32, (4,), generator=generator)
        loss = loss_fn(model(x), target)
        scaler(loss, optimizer, clip_grad=1.0, parameters=timm.models.model_parameters(model))
        optimizer.zero_grad()
        ema.update(model, step=step)
        losses.update(loss.item(), x.size(0))
        scheduler.step(step + 1)
        history.append(losses.avg)
    ema.module.eval()
    with torch.inference_mode():
        return torch.tensor(history), ema.module(torch.ones(2, 3, 32, 32))


def test_one_line_before_a_training_loop():
    expected, expected_logits = train(layer_model(), 6)
    losses, logits = train(accelerate(layer_model()), 6)
    close(losses, expected)
    close(logits, expected_logits, 1e-4)
    assert losses[-1] != losses[0]


def test_optimizer_and_moving_average_from_before():
    model = layer_model()
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.02)
    expected, expected_logits = train(layer_model(), 4)
    losses, logits = train(accelerate(model), 4, ema, optimizer)
    assert halo_layers(ema.module, HaloAttn)  # still timm's, with the accelerated model's averages
    close(losses, expected)
    close(logits, expected_logits, 1e-4)


def test_timms_own_scripts(tmp_path, monkeypatch):
    """train.py and validate.py unmodified but for the model: TIMM_HALONET_SCRIPTS names their folder."""
    folder = os.environ.get("TIMM_HALONET_SCRIPTS")
    if not folder:
        pytest.skip("set TIMM_HALONET_SCRIPTS to the folder of timm's train.py and validate.py")
    for split in ("train", "val"):
        for i in range(8):
            path = tmp_path / "data" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            Image.fromarray(pixels.numpy()).save(path)
    common = f"--model halonet26t --num-classes 2 --batch-size 4 --workers 0 --device cpu --data-dir {tmp_path}/data"
    schedule = "--epochs 1 --warmup-epochs 0 --hflip 0 --no-aug --seed 3 --model-ema --experiment x"

    def run(script, arguments, change):
        spec = importlib.util.spec_from_file_location(script, os.path.join(folder, f"{script}.py"))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
        spec.loader.exec_module(module)
        create = module.create_model
        module.create_model = lambda *args, **kwargs: change(create(*args, **kwargs))
        module.main()

    results = []
    for change in (lambda model: model, accelerate):
        out = tmp_path / change.__name__
        run("train", f"{common} {schedule} --output {out}", change)
        results.append(torch.load(out / "x" / "last.pth.tar", weights_only=False)["state_dict_ema"])
        run("validate", f"{common} --split val --checkpoint {out}/x/last.pth.tar --results-file {out}.csv", change)
    theirs, ours = results
    assert list(theirs) == list(ours)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)

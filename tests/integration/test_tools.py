"""Tools that look into a model's modules and gradients: what they find and compute is what is there."""

import copy

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn

from timm_halonet import HaloAttention, accelerate
from timm_halonet.families.maast import MapAttentionEncoder

from ..support.families import FAMILIES, fill, small

SMALL = dict(depths=1, base_width=32, stem_chs=16, zero_init_last=False, num_classes=3)


def halonet(**kwargs):
    return fill(timm.create_model("halonet_h0", **SMALL, **kwargs), (".height_rel", ".width_rel"))


def close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm() + 1e-7


# ---- Opacus, functorch: the gradient of every sample ----


def loss(out):
    return out.square().flatten(1).sum(1)


def of_each_sample(model, x):
    """Their gradients one by one, the definition."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1])).sum(), parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
    return {name: torch.stack(some) for name, *some in zip(names, *rows, strict=True)}


def with_tail(layer):
    return nn.Sequential(nn.Conv2d(3, 32, 1), layer, nn.Conv2d(layer.num_heads * layer.dim_head_v, 4, 1, stride=2))


PRIVATE = {
    "halonet": lambda: halonet(norm_layer="groupnorm1"),
    "halonet, timm's function": lambda: halonet(norm_layer="groupnorm1", mask_border=False, strided_rel="grid"),
    "layer": lambda: with_tail(HaloAttention(32, num_heads=2, qkv_bias=True)),
    "layer, stride 2": lambda: with_tail(HaloAttention(32, 64, stride=2, num_heads=2)),
    "layer, pooled": lambda: with_tail(HaloAttention(32, 64, stride=2, avg_down=True, num_heads=2)),
    "accelerated": lambda: accelerate(with_tail(HaloAttn(32, num_heads=2))),
    "focal": lambda: small(FAMILIES["focal"]),
    "focal, conv": lambda: small(FAMILIES["focal, conv"]),
    "eamlp": lambda: small(FAMILIES["eamlp"]),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_opacus(name):
    pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(0)
    model, x = PRIVATE[name]().train(), torch.randn(3, 3, 32, 32)
    expected = of_each_sample(model, x)
    loss(GradSampleModule(model, loss_reduction="sum")(x)).sum().backward()
    scale = max(x.norm() for x in expected.values())
    for parameter, p in model.named_parameters():
        assert p.grad_sample is not None, parameter
        error = (p.grad_sample - expected[parameter]).norm()
        assert error <= 1e-4 * expected[parameter].norm() + 1e-6 * scale, parameter  # some are nothing but rounding


@pytest.mark.parametrize("name", ["lesa", "uhalonet"])
def test_opacus_refuses_batch_norm_in_words(name):
    pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule

    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(small(FAMILIES[name]).train())


def test_an_opacus_model_of_one_batch_trains():
    """The whole engine: a step with clipped and noised gradients moves every table."""
    pytest.importorskip("opacus")
    from opacus import PrivacyEngine

    model = halonet(norm_layer="groupnorm1").train()
    tables = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("_rel")}
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for images, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    moved = [name for name, p in model._module.named_parameters() if name in tables and not p.equal(tables[name])]
    assert moved == list(tables)


def test_functorch():
    """Refused with the way out, and right on it."""
    model, x = halonet(norm_layer="groupnorm1"), torch.randn(3, 3, 32, 32)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(model, parameters, image):
        return loss(torch.func.functional_call(model, parameters, (image[None],))).sum()

    def every(model):
        return torch.func.vmap(torch.func.grad(lambda p, image: one(model, p, image)), in_dims=(None, 0))(parameters, x)

    with pytest.raises(RuntimeError, match=r"backend='reference'.*use_backend\('reference'\)"):
        every(model)
    expected, actual = of_each_sample(model, x), every(halonet(norm_layer="groupnorm1", backend="reference"))
    for name in parameters:
        close(actual[name], expected[name])


# ---- offloading, sharding ----


class MapEncoder(nn.Module):
    """MaAST's encoder for the images that the other models get."""

    def __init__(self):
        super().__init__()
        self.encoder = MapAttentionEncoder("halo", num_classes=5, dim=16, num_heads=2, hidden=8, out_dim=4)

    def forward(self, x):
        return self.encoder((x[:, 0].abs() * 2).long().clamp(max=5))


MODULAR = {name: (lambda family=family: small(family)) for name, family in FAMILIES.items()}
MODULAR["maast"] = lambda: MapEncoder().eval()
MODULAR["accelerated"] = lambda: accelerate(nn.Sequential(nn.Conv2d(3, 32, 1), HaloAttn(32, num_heads=2))).eval()
every_model = pytest.mark.parametrize("name", MODULAR)


def own(module):
    return list(module.parameters(recurse=False))


@every_model
def test_parameters_are_read_in_their_modules_forward(name):
    """A manager fetches them before it and frees them behind it; anything read elsewhere is garbage."""
    torch.manual_seed(0)
    model, x = MODULAR[name](), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)

        def fetch(module, args):
            for p, value in zip(own(module), kept[module], strict=True):
                p.copy_(value)

        def free(module, args, output):
            for p in own(module):
                p.fill_(float("nan"))

        kept = {module: [p.clone() for p in own(module)] for module in model.modules() if own(module)}
        for module in kept:
            free(module, None, None)
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(free)
        torch.testing.assert_close(model(x), expected)


@every_model
@pytest.mark.parametrize("how", ["offloaded", "on disk"])
def test_accelerate_library(name, how, tmp_path):
    hf = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, x = MODULAR[name](), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        if how == "offloaded":
            model = hf.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model = hf.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(x), expected)


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["halonet", "hybrid", "uhalonet", "lesa", "lesa, two tables", "accelerated", "maast"])
def test_fsdp2_of_every_module(name, one_process):
    """Sharded module by module, with parameters freed behind each forward: outputs and gradients stay the same."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, x = MODULAR[name](), torch.randn(2, 3, 64, 64)
    ours = copy.deepcopy(model)
    model(x).square().sum().backward()
    for module in reversed(list(ours.modules())):  # from the inside out
        if module is not ours and own(module):
            fully_shard(module, mesh=one_process, reshard_after_forward=True)
    fully_shard(ours, mesh=one_process)
    out = ours(x)
    torch.testing.assert_close(out, model(x))
    out.square().sum().backward()
    for p, q in zip(ours.parameters(), model.parameters(), strict=True):
        close(p.grad.full_tensor(), q.grad)

"""What `timm-halonet bench` measures: the cases, and who competes in each. `run.py` takes the time."""

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models import byoanet
from timm.utils import reparameterize_model
from torch import nn

from .. import accelerate
from ..layers import HaloAttention
from ..ops import BACKENDS, backend_for, halo_attention, use_backend
from .case import Case, Config, Skip, Step, Subject, dtype_name
from .peers import PeerLayer, PeerOp, TimmOp, flex_attend, sdpa_attend
from .roofline import bound

# stages 1 to 3 of halonet_h1 at 256 px: side of the map, channels, heads
STAGES = ((64, 64, 4), (32, 128, 8), (16, 256, 8))
BLOCK, HALO = 8, 3
# timm's halo models that have ImageNet weights, and the side of their images in pixels
TIMM_MODELS = {
    "halonet26t": 256,
    "halonet50ts": 256,
    "sehalonet33ts": 256,
    "eca_halonext26ts": 256,
    "haloregnetz_b": 224,
    "halo2botnet50ts_256": 256,
    "lamhalobotnet50ts_256": 256,
}
AS_TIMM: dict[str, Any] = dict(mask_border=False, strided_rel="grid")
# largest difference from the baseline, as a part of its largest value; twice that for a whole halonet_h1, where batch
# norm over eight images of noise makes roundings grow
AGREE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


def build_cases(config: Config) -> list[Case]:
    """All cases of a device, the important ones first."""
    cases = [*layer_cases(config), *bfloat16_cases(config), *memory_cases(config), *small_cases(config)]
    if config.device == "cuda":
        cases += op_cases(config)
    return [*cases, *model_cases(config), *reparam_cases(config), *accelerate_cases(config)]


# ---- steps -------------------------------------------------------------------------------------------------------


def check_backend(name: str, device: str, dtype: torch.dtype) -> None:
    """Check that a backend runs in this dtype on this device.

    Raises:
        Skip: it does not; with its own reason.
    """
    try:
        backend_for(torch.empty(0, device=device, dtype=dtype), name)
    except ValueError as e:
        raise Skip(str(e)) from None


def attention_step(module: nn.Module, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, training: bool) -> Step:
    """One forward, or forward and backward from `grad`, of a layer or an op.

    The step returns the output, and in training the gradients of the inputs and of the two tables too.
    """
    leaves = [*inputs, *module.parameters()]
    tables = [p for name, p in module.named_parameters() if name.endswith(("height_rel", "width_rel"))]

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (module(*inputs),)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        out = module(*inputs)
        out.backward(grad)
        return tuple(x for x in (out.detach(), *(leaf.grad for leaf in [*inputs, *tables])) if x is not None)

    if not training:
        return forward
    for x in inputs:
        x.requires_grad_()
    return forward_backward


def model_step(
    make: Callable[[], nn.Module],
    config: Config,
    dtype: torch.dtype,
    training: bool,
    size: int,
    compiled: bool,
    batch: int,
    mode: str | None = None,
) -> Step:
    """Inference in `dtype`, or a step of SGD under autocast to it, on images of noise; returns the logits."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(config.device, memory_format=layout)
    labels = torch.randint(1000, (batch,), generator=generator).to(config.device)
    torch.manual_seed(0)  # the same weights for all that initialise alike
    model = make().to(config.device, memory_format=layout)  # type: ignore[call-overload]
    model = model.train(training)
    run = torch.compile(model, dynamic=False, disable=config.tiny, mode=mode) if compiled else model
    if not training:
        model.to(dtype)
        images = images.to(dtype)

        def infer() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (run(images),)

        return infer
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train() -> tuple[torch.Tensor, ...]:
        optimizer.zero_grad()
        with torch.autocast(config.device, dtype, enabled=dtype != torch.float32):
            logits = run(images)
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return (logits.detach(),)

    return train


# ---- layers ------------------------------------------------------------------------------------------------------


class _Forced(nn.Module):
    def __init__(self, module: nn.Module, backend: str):
        super().__init__()
        self.module, self.backend = module, backend

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        with use_backend(self.backend):
            return self.module(*inputs)


def timm_layer(ours: HaloAttention, dim: int, heads: int) -> nn.Module:
    """timm's layer with the parameters of ours."""
    theirs = HaloAttn(dim, num_heads=heads, dim_head=ours.dim_head_qk, block_size=BLOCK, halo_size=HALO)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def layer_subjects(config: Config, side: int, dim: int, heads: int, dtype: torch.dtype, training: bool):
    """This package's backends and the peers; timm's eager layer first."""

    def build(batch: int, make=lambda ours: ours, backend=None, compiled=False, layout=torch.channels_last) -> Step:
        if backend is not None:
            check_backend(backend, config.device, dtype)
        torch.manual_seed(0)
        ours = HaloAttention(dim, num_heads=heads, dim_head=dim // heads, block_size=BLOCK, halo_size=HALO, **AS_TIMM)
        x, grad = (torch.randn(batch, dim, side, side) for _ in range(2))
        module = make(ours).to(config.device, dtype)
        x, grad = (t.to(config.device, dtype, memory_format=layout) for t in (x, grad))
        if backend is not None:
            module = _Forced(module, backend)
        if compiled:
            module = torch.compile(module, dynamic=False, disable=config.tiny)
        return attention_step(module, (x,), grad, training)

    # each in the memory format that it has inside its own model: timm's layers come out contiguous
    timms: dict[str, Any] = dict(make=lambda ours: timm_layer(ours, dim, heads), layout=torch.contiguous_format)
    sdpa: dict[str, Any] = dict(make=lambda ours: PeerLayer(ours, sdpa_attend))
    subjects = [Subject("timm eager", functools.partial(build, **timms)), Subject("default", build)]
    subjects += [Subject(name, functools.partial(build, backend=name)) for name in BACKENDS]
    subjects.append(Subject("gather + sdpa", functools.partial(build, **sdpa)))
    if config.compiles(dtype):
        flex: dict[str, Any] = dict(make=lambda ours: PeerLayer(ours, flex_attend))
        for name, arguments in (("timm", timms), ("default", {}), ("gather + sdpa", sdpa), ("flex", flex)):
            how = functools.partial(build, compiled=True, **arguments)
            subjects.append(Subject(f"{name} compiled", how, compiled=True))
    return tuple(subjects)


def layer_cases(config: Config) -> list[Case]:
    """The attention layer of each stage and dtype, forward alone and with its gradients."""
    cases = []
    for dtype in config.dtypes[:1] if config.quick else config.dtypes:
        for side, dim, heads in STAGES:
            for mode in ("forward", "training"):
                subjects = layer_subjects(config, side, dim, heads, dtype, mode == "training")
                name = f"layer/{side}x{side}/{dtype_name(dtype)}/{mode}"
                seconds = 2 if config.quick else 6
                cases.append(Case(name, subjects, "timm eager", seconds, AGREE[dtype]))
    return cases


def bfloat16_cases(config: Config) -> list[Case]:
    """Training in bfloat16 against float32: this package's layer at each stage, and halonet_h1 under autocast."""
    cases = []
    dtypes = (torch.float32, torch.bfloat16)
    if not set(dtypes) <= set(config.dtypes):
        return []
    for side, dim, heads in STAGES:
        ours = [layer_subjects(config, side, dim, heads, dtype, True)[1].build for dtype in dtypes]
        subjects = tuple(Subject(dtype_name(dtype), build) for dtype, build in zip(dtypes, ours, strict=True))
        seconds = 2 if config.quick else 4
        cases.append(Case(f"bfloat16/layer/{side}x{side}", subjects, "float32", seconds, AGREE[torch.bfloat16]))
    subjects = tuple(
        Subject(
            dtype_name(dtype), functools.partial(model_step, h1_as_timm, config, dtype, True, 256, False), same=False
        )
        for dtype in dtypes
    )
    return [*cases, Case("bfloat16/model", subjects, "float32", 6 if config.quick else 15)]


def memory_cases(config: Config) -> list[Case]:
    """Peak extra memory of one training step."""
    dtype = config.main_dtype
    side, dim, heads = STAGES[0]
    layers = layer_subjects(config, side, dim, heads, dtype, True)
    if config.quick:
        layers = layers[:2]
    models = model_subjects(config, dtype, True)[: 2 if config.quick else 3]
    return [
        Case("memory/layer", tuple(s for s in layers if not s.compiled), "timm eager", 6, quantity="memory"),
        Case("memory/halonet_h1", models, "timm halonet_h1", 15, quantity="memory"),
    ]


# ---- ops ---------------------------------------------------------------------------------------------------------


def small_cases(config: Config) -> list[Case]:
    """Maps smaller than a block against plain attention over their pixels, dimensions of stage 4 of halonet_h1."""
    dtype, heads, dim = config.main_dtype, 8, 64
    options: dict[str, Any] = dict(block_size=BLOCK, halo_size=HALO)

    def plain(q, k, v, height, width):
        h, w = q.shape[1:3]
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (h, w))

    def build(batch: int, side: int, training: bool, backend: str | None = None, attend=None) -> Step:
        if backend is not None:
            check_backend(backend, config.device, dtype)
        attend = attend or functools.partial(halo_attention, backend=backend, **options)
        module = PeerOp(attend, batch, side, heads, dim, BLOCK, HALO).to(config.device, dtype)
        grad = torch.randn(batch, side, side, heads, dim).to(config.device, dtype)
        return attention_step(module, (), grad, training)

    cases = []
    for side in (4, 8, 3, 7):
        for mode in ("forward", "training"):
            how = functools.partial(build, side=side, training=mode == "training")
            subjects = [
                Subject("plain attention", functools.partial(how, attend=plain)),
                Subject("default", how, False),
            ]
            backends = [name for name in BACKENDS if name != "reference"]  # it is not about speed, and slow here
            subjects += [Subject(name, functools.partial(how, backend=name), False) for name in backends]
            cases.append(
                Case(f"small/{side}x{side}/{mode}", tuple(subjects), "plain attention", 0.5 if config.quick else 1.5)
            )
    return cases


def op_cases(config: Config) -> list[Case]:
    """The op alone, without projections, compared with what the hardware allows."""
    cases = []
    for dtype in config.dtypes:
        for side, dim, heads in STAGES:
            for mode in ("forward", "training"):
                training = mode == "training"
                name = f"op/{side}x{side}/{dtype_name(dtype)}/{mode}"
                limit = None
                if dtype.itemsize == 2 and torch.cuda.is_available():
                    shape = dict(batch=8, height=side, width=side, heads=heads, dim=dim // heads)
                    device = torch.cuda.get_device_name()
                    limit = bound(
                        device, training=training, block_size=BLOCK, halo_size=HALO, mask_border=False, **shape
                    )
                subjects = op_subjects(config, side, dim // heads, heads, dtype, training)
                cases.append(Case(name, subjects, "timm eager", 4, AGREE[dtype], bound=limit))
    return cases


def op_subjects(config: Config, side: int, dim: int, heads: int, dtype: torch.dtype, training: bool):
    """The op of each backend and its peers on maps of side x side pixels, `dim` channels a head; timm's first."""
    sizes: dict[str, Any] = dict(block_size=BLOCK, halo_size=HALO)

    def build(batch: int, attend=None, backend=None, timms=False, compiled=False) -> Step:
        if backend is not None:
            check_backend(backend, config.device, dtype)
        if training and config.device == "cpu" and getattr(attend, "func", None) is flex_attend:
            raise Skip("FlexAttention has no backward on the CPU")
        attend = attend or functools.partial(halo_attention, backend=backend, **sizes, **AS_TIMM)
        op = PeerOp(attend, batch, side, heads, dim, BLOCK, HALO)
        module: Any = TimmOp(op, BLOCK, HALO) if timms else op
        module.to(config.device, dtype).requires_grad_(training)
        grad = torch.randn((batch, side, side, heads, dim), generator=torch.Generator().manual_seed(1))
        if compiled:
            module = torch.compile(module, dynamic=False, disable=config.tiny)
        return attention_step(module, (), grad.to(config.device, dtype), training)

    sdpa = functools.partial(build, attend=functools.partial(sdpa_attend, **sizes))
    subjects = [Subject("timm eager", functools.partial(build, timms=True)), Subject("default", build)]
    subjects += [Subject(name, functools.partial(build, backend=name)) for name in BACKENDS]
    subjects.append(Subject("gather + sdpa", sdpa))
    if config.compiles(dtype):
        flex = functools.partial(build, attend=functools.partial(flex_attend, **sizes))
        peers: dict[str, Callable[..., Step]] = {"timm": functools.partial(build, timms=True), "default": build}
        peers |= {"gather + sdpa": sdpa, "flex": flex}
        for name, how in peers.items():
            subjects.append(Subject(f"{name} compiled", functools.partial(how, compiled=True), compiled=True))
    return tuple(subjects)


# ---- models ------------------------------------------------------------------------------------------------------


def create(name: str) -> nn.Module:
    """A model whose blocks count from the start: zeros, the usual start, would hide what attention computes."""
    return timm.create_model(name, zero_init_last=False)


def without_norms(name: str) -> nn.Module:
    """A model as timm's `--reparam` makes it for inference."""
    return reparameterize_model(create(name).eval())


def timm_h1() -> nn.Module:
    """timm's own halonet_h1, without zeros in the last batch norm of each block, so that its attention counts."""
    return byoanet.halonet_h1(zero_init_last=False)


def h1_as_timm() -> nn.Module:
    """This package's halonet_h1 in timm's shape, with the weights that timm's is initialised to under this seed."""
    weights = timm_h1().state_dict()
    model = timm.create_model("halonet_h1", num_heads=8, **AS_TIMM)
    model.load_state_dict(weights)
    return model


def model_subjects(config: Config, dtype: torch.dtype, training: bool) -> tuple[Subject, ...]:
    """Whole models at their own image sizes: halonet_h1 here and in timm, and two ResNets; timm's first."""
    makes: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
        "timm halonet_h1": (timm_h1, 256, True),
        "halonet_h1 as timm's": (h1_as_timm, 256, True),
        "halonet_h1": (functools.partial(create, "halonet_h1"), 256, False),
        "timm halonet_h1 accelerated": (lambda: accelerate(timm_h1()), 256, True),
        "resnet26t": (functools.partial(create, "resnet26t"), 256, False),
        "resnet50@224": (functools.partial(create, "resnet50"), 224, False),
    }
    subjects = []
    for compiled in (False, True) if config.compiles(dtype) else (False,):
        for name, (make, size, same) in makes.items():
            how = functools.partial(model_step, make, config, dtype, training, size, compiled)
            # in training, random weights and batch norm make 0.1 of a change of the images by 1e-6 (timm's model too),
            # so that only inference can show that two models agree
            subjects.append(Subject(name + " compiled" * compiled, how, same and not training, compiled))
    return tuple(subjects)


def model_cases(config: Config) -> list[Case]:
    """Inference and a training step of whole models, in each dtype."""
    cases = []
    for dtype in (config.main_dtype,) if config.quick else config.dtypes:
        for mode in ("inference", "training"):
            subjects = model_subjects(config, dtype, mode == "training")
            seconds = 12 if mode == "inference" else 30
            name = f"model/{dtype_name(dtype)}/{mode}"
            cases.append(Case(name, subjects, "timm halonet_h1", seconds, 2 * AGREE[dtype]))
    return cases


def reparam_cases(config: Config) -> list[Case]:
    """Inference of halonet_h1 as timm's `--reparam` makes it, without batch norms in its blocks."""
    cases = []
    for dtype in (config.main_dtype,) if config.quick else config.dtypes:
        subjects = tuple(
            Subject(name, functools.partial(model_step, make, config, dtype, False, 256, False))
            for name, make in {
                "halonet_h1": functools.partial(create, "halonet_h1"),
                "--reparam": functools.partial(without_norms, "halonet_h1"),
            }.items()
        )
        for batch in (1, 8):
            name = f"reparam/{dtype_name(dtype)}/batch {batch}"
            cases.append(Case(name, subjects, "halonet_h1", 6, 2 * AGREE[dtype], batch))
    return cases


def accelerated(name: str) -> nn.Module:
    """A timm model with random weights, on this package's attention."""
    return accelerate(create(name))


def accelerate_cases(config: Config) -> list[Case]:
    """timm's halo models that have weights, with and without `accelerate`."""
    cases = []
    for name, size in list(TIMM_MODELS.items())[: 1 if config.quick else None]:
        for mode in ("inference", "training"):
            makes = {"timm eager": functools.partial(create, name), "accelerated": functools.partial(accelerated, name)}
            subjects = [
                Subject(
                    subject,
                    functools.partial(model_step, make, config, config.main_dtype, mode == "training", size, False),
                )
                for subject, make in makes.items()
            ]
            seconds = 4 if mode == "inference" else 10
            case = f"accelerate/{name}/{mode}"
            cases.append(Case(case, tuple(subjects), "timm eager", seconds, AGREE[config.main_dtype]))
    return cases

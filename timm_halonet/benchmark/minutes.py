"""What `timm-halonet bench --minutes N` measures on a GPU, the important first: what does not fit is left out.

Cases with `op-128` or `models-8` in their name have that batch size. `supervise.py` runs them.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import nn

from .case import Case, Config, Skip, Step, Subject
from .cases import (
    AGREE,
    BLOCK,
    HALO,
    STAGES,
    accelerated,
    create,
    layer_subjects,
    model_step,
    model_subjects,
    op_subjects,
    without_norms,
)
from .checks import check_cases
from .roofline import bounds
from .timing import cuda_graph

DTYPE = torch.bfloat16
BATCHES = (128, 8)
TINY = ((16, 32, 2), (8, 32, 2), (24, 32, 2))  # in place of the stages
# name -> (how to make it, side of its images in pixels); resnet26t first, which the others are compared with
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet26t": (functools.partial(create, "resnet26t"), 256),
    "halonet_h1": (functools.partial(create, "halonet_h1"), 256),
    "halonet_h0": (functools.partial(create, "halonet_h0"), 256),
    "halonet50ts accelerated": (functools.partial(accelerated, "halonet50ts"), 256),
    "resnet50@224": (functools.partial(create, "resnet50"), 224),
    "swin_tiny@224": (functools.partial(timm.create_model, "swin_tiny_patch4_window7_224"), 224),
}
INFERENCE = {"halonet_h1 --reparam": (functools.partial(without_norms, "halonet_h1"), 256)}
FIRST, OTHERS = ("resnet26t", "halonet_h1"), tuple(MODELS)[2:]


def build_cases(config: Config) -> list[Case]:
    """The whole plan, in the order in which it is run."""
    config = replace(config, dtypes=(DTYPE,), channels_last=True, compile=True)
    eager = ("timm eager", "default")
    compiled = ("default", "gather + sdpa", "gather + sdpa compiled", "flex compiled", "default compiled",
                "timm compiled")  # fmt: skip
    cases = check_cases(config)
    for batch in BATCHES:
        cases += _op_cases(config, batch, "", eager, range(len(STAGES)))
    cases += _kernel_cases(config)
    for training in (False, True):
        names = tuple(MODELS if training else MODELS | INFERENCE)
        cases.append(_model_case(config, BATCHES[0], training, names, False))
    cases += _step_cases(config)
    cases += _memory_cases(config)
    cases.append(_small_batch_case(config, False))
    cases += _op_cases(config, BATCHES[0], "compiled-", compiled, [0])
    for training in (False, True):
        cases.append(_model_case(config, BATCHES[0], training, FIRST, True))
    cases.append(_small_batch_case(config, True))
    cases += _op_cases(config, BATCHES[0], "compiled-", compiled, range(1, len(STAGES)))
    for training in (False, True):
        cases.append(_model_case(config, BATCHES[0], training, OTHERS, True))
    return cases


def _size(config: Config, batch: int) -> int:
    return batch if not config.tiny else 2 if batch == BATCHES[0] else 1


def _samples(config: Config, seconds: float) -> float:
    return 0 if config.tiny else seconds


def _op_cases(config: Config, batch: int, kind: str, names, stages) -> list[Case]:
    cases = []
    for stage in stages:
        side, dim, heads = (TINY if config.tiny else STAGES)[stage]
        for mode in ("forward", "training"):
            training = mode == "training"
            subjects = {x.name: x for x in op_subjects(config, side, dim // heads, heads, DTYPE, training)}
            found = _bounds(config, _size(config, batch), side, dim // heads, heads)
            cases.append(
                Case(
                    f"{kind}op-{batch}/{side}x{side}/bfloat16/{mode}",
                    tuple(subjects[name] for name in names),
                    names[0],
                    _samples(config, 1),
                    AGREE[DTYPE],
                    _size(config, batch),
                    bound=None if found is None else sum(found) if training else found[0],
                    compiling=12,
                )
            )
    return cases


def _bounds(config: Config, batch: int, side: int, dim: int, heads: int) -> tuple[float, float] | None:
    if config.device != "cuda" or not torch.cuda.is_available():
        return None
    sizes: dict[str, Any] = dict(batch=batch, height=side, width=side, heads=heads, dim=dim)
    return bounds(torch.cuda.get_device_name(), block_size=BLOCK, halo_size=HALO, mask_border=False, **sizes)


def _kernel_cases(config: Config) -> list[Case]:
    """What each kernel of a forward, and of a forward and backward, takes; next to the roofline of both together."""
    cases = []
    for side, dim, heads in TINY if config.tiny else STAGES:
        batch = _size(config, BATCHES[0])
        found = _bounds(config, batch, side, dim // heads, heads)
        for mode in ("forward", "training"):
            training = mode == "training"
            subject = next(
                x for x in op_subjects(config, side, dim // heads, heads, DTYPE, training) if x.name == "default"
            )
            name, bound = f"kernel-{BATCHES[0]}/{side}x{side}/bfloat16/{mode}", None
            if found is not None:
                bound = sum(found) if training else found[0]
            cases.append(Case(name, (subject,), "roofline", 1, batch=batch, quantity="kernels", bound=bound))
    return cases


def _model_case(config: Config, batch: int, training: bool, names: tuple[str, ...], compiled: bool) -> Case:
    subjects = []
    for name in names:
        make, size = (MODELS | INFERENCE)[name]
        size = 64 if config.tiny and "swin" not in name else size
        build = functools.partial(model_step, make, config, DTYPE, training, size, compiled)
        subjects.append(Subject(name + " compiled" * compiled, build, False, compiled))
    group = "compiled-" * compiled + f"models-{batch}" + "-others" * (names == OTHERS)
    name = f"{group}/bfloat16/{'training' if training else 'inference'}"
    seconds = _samples(config, 8 if training else 4)
    return Case(name, tuple(subjects), subjects[0].name, seconds, batch=_size(config, batch), setup=6)


def _step_cases(config: Config) -> list[Case]:
    """What each kernel of a training step takes, next to the clock: where does the time of a whole model go?"""
    cases = []
    for name in FIRST:
        (subject,) = _model_case(config, BATCHES[0], True, (name,), False).subjects
        batch = _size(config, BATCHES[0])
        case = f"step-{BATCHES[0]}-{name}/bfloat16/training"
        cases.append(Case(case, (subject,), "by the clock", 1, batch=batch, quantity="kernels", setup=6))
    return cases


def _small_batch_case(config: Config, compiled: bool) -> Case:
    """Inference of few images, which takes what the launches take: eager, in a CUDA graph, under torch.compile."""

    def in_a_graph(batch: int, build: Callable[[int], Step]) -> Step:
        if config.device != "cuda":
            build(batch)()
            raise Skip("CUDA graphs need a GPU")
        return cuda_graph(build(batch))

    subjects = []
    for name in FIRST:
        make, size = MODELS[name]
        size = 64 if config.tiny else size
        build = functools.partial(model_step, make, config, DTYPE, False, size)
        if compiled:
            reduced = functools.partial(build, True, mode="reduce-overhead")
            subjects.append(Subject(f"{name} reduce-overhead", reduced, False, True))
        else:
            eager = functools.partial(build, False)
            subjects.append(Subject(name, eager, False))
            subjects.append(Subject(f"{name} CUDA graph", functools.partial(in_a_graph, build=eager), False))
    name = "compiled-" * compiled + f"models-{BATCHES[1]}/bfloat16/inference"
    batch = _size(config, BATCHES[1])
    return Case(name, tuple(subjects), subjects[0].name, _samples(config, 2), batch=batch, setup=4)


def _memory_cases(config: Config) -> list[Case]:
    """Peak memory of a training step: the layer, halonet_h1 and timm's, and a hybrid with and without this op."""
    side, dim, heads = (TINY if config.tiny else STAGES)[0]
    layers = layer_subjects(config, side, dim, heads, DTYPE, True)[:2]
    models = model_subjects(config, DTYPE, True)[:3]
    size = 256  # timm's attention takes whole blocks only
    hybrids = [
        Subject(name, functools.partial(model_step, make, config, DTYPE, True, size, False), False)
        for name, make in {
            "timm eager": functools.partial(create, "halonet50ts"),
            "accelerated": functools.partial(accelerated, "halonet50ts"),
        }.items()
    ]
    group, batch = f"memory-{BATCHES[0]}", _size(config, BATCHES[0])
    return [
        Case(f"{group}/{name}", tuple(subjects), subjects[0].name, 2, batch=batch, quantity="memory", setup=8)
        for name, subjects in (("layer", layers), ("halonet_h1", models), ("halonet50ts", hybrids))
    ]

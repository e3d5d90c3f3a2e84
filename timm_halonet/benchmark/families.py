"""`timm-halonet bench --families`: all families of this package next to timm's ResNets and Swin, a row for each model.

What is measured are cases of the benchmark as any other (see `cases.py`), so that JSON, --report, --only and Ctrl-C
work alike; `report.py` makes one table of them.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import timm
from timm.models import get_pretrained_cfg_value
from torch import nn

from .case import Case, Config, Skip, Subject, dtype_name
from .cases import model_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the smallest one or two of each family, then what they are compared with
MODELS = (
    "halonet_h0",
    "halonet_h1",
    "seresnet50_halo8",
    "uhalonet_micro",
    "uhalonet_tiny",
    "lesa_resnet50",
    "focal_transformer_tiny",
    "eamlp_7",
    "eamlp_14",
    "resnet26t",
    "resnet50",
    "swin_tiny_patch4_window7_224",
)
COUNTS = ("parameters", "multiply-adds")  # quantities that are counted, not measured


def create(name: str, size: int) -> nn.Module:
    """A model with 1000 classes for square images of `size` pixels.

    Raises:
        Skip: timm knows no such name.
    """
    if not timm.is_model(name):
        raise Skip("timm knows no model of this name")
    fixed = get_pretrained_cfg_value(name, "fixed_input_size")
    other = fixed and size != get_pretrained_cfg_value(name, "input_size")[-1]
    return timm.create_model(name, **(dict(img_size=size) if other else {}))


def build_cases(config: Config) -> list[Case]:
    """Parameters, multiply-adds, time of inference and of a training step, peak memory of one, of `config.families`."""
    names = config.families

    def case(name: str, quantity: str, subjects: Sequence[Subject], seconds: float) -> Case:
        budget = len(names) * seconds
        return Case(f"families/{name}", tuple(subjects), names[0], budget, batch=config.batch, quantity=quantity)

    cases = [case(quantity, quantity, [Subject(name, _nothing, False) for name in names], 1) for quantity in COUNTS]
    for dtype in config.dtypes:
        for mode, seconds in (("inference", 5.0), ("training", 15.0)):
            subjects = [_subject(config, name, dtype, mode == "training") for name in names]
            seconds /= 3 if config.quick else 1
            cases.append(case(f"{dtype_name(dtype)}/{mode}", "time", subjects, seconds))
    subjects = [_subject(config, name, config.main_dtype, True) for name in names]
    return [*cases, case("memory", "memory", subjects, 10)]


def _subject(config: Config, name: str, dtype: Any, training: bool) -> Subject:
    make = functools.partial(create, name, config.size)
    return Subject(name, functools.partial(model_step, make, config, dtype, training, config.size, False), same=False)


def _nothing(batch: int) -> Any:
    raise Skip("counted, not timed")


def count(case: Case, config: Config) -> dict[str, Any]:
    """The part of the result of a case whose quantity is one of `COUNTS`; multiply-adds are those of one image."""
    from ..registry import multiply_adds

    subjects: dict[str, dict[str, Any]] = {}
    for subject in case.subjects:
        try:
            model = create(subject.name, config.size).eval()
            number = sum(p.numel() for p in model.parameters())
            if case.quantity == "multiply-adds":
                number = multiply_adds(model.to("meta"), config.size)
        except Exception as e:  # a reason, whatever it was: the others go on
            reason = str(e) if isinstance(e, Skip) else f"{type(e).__name__}: {str(e)[:200]}"
            subjects[subject.name] = {"skipped": reason}
            continue
        subjects[subject.name] = {"median": number, "q1": number, "q3": number, "samples": 1, "difference": None}
    return {"subjects": subjects}


def draw(result: dict[str, Any]) -> "Figure":
    """Images/s over parameters, inference on the left and training on the right, in the first dtype measured.

    Raises:
        ValueError: parameters or times are not in the result.
    """
    from ..report.plots import scatter

    cases = {case["name"]: case for case in result["cases"]}
    sizes = _medians(cases.get("families/parameters"))
    panels = []
    for mode in ("inference", "training"):
        name = next((name for name in cases if name.startswith("families/") and name.endswith(mode)), "")
        times = _medians(cases.get(name))
        points = {key: (sizes[key] / 1e6, cases[name]["batch"] / times[key]) for key in sizes if key in times}
        if not points:
            raise ValueError(f"--plot needs parameters and times of {mode}, which this run has not measured")
        panels.append((f"{mode}, images/s ({name.split('/')[1]})", "parameters, millions", points))
    return scatter(panels)


def _medians(case: dict[str, Any] | None) -> dict[str, float]:
    subjects = case["subjects"] if case else {}
    return {name: figures["median"] for name, figures in subjects.items() if "median" in figures}

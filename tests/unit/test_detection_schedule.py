"""Budget, learning rate, clipping, weight decay and what a run of few steps is told."""

import math

import pytest
import torch

pytest.importorskip("torchvision")

from timm_halonet.detection import faster_rcnn, mask_rcnn
from timm_halonet.detection.budget import Budget, few_steps_note, learning_rate, sides_of, smaller_sides
from timm_halonet.detection.configs import FasterRCNNCfg, TrainCfg
from timm_halonet.detection.optimizing import make_optimizer, undecayed

from ..support.detection_tiny import tiny_trainer


def rates_of(trainer):
    found = []
    trainer.optimizer.register_step_post_hook(lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"]))
    trainer.run()
    return found


def test_short_run_reaches_its_learning_rate(tmp_path):
    """500 steps of warm-up, but 5 % of the budget at most: here one step of 20."""
    rates = rates_of(tiny_trainer(tmp_path, images=4, epochs=5, cfg=TrainCfg(lr=0.1, batch_size=1)))
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * n / 20)) for n in range(20)]
    assert rates == pytest.approx(expected)


def test_warm_up_rises_in_a_line(tmp_path):
    cfg = TrainCfg(lr=0.1, batch_size=1, warmup=0.2)
    rates = rates_of(tiny_trainer(tmp_path, images=4, epochs=5, cfg=cfg))
    flat = [rate / (0.05 * (1 + math.cos(math.pi * n / 20))) for n, rate in enumerate(rates)]
    assert flat == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 17])
    (tmp_path / "b").mkdir()
    cfg = TrainCfg(lr=0.1, batch_size=1, warmup=0.2, warmup_steps=2)  # the shorter of the two
    rates = rates_of(tiny_trainer(tmp_path / "b", images=4, epochs=5, cfg=cfg))
    assert rates[0] == pytest.approx(0.05) and rates[1] > 0.099


def test_warm_up_of_a_time_budget():
    budget, cfg = Budget(minutes=10), TrainCfg(lr=1.0)
    used = [budget.used(n, 2.0 * n, 50) for n in range(301)]
    rates = [learning_rate(cfg, n, used[n], used[n + 1]) for n in range(300)]
    assert rates[0] == pytest.approx(1 / 15) and rates[7] == pytest.approx(8 / 15, rel=0.01)
    assert max(rates) == pytest.approx(1.0, abs=0.01) and rates.index(max(rates)) == 14
    assert rates[-1] < 1e-4
    assert learning_rate(cfg, 249, 0.001, 0.0011) == pytest.approx(0.5, rel=0.01)  # by steps in a long run


def test_gradient_is_clipped(tmp_path):
    cfg = TrainCfg(lr=0.5, batch_size=2, opt="momentum", clip_grad=0.01, weight_decay=0.0)
    trainer = tiny_trainer(tmp_path, images=2, epochs=1, cfg=cfg)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.run()
    moved = torch.cat([(p - b).flatten() for p, b in zip(trainer.model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    (tmp_path / "b").mkdir()
    free = tiny_trainer(tmp_path / "b", images=2, epochs=1, cfg=TrainCfg(**{**vars(cfg), "clip_grad": 0.0}))
    free.run()
    moved = torch.cat([(p - b).flatten() for p, b in zip(free.model.parameters(), before, strict=True)])
    assert moved.norm().item() > 0.1


SMALL_FOCAL = dict(dim=12, depths=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("backbone", "kwargs", "tables", "count"),
    [
        ("halonet_h0", {}, ("height_rel", "width_rel"), 32),
        ("focal_transformer_tiny", SMALL_FOCAL, ("window_bias", "ring_bias", "pooled_bias"), 11),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, ("relative_position_bias_table",), 4),
    ],
    ids=["halo", "focal", "swin"],
)
def test_weight_decay_spares_what_the_backbone_says(backbone, kwargs, tables, count):
    model = mask_rcnn(backbone, 2, fpn_channels=16, box_features=16, mask_layers=(8,), backbone_kwargs=kwargs or None)
    spared = {name for name, _ in model.named_parameters() if name.endswith(tables)}
    assert len(spared) == count and set(undecayed(model)) == spared
    groups = make_optimizer(model, TrainCfg(weight_decay=0.05)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.0 if parameter.ndim <= 1 or name in spared else 0.05
        assert decays[id(parameter)] == expected, name
    assert all(group["lr"] == TrainCfg().lr for group in groups)


def test_backbone_without_tables_or_name():
    assert undecayed(faster_rcnn("resnet10t", 2, fpn_channels=16, box_features=16)) == []
    assert undecayed(torch.nn.Linear(2, 2)) == []


def test_budget():
    budget = Budget(epochs=4, minutes=1)
    assert budget.used(10, 0.0, 5) == 0.5 and budget.used(0, 45.0, 5) == 0.75 and budget.used(99, 99.0, 5) == 1.0
    assert budget.steps(1.0, 5) == 20 and budget.steps(30.0, 5) == 2 and budget.steps(200.0, 5) == 1


def test_few_steps_are_said_with_what_helps():
    note = few_steps_note(7, 37.0, "standard", FasterRCNNCfg())
    assert "about 7 steps of 37.00 s" in note
    for way in ("min_size=224 max_size=373", "rpn_post_nms_top_n_train=300", "--preset quick", "more --minutes"):
        assert way in note
    note = few_steps_note(7, None, "standard", FasterRCNNCfg())  # epochs: faster steps would not be more
    assert note.endswith(
        "about 7 steps, and a detector learns little in fewer than 100; more would fit with more --epochs"
    )
    note = few_steps_note(60, 9.0, "quick", FasterRCNNCfg(min_size=None, rpn_post_nms_top_n_train=300))
    assert "min_size" not in note and "--preset" not in note and "proposals" not in note
    assert few_steps_note(100, 1.0, "standard", FasterRCNNCfg()) is None


def test_sides_of_the_data():
    assert sides_of([(480, 640)] * 9 + [(1, 3000)]) == (480, 800)
    assert sides_of([(4000, 3000), (3000, 4000)]) == (800, 1333)
    assert sides_of([(20, 20)]) == (32, 53)
    assert smaller_sides((480, 800), 500, 400) == (480, 800)
    assert smaller_sides((480, 800), 100, 400) == (224, 373)  # half, in multiples of 32
    assert smaller_sides((480, 800), 1, 400) == (160, 266)  # no smaller
    assert smaller_sides((100, 166), 1, 400) == (100, 166)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(warmup=-0.1), "warmup=-0.1"),
        (dict(warmup=1.5), "warmup=1.5"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
        (dict(lr=math.nan), "lr=nan"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, cfg=TrainCfg(**values))

"""Detectors: torchvision's own where the backbone is the same; freezing, small images, autocast, wrong arguments."""

import subprocess
import sys

import pytest
import timm
import torch

pytest.importorskip("torchvision")

from torchvision.models.detection import maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork

from timm_halonet.detection import faster_rcnn, mask_rcnn, retinanet
from timm_halonet.detection.configs import DetectorCfg, MaskRCNNCfg, RetinaNetCfg, TrainCfg, parse_options, preset

TINY = dict(preset="small_objects", scale=1.0, fpn_channels=32)
TINY_MASK = dict(**TINY, box_features=64, mask_layers=(32,))


def images_and_targets(classes: int = 2):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 64, generator=generator), torch.rand(3, 70, 100, generator=generator)]
    boxes = torch.tensor([[5.0, 8.0, 30.0, 40.0], [33.0, 41.0, 60.0, 66.0]])
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append(dict(boxes=boxes.clone(), labels=torch.tensor([1, classes]), masks=masks))
    return images, targets


@pytest.mark.integration
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(mask_rcnn, maskrcnn_resnet50_fpn), (retinanet, retinanet_resnet50_fpn)],
    ids=["mask", "retina"],
)
def test_equals_torchvision_on_its_own_backbone(ours, theirs):
    """Same state dict, same detections: the standard preset is torchvision's model."""
    torch.manual_seed(0)
    same = dict(min_size=96, max_size=128)
    theirs_only, ours_only = {}, {}
    if ours is mask_rcnn:  # fewer, to save time
        same["rpn_post_nms_top_n_test"] = 100
        theirs_only["box_detections_per_img"] = ours_only["detections_per_img"] = 20
    reference = theirs(weights=None, weights_backbone=None, num_classes=4, **same, **theirs_only).eval()
    if ours is retinanet:  # untrained it finds nothing above its threshold
        torch.nn.init.zeros_(reference.head.classification_head.cls_logits.bias)
    model = ours("resnet50", 4, **same, **ours_only).eval()
    model.load_state_dict(reference.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    images, _ = images_and_targets()
    with torch.inference_mode():
        expected, found = reference(images), model(images)
    for a, b in zip(expected, found, strict=True):
        assert len(a["boxes"]) > 5
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], atol=2e-3, rtol=1e-3)


def test_pyramid_is_the_backbones_maps_through_an_fpn():
    torch.manual_seed(0)
    model = faster_rcnn("halonet_h0", 2, fpn_channels=16).eval()
    body = timm.create_model("halonet_h0", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    body.load_state_dict(model.backbone.body.state_dict())
    fpn = FeaturePyramidNetwork([32, 64, 128, 256], 16)
    fpn.load_state_dict(model.backbone.fpn.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        levels = model.backbone(x)
        expected = fpn({str(n): m for n, m in enumerate(body(x))})
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    for name, level in expected.items():
        torch.testing.assert_close(levels[name], level, atol=1e-4, rtol=1e-4)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


HYBRIDS = ["seresnet50_halo8", "seresnet50_halo32", "seresnet101_halo8"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [*(f"halonet_h{n}" for n in range(8)), *HYBRIDS, "uhalonet_micro", "resnet50", "regnety_002"]
)
def test_trains_and_finds(name):
    torch.manual_seed(0)
    model = mask_rcnn(name, 3, **TINY_MASK)
    images, targets = images_and_targets()
    losses = model(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    # DDP would stop at a parameter without a gradient
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with torch.inference_mode():
        found = model.eval()(images)
    for image, entry in zip(images, found, strict=True):
        assert entry["masks"].shape == (len(entry["boxes"]), 1, *image.shape[1:])


def test_images_without_objects_train():
    images, _ = images_and_targets()
    empty = [
        dict(
            boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, *i.shape[1:]).byte()
        )
        for i in images
    ]
    for make, options in ((mask_rcnn, TINY_MASK), (retinanet, TINY)):
        model = make("halonet_h0", 2, **options)
        losses = model(images, empty)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_frozen_stages_are_torchvisions():
    reference = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=2)
    expected = {n for n, p in reference.named_parameters() if p.requires_grad}
    model = faster_rcnn("resnet50", 2, norm="frozen", trainable_layers=2)
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == expected


def test_trainable_layers_of_a_halonet():
    model = faster_rcnn("halonet_h0", 3, trainable_layers=2, norm="batch", **TINY, box_features=16)
    trained = {n.split(".")[0] for n, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"stages_2", "stages_3"}
    images, targets = images_and_targets()
    before = {k: v.clone() for k, v in model.backbone.body.state_dict().items()}
    model.train()(images, targets)
    after = model.backbone.body.state_dict()
    changed = {k.split(".")[0] for k in before if k.endswith("running_mean") and not torch.equal(before[k], after[k])}
    assert changed == {"stages_2", "stages_3"}  # statistics of frozen stages stay too


def test_norms():
    norms = {}
    for norm in ("frozen", "sync", "batch"):
        body = faster_rcnn("halonet_h0", 2, norm=norm, fpn_channels=16).backbone.body
        norms[norm] = {type(m).__name__ for m in body.modules() if "BatchNorm" in type(m).__name__}
    assert norms == {"frozen": {"FrozenBatchNormAct2d"}, "sync": {"SyncBatchNormAct"}, "batch": {"BatchNormAct2d"}}
    # the defaults: a backbone without weights must train its norms, one with weights keeps them
    assert faster_rcnn("halonet_h0", 2).recipe.options.norm == "batch"
    trained = faster_rcnn("halonet_h0", 2, pretrained=True).recipe.options
    assert (trained.norm, trained.trainable_layers) == ("frozen", 3)


def test_a_module_as_backbone():
    body = timm.create_model("halonet_h0", features_only=True, out_indices=(1, 2, 3))
    model = faster_rcnn(body, 2, pretrained=False, fpn_channels=16)
    assert model.backbone.level_strides == [4, 8, 16, 32]
    assert model.backbone.body is body
    assert model.recipe.backbone is None
    with pytest.raises(ValueError, match=r"has no map 4; it has 1 .stride 4, 32 channels."):
        faster_rcnn(body, 2, out_indices=(2, 3, 4))
    with pytest.raises(ValueError, match="Conv2d has no feature_info"):
        faster_rcnn(torch.nn.Conv2d(3, 8, 3), 2)


def test_maps_that_are_not_used_are_not_computed():
    model = retinanet("halonet_h0", 2, out_indices=(1, 2), fpn_channels=16)
    assert [n for n, _ in model.backbone.body.named_children()][-1] == "stages_1"
    assert model.backbone.level_strides == [4, 8, 16, 32]
    assert retinanet("halonet_h0", 2, fpn_channels=16).backbone.level_strides == [8, 16, 32, 64, 128]


def test_autocast_keeps_boxes_exact():
    """Boxes beyond pixel 256, whose odd numbers bfloat16 does not have, survive; all outputs are float32."""
    torch.manual_seed(0)
    for make, options in ((mask_rcnn, TINY_MASK), (retinanet, TINY)):
        model = make("halonet_h0", 2, **options, score_thresh=0.0).eval()
        image = torch.rand(3, 64, 600)
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16):
                levels = list(model.backbone(image[None]).values())
                [found] = model([image])
            anchors_of = model.anchor_generator if make is retinanet else model.rpn.anchor_generator
            [anchors] = anchors_of(ImageList(image[None], [(64, 600)]), levels)
        assert anchors.dtype == torch.float32
        assert anchors[:, 0].max() % 2 == 0 and len(anchors[:, 0].unique()) >= 600 // 4
        assert all(v.dtype == torch.float32 for k, v in found.items() if k != "labels")
        images, targets = images_and_targets(classes=1)
        torch.manual_seed(1)
        exact = model.train()(images, targets)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images, targets)
        for name, value in exact.items():
            assert rough[name].dtype == torch.float32
            torch.testing.assert_close(rough[name], value, atol=0.05, rtol=0.1)


def test_autocast_gradients_of_small_images():
    """RetinaNet's levels 6 and 7 of 64 px are one pixel, where bfloat16 convolutions lose themselves in old memory."""
    torch.manual_seed(0)
    model = retinanet("halonet_h0", 2, **TINY)
    images, targets = images_and_targets(classes=1)
    images = [image[:, :64, :64] for image in images]
    gradients = []
    for _ in range(4):
        del [torch.full((97 * n + 1,), torch.nan) for n in range(300)][:]  # old memory
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(images, targets)
        sum(losses.values()).backward()
        gradients.append(
            [m.weight.grad.clone() for m in (model.backbone.fpn.extra_blocks.p6, model.backbone.fpn.extra_blocks.p7)]
        )
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.isfinite(a).all() and torch.isfinite(b).all()
            torch.testing.assert_close(a, b)


def test_channels_last_changes_nothing():
    torch.manual_seed(0)
    model = mask_rcnn("halonet_h0", 2, **TINY_MASK, channels_last=False).eval()
    other = mask_rcnn("halonet_h0", 2, **TINY_MASK, channels_last=True).eval()
    other.load_state_dict(model.state_dict())
    assert other.roi_heads.mask_head[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    images, _ = images_and_targets()
    with torch.inference_mode():
        for a, b in zip(model(images), other(images), strict=True):
            torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-2, rtol=1e-3)


def test_first_image_does_not_settle_the_scale():
    """torchvision's pooling guesses the strides from the first image: wrongly from one of 40 px, padded to 64."""
    torch.manual_seed(0)
    models = [mask_rcnn("halonet_h0", 2, **TINY_MASK).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.rand(3, 128, 128)
    with torch.inference_mode():
        models[0]([torch.rand(3, 40, 40)])
        [after], [fresh] = models[0]([image]), models[1]([image])
    assert models[0].roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    torch.testing.assert_close(after["boxes"], fresh["boxes"])


def test_scale_without_resizing():
    """min_size None: a factor in evaluation, images as they come in training."""
    model = faster_rcnn("halonet_h0", 2, **TINY | {"scale": 2.0}, box_features=16)
    image = torch.rand(3, 40, 60)
    assert model.train().transform([image], None)[0].image_sizes == [(40, 60)]
    assert model.eval().transform([image])[0].image_sizes == [(80, 120)]
    with torch.inference_mode():
        [found] = model([image])
    assert len(found["boxes"]) and found["boxes"][:, [0, 2]].max() <= 60 and found["boxes"][:, [1, 3]].max() <= 40
    sized = faster_rcnn("halonet_h0", 2, min_size=80, max_size=100, fpn_channels=16).eval()
    assert sized.transform([image])[0].image_sizes == [(66, 100)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_classes=1), "2 or more, got 1"),
        (dict(backbone="halonet_h99"), "unknown backbone 'halonet_h99'"),
        (dict(backbone="vit_tiny_patch16_224"), r"strides double from one to the next, got strides \[16, 16, 16\]"),
        (dict(out_indices=(1, 2, 9)), r"has no map 9; it has 0 .stride 2, 64 channels.*4 .stride 32, 256 channels"),
        (dict(out_indices=(1, 3)), r"got strides \[4, 16\]"),
        (dict(min_stride=64), r"got strides \[\]"),
        (dict(trainable_layers=6), "trainable_layers is 6, expected 0 to 5"),
        (dict(trainable_layers=-1), "trainable_layers is -1"),
        (dict(trainable_layers="some"), "trainable_layers is 'some'"),
        (dict(norm="group"), "norm is 'group', expected one of frozen, sync, batch"),
        (dict(preset="tiny"), "unknown preset 'tiny'; there are standard, small_objects"),
        (dict(min_size=1000, max_size=500), "min_size=1000, max_size=500"),
        (dict(anchor_scales=(0.0,)), "anchor_scales needs"),
        (dict(mask_layers=()), "mask_layers needs"),
        (dict(fpn_channels=0), "fpn_channels >= 1"),
        (dict(fpn_channels="many"), "fpn_channels is 'many', expected int"),
        (dict(anchor_sizes=(8,)), "unknown option 'anchor_sizes'; MaskRCNNCfg has out_indices"),
    ],
)
def test_wrong_arguments(arguments, message):
    arguments = {"backbone": "halonet_h0", "num_classes": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        mask_rcnn(arguments.pop("backbone"), arguments.pop("num_classes"), **arguments)


def test_presets_and_options():
    small = preset(MaskRCNNCfg, "small_objects")
    assert (small.fpn_channels, small.min_size, small.detections_per_img) == (128, None, 500)
    assert preset(MaskRCNNCfg, "standard") == MaskRCNNCfg()
    assert preset(RetinaNetCfg, "small_objects").min_stride == 4  # and what it does not have is left out
    detector, training = parse_options(["fpn_channels=64", "lr=1e-3", "norm=batch", "flips=hv"], MaskRCNNCfg, TrainCfg)
    assert detector == {"fpn_channels": 64, "norm": "batch"}
    assert training == {"lr": 1e-3, "flips": "hv"}
    assert preset(MaskRCNNCfg, "standard", {"mask_layers": [8, 8]}).mask_layers == (8, 8)
    for text in ("fpn_channels", "colour=3"):
        with pytest.raises(ValueError, match=f"expected NAME=VALUE, got '{text}'"):
            parse_options([text], DetectorCfg)


def test_importing_the_package_is_light():
    code = (
        "import sys, timm_halonet.detection, timm_halonet.cli; "
        "print([m for m in ('torch', 'timm', 'torchvision', 'faster_coco_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

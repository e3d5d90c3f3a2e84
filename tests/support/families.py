"""A small model of every family of this package, and what tests/families/test_every_family.py expects of it."""

import copy
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import timm
import torch
from torch import nn

from timm_halonet.families.eamlp.eamlp import EAMLP
from timm_halonet.families.focal.focal import FocalTransformer
from timm_halonet.families.lesa.lesa import LesaResNet
from timm_halonet.models.halonet import HaloNet
from timm_halonet.models.hybrid import HaloResNet
from timm_halonet.models.uhalonet import UHaloNet

# parameters with 1000 classes, the paper's image size, billions of multiply-adds (None: not counted here)
ARCHITECTURES: dict[str, tuple[int, int, float | None]] = {
    "halonet_h0": (5_502_248, 256, None),
    "halonet_h1": (8_101_352, 256, 2.94),
    "halonet_h2": (9_405_608, 256, None),
    "halonet_h3": (11_842_792, 320, None),
    "halonet_h4": (19_103_464, 384, None),
    "halonet_h5": (30_718_952, 448, None),
    "halonet_h6": (43_458_280, 512, None),
    "halonet_h7": (67_434_728, 600, None),
    "halonet_h4_conv12": (19_466_152, 384, None),
    "halonet_h7_conv1": (67_338_440, 600, None),
    "halonet_h7_conv12": (66_964_520, 600, None),
    "halonet_h7_conv123": (54_093_480, 600, None),
    "seresnet50_halo8": (23_379_800, 224, None),
    "seresnet50_halo32": (23_398_232, 224, None),
    "seresnet101_halo8": (44_618_648, 224, None),
    "uhalonet_micro": (4_389_672, 224, None),
    "uhalonet_tiny": (31_523_176, 224, None),
    "uhalonet_small": (52_831_336, 224, None),
    "uhalonet_base": (93_327_336, 224, None),
    "lesa_resnet50": (23_777_512, 224, 6.18),
    "lesa_wide_resnet50_2": (61_145_896, 224, 16.53),
    "focal_transformer_tiny": (28_827_460, 224, 4.92),
    "focal_transformer_small": (51_004_348, 224, 9.43),
    "focal_transformer_base": (89_631_944, 224, 16.364),
    "focal_transformer_tiny_conv": (30_772_324, 224, 5.17),
    "focal_transformer_small_conv": (52_949_212, 224, 9.67),
    "focal_transformer_base_conv": (93_085_256, 224, 16.79),
    "eamlp_7": (6_096_206, 224, 1.465),
    "eamlp_14": (29_801_422, 224, 6.45),
    "eamlp_19": (54_470_798, 224, 11.60),
}

Wrong = tuple[dict[str, Any], type[Exception], str]


@dataclass(frozen=True)
class Family:
    """A small model, and what holds for it alone."""

    architecture: str
    model_class: type[nn.Module]
    kwargs: dict[str, Any]
    features: tuple[tuple[int, int], ...]  # channels and reduction of each
    blocks: int  # with stochastic depth
    groups: tuple[int, int]  # groups of layers for layer-wise learning rates, coarse and fine
    tables: tuple[str, ...]  # endings of the names of parameters that must not decay
    num_tables: int
    no_gradient: str = "^$"  # pattern of the names of parameters that the function does not depend on
    fixed_size: tuple[int, int] | None = None  # of images; None for any
    dynamic_export: tuple[tuple[int, int], ...] = ()  # an example's height and width, and those that its export takes
    other_export: tuple[int, int] | None = None  # as well, where PyTorch exports pooling of odd and even maps alike
    options: tuple[dict[str, Any], ...] = ()  # each changes the output
    wrong: tuple[Wrong, ...] = ()  # each is refused with this message


HALO_TABLES = (".height_rel", ".width_rel")
HALO_OPTIONS = (dict(mask_border=False), dict(halo_size=1), dict(block_size=4), dict(act_layer="silu"))
STRIDED_OPTIONS = (dict(strided_rel="grid"), dict(scale_pos_embed=True))
WRONG_WINDOW: tuple[Wrong, ...] = (
    (dict(block_siz=8), TypeError, "'block_siz'.*block_size"),
    (dict(block_size=0), ValueError, "block_size=0"),
    (dict(halo_size=-2), ValueError, "halo_size=-2"),
)

HALONET = Family(
    "halonet_h0",
    HaloNet,
    dict(base_width=32, stem_chs=16, depths=1, zero_init_last=False),
    features=((16, 2), (16, 4), (32, 8), (64, 16), (128, 32)),
    blocks=4,
    groups=(6, 6),
    tables=HALO_TABLES,
    num_tables=2 * 4,
    options=(*HALO_OPTIONS, *STRIDED_OPTIONS, dict(conv_stages=(1, 2)), dict(num_features=64), dict(num_heads=4)),
    wrong=(
        *WRONG_WINDOW,
        (dict(num_heads=7), ValueError, "stage 1: 32 query channels.*7 heads"),
        (dict(num_heads=(4, 8)), ValueError, r"\(4, 8\)"),
        (dict(base_width=65), ValueError, "65 query channels"),
        (dict(conv_stages=(5,)), ValueError, r"1 to 4.*\(5,\)"),
        (dict(depths=(3, 0, 3, 3)), ValueError, r"\(3, 0, 3, 3\)"),
        (dict(strided_rel="no"), ValueError, "'no'"),
    ),
)
HYBRID = Family(
    "seresnet50_halo8",
    HaloResNet,
    dict(base_width=16, depths=(1, 1, 1, 2), zero_init_last=False),
    features=((64, 2), (256, 4), (512, 8), (1024, 16), (2048, 32)),
    blocks=5,
    groups=(6, 7),
    tables=HALO_TABLES,
    num_tables=2 * 2,
    options=(*HALO_OPTIONS, *STRIDED_OPTIONS, dict(num_heads=4)),
    wrong=(
        *WRONG_WINDOW,
        (dict(block_siz=8), TypeError, "'block_siz'.*num_classes"),
        (dict(num_heads=7), ValueError, "128 channels.*num_heads=7"),
        (dict(depths=(3, 4, 6)), ValueError, r"four numbers.*\(3, 4, 6\)"),
        (dict(depths=(3, 4, 0, 3)), ValueError, r"\(3, 4, 0, 3\)"),
        (dict(output_stride=64), ValueError, "8, 16 or 32, got 64"),
        (dict(strided_rel="no"), ValueError, "'no'"),
    ),
)
UHALONET = Family(
    "uhalonet_micro",
    UHaloNet,
    dict(dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4)),
    features=((8, 4), (16, 8), (32, 16), (64, 32)),
    blocks=5,
    groups=(6, 11),  # each stage's norm counts as a layer
    tables=HALO_TABLES,
    num_tables=2 * 5,
    no_gradient=r"^stages\.3\.norm\.bias$",  # a shift that the batch norm behind it takes back
    # every map has more than one block at these sizes
    dynamic_export=((264, 320), (299, 331)),
    options=HALO_OPTIONS,
    wrong=(
        *WRONG_WINDOW,
        (dict(zero_init_last=True), TypeError, "'zero_init_last'"),
        (dict(num_heads=3), ValueError, "stage 1: 8 channels.*3 heads"),
        (dict(num_heads=(1, 2)), ValueError, r"four stages.*\(1, 2\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"\(1, 0, 1, 1\)"),
        (dict(dims=1), ValueError, r"\(1, 1, 1, 1\)"),
        (dict(head_ratio=0.0), ValueError, "head_ratio=0.0"),
        (dict(output_stride=4), ValueError, "8, 16 or 32, got 4"),
    ),
)
LESA = Family(
    "lesa_resnet50",
    LesaResNet,
    dict(base_width=16, depths=(1, 1, 2, 1), zero_init_last=False, img_size=64),
    features=((64, 2), (256, 4), (512, 8), (2048, 16)),
    blocks=5,
    groups=(6, 7),
    tables=(".table",),
    num_tables=2,
    no_gradient=r"\.bn_logits\.bias$",  # shifts all logits of a head alike
    fixed_size=(64, 64),
    options=(dict(num_heads=4), dict(rel_pos="height_width"), dict(act_layer="silu")),
    wrong=(
        (dict(depths=(1, 1, 1)), ValueError, r"four depths.*\(1, 1, 1\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"\(1, 0, 1, 1\)"),
        (dict(base_width=0), ValueError, "base_width >= 1.*0"),
        (dict(num_heads=24), ValueError, "dim=64, num_heads=24"),
        (dict(rel_po="flattened"), TypeError, "rel_po"),
    ),
)
LESA_TWO_TABLES = replace(
    LESA,
    kwargs={**LESA.kwargs, "rel_pos": "height_width"},
    tables=HALO_TABLES,
    num_tables=2 * 2,
    fixed_size=None,
    dynamic_export=((96, 128), (64, 96), (160, 144)),
    other_export=(75, 50),
    options=(dict(num_heads=4),),
    wrong=(),
)
FOCAL = Family(
    "focal_transformer_tiny",
    FocalTransformer,
    dict(dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), drop_path_rate=0.0),
    features=((16, 4), (32, 8), (64, 16), (128, 32)),
    blocks=5,
    groups=(6, 7),
    tables=("window_bias", "ring_bias", "pooled_bias"),
    num_tables=3 * 5 - 1,  # no ring in the last stage
    options=(dict(padding="masked"), dict(window_size=4), dict(ring_sizes=(1, 2, 3, 3)), dict(pooled_windows=3)),
    wrong=(
        (dict(window_siz=8), TypeError, "'window_siz'.*window_size"),
        (dict(num_heads=3), ValueError, "16 channels.*num_heads=3"),
        (dict(ring_sizes=(3, 3)), ValueError, r"ring_sizes.*four stages.*\(3, 3\)"),
        (dict(depths=(1, 0, 1, 1)), ValueError, r"depths=\(1, 0, 1, 1\)"),
        (dict(mlp_ratio=0.0), ValueError, "mlp_ratio=0.0"),
    ),
)
EAMLP_SMALL = Family(
    "eamlp_7",
    EAMLP,
    dict(dim=24, depth=4, num_heads=2, num_slots=8, stem_dim=8, stem_slots=6),
    features=((24, 16),) * 4,
    blocks=4,
    groups=(6, 6),
    tables=("cls_token",),
    num_tables=1,
    # in the blocks these shift a slot's logits of all tokens alike, which the softmax over tokens takes back
    no_gradient=r"^blocks.*\.(norm1|attn\.q|attn\.key_memory)\.bias$",
    dynamic_export=((75, 110), (64, 96), (75, 50)),
    options=(dict(act_layer="relu"), dict(mlp_ratio=3.0), dict(expansion=2), dict(num_slots=4)),
    wrong=(
        (dict(num_slot=8), TypeError, "'num_slot'.*num_slots"),
        (dict(dim=25), ValueError, "25 channels.*num_heads=2"),
        (dict(num_slots=0), ValueError, "num_slots=0"),
        (dict(depth=0), ValueError, "depth=0"),
        (dict(global_pool="map"), ValueError, "'token', 'avg'.*got 'map'"),
    ),
)

FAMILIES: dict[str, Family] = {
    "halonet": HALONET,
    "hybrid": HYBRID,
    "uhalonet": UHALONET,
    "lesa": LESA,
    "lesa, two tables": LESA_TWO_TABLES,
    "focal": FOCAL,
    "focal, masked": replace(FOCAL, kwargs={**FOCAL.kwargs, "padding": "masked"}, options=(), wrong=()),
    "focal, conv": replace(FOCAL, architecture="focal_transformer_tiny_conv", options=(), wrong=()),
    "eamlp": EAMLP_SMALL,
}


_made: dict[str, nn.Module] = {}


def small(family: Family, **kwargs: Any) -> nn.Module:
    """The family's small model with ten classes, in eval mode, every part of it large enough to show in the output."""
    kwargs = {"num_classes": 10, **family.kwargs, **kwargs}
    key = f"{family.architecture} {kwargs}"
    if key not in _made:
        _made[key] = fill(timm.create_model(family.architecture, **kwargs), family.tables).eval()
    return copy.deepcopy(_made[key])


@torch.no_grad()
def fill(model: nn.Module, tables: tuple[str, ...] = ()) -> nn.Module:
    """Random parameters that depend on their name and shape alone, so that models that share some share the values."""
    for name, p in model.named_parameters():
        known = name.removeprefix("model.").replace(".", "_")  # timm's features_only renames
        generator = torch.Generator().manual_seed(crc32(known.encode()))
        x = torch.randn(p.shape, generator=generator)
        if name.endswith(tables):
            x = 0.5 * x
        elif p.ndim > 1:
            x = x * p[0].numel() ** -0.5
        else:
            x = 0.2 * x if name.endswith("bias") else 1 + 0.2 * x
        p.copy_(x)
    return model

"""Checkpoints of LESA's authors, in this package's names."""

import re
from typing import Any

from torch import nn

# the authors' names within a block -> ours, the first that matches
_NAMES = (
    ("conv2.x_transform.", "self_attn.local."),
    ("conv2.bn_x.", "self_attn.local.2."),
    ("conv2.qkv_transform.", "self_attn.qkv."),
    ("conv2.bn_qkv.", "self_attn.bn_qkv."),
    ("conv2.relative", "self_attn.pos_embed.table"),
    ("conv2.rel_height", "self_attn.pos_embed.height_rel"),
    ("conv2.rel_width", "self_attn.pos_embed.width_rel"),
    ("conv2.bn_similarity.", "self_attn.bn_logits."),
    ("conv2.bn_output.", "self_attn.bn_context."),
    ("conv2.reasoning.", "self_attn.gate."),
    ("conv2.projection.0.", "self_attn.gate.4."),
    ("conv2.projection.1.", "self_attn.gate.5."),
    ("conv1.", "conv1_1x1.conv."),
    ("bn1.", "conv1_1x1.bn."),
    ("conv2.", "conv2_kxk.conv."),
    ("bn2.", "conv2_kxk.bn."),
    ("conv3.", "conv3_1x1.conv."),
    ("bn3.", "conv3_1x1.bn."),
    ("downsample.0.", "shortcut.conv."),
    ("downsample.1.", "shortcut.bn."),
)


def _our_name(name: str) -> str:
    for theirs, ours in (("conv1.", "stem.conv1.conv."), ("bn1.", "stem.conv1.bn."), ("fc.", "head.fc.")):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    block = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", name)
    if block:
        stage, index, rest = block.groups()
        for theirs, ours in _NAMES:
            if rest.startswith(theirs):
                return f"stages.{int(stage) - 1}.{index}.{ours}{rest[len(theirs) :]}"
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict for `model`, from a checkpoint of the authors or one with this model's names.

    The authors' lies under "net" and has torchvision's names, maybe behind "module."; its queries, keys and values are
    projected by a 1-d convolution, which only changes shape. The buffer `flatten_index` is left out.
    """
    for key in ("net", "model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    out = {}
    for name, x in state_dict.items():
        name = _our_name(name.removeprefix("module."))
        if name.endswith("flatten_index"):
            continue
        if name.endswith("self_attn.qkv.weight") and x.ndim == 3:
            x = x.unsqueeze(3)
        out[name] = x
    return out

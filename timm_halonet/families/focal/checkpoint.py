"""Checkpoints of microsoft's Focal-Transformer (MIT licence) for this package's `FocalTransformer`."""

from typing import Any

import torch
from torch import nn

_BUFFERS = ("relative_position_index", "valid_ind_", "attn_mask")  # beginnings of the last part of the authors' names

# the authors' names within a block -> ours
_NAMES = (
    ("pool_layers.0.", "attn.pool."),
    ("attn.relative_position_bias_table_to_neighbors", "attn.ring_bias"),
    ("attn.relative_position_bias_table_to_windows.0", "attn.pooled_bias"),
    ("attn.relative_position_bias_table", "attn.window_bias"),
)


def _our_name(name: str) -> str:
    for theirs, ours in (("patch_embed.", "stem."), ("head.", "head.fc.")):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    part = name.split(".")
    if part[0] != "layers":
        return name
    if part[2] == "downsample":  # theirs ends a stage, ours begins the next one
        return ".".join(["stages", str(int(part[1]) + 1), *part[2:]])
    rest = ".".join(part[4:])
    for theirs, ours in _NAMES:
        if rest.startswith(theirs):
            rest = ours + rest[len(theirs) :]
            break
    return ".".join(["stages", part[1], "blocks", part[3], rest])


def _merge_ring(table: torch.Tensor, window: int, ring: int) -> torch.Tensor:
    """The authors' biases of the ring for ours: (1, heads, queries, keys) -> (heads, queries, fewer keys).

    Their ring is what four copies of the window, moved by the ring's size along both axes (to the bottom right, bottom
    left, top right, top left), have outside it. Neighbouring copies overlap: a key that is there twice has weight
    exp(a) + exp(b), so that one key with the bias log(exp(a) + exp(b)) does the same.
    """
    moves = [(y, x) for y in (ring, -ring) for x in (ring, -ring)]
    moved = [(y + dy, x + dx) for dy, dx in moves for y in range(window) for x in range(window)]
    inside = range(window)
    theirs = [at for at in moved if not (at[0] in inside and at[1] in inside)]
    reach = range(-ring, window + ring)
    ours = [(y, x) for y in reach for x in reach if not (y in inside and x in inside)]
    last = {at: i for i, at in enumerate(theirs)}
    first = {at: i for i, at in reversed(list(enumerate(theirs)))}
    once = table[0][..., [first[at] for at in ours]]
    again = table[0][..., [last[at] for at in ours]]
    twice = torch.tensor([first[at] < last[at] for at in ours], device=table.device)
    return torch.where(twice, torch.logaddexp(once, again), once)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict for `model`, from a checkpoint of the authors or one with this model's names.

    The authors' lies under "model", maybe behind "module.". Their buffers are left out, their tables of biases change
    shape, and those of the ring are merged where it holds a key twice, which keeps the function.
    """
    state_dict = state_dict.get("model", state_dict)
    state_dict = {name.removeprefix("module."): x for name, x in state_dict.items()}
    if "patch_embed.proj.weight" not in state_dict:
        return state_dict
    out = {}
    for name, x in state_dict.items():
        if name.rpartition(".")[2].startswith(_BUFFERS):
            continue
        name = _our_name(name)
        if name.endswith("window_bias"):
            rows = round(x.shape[0] ** 0.5)
            x = x.t().reshape(-1, rows, rows).contiguous()
        elif name.endswith("pooled_bias"):
            rows = round(x.shape[1] ** 0.5)
            x = x.reshape(-1, rows, rows)
        elif name.endswith("ring_bias"):
            # queries = window ** 2, and the authors' keys are 4 * (window ** 2 - (window - ring) ** 2)
            window = round(x.shape[2] ** 0.5)
            x = _merge_ring(x, window, window - round((x.shape[2] - x.shape[3] / 4) ** 0.5))
        out[name] = x
    return out

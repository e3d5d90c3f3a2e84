"""Checkpoints of EAMLP's authors, in this package's names."""

from typing import Any

from timm.models._manipulate import adapt_input_conv
from torch import nn

# parts of the authors' names -> of ours
_NAMES = {"q_linear": "q", "trans_dims": "q", "linear_0": "key_memory", "linear_1": "value_memory"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict for `model`, from a checkpoint of the authors or one with this model's names.

    The authors' moving average ("state_dict_ema") is preferred to the weights next to it, and their table of positions
    dropped, since it is fixed. For images of other channels the first projection is adapted as timm adapts a first
    convolution, its norm's scale and shift folded into it.
    """
    for key in ("state_dict_ema", "state_dict"):
        if key in state_dict:
            state_dict = state_dict[key]
            break
    out = {}
    for name, x in state_dict.items():
        parts = name.removeprefix("module.").split(".")
        if parts != ["pos_embed"]:
            out[".".join(_NAMES.get(part, part) for part in parts)] = x
    in_chans = getattr(model, "in_chans", 3)
    weight = out.get("tokens_to_token.attention1.attn.q.weight")
    if weight is not None and in_chans != 3 and weight.shape[1] == 3 * 7 * 7:
        _adapt_channels(out, in_chans)
    return out


def _adapt_channels(state_dict: dict[str, Any], in_chans: int) -> None:
    norm, q = (f"tokens_to_token.attention1.{part}" for part in ("norm1", "attn.q"))
    weight, bias = state_dict[f"{q}.weight"], state_dict[f"{q}.bias"]
    state_dict[f"{q}.bias"] = bias + weight @ state_dict[f"{norm}.bias"]
    weight = (weight * state_dict[f"{norm}.weight"]).unflatten(1, (3, 7, 7))
    state_dict[f"{q}.weight"] = adapt_input_conv(in_chans, weight).flatten(1)
    state_dict[f"{norm}.weight"] = weight.new_ones(in_chans * 7 * 7)
    state_dict[f"{norm}.bias"] = weight.new_zeros(in_chans * 7 * 7)

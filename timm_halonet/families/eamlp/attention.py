"""External attention: every pixel or token reads a small learned memory that all images share (arXiv 2105.02358)."""

import torch
from torch import nn

torch.fx.wrap("double_normalize")  # one node in an fx graph: it looks at the dtype


def double_normalize(logits: torch.Tensor) -> torch.Tensor:
    """Attention over memory slots: softmax over the tokens, then each token's weights over their sum (equations 5, 6).

    In float32 at least: the softmax leaves many tokens weights that 16 bits round to zero, and 1e-9, which the authors
    add to the sum, is zero in float16. A token with no weight at all gets zeros.

    Args:
        logits: (batch, tokens, ..., slots).

    Returns:
        Weights of the same shape and dtype; of each token they are >= 0 and sum to at most 1.
    """
    weights = logits
    if logits.dtype == torch.float16 or logits.dtype == torch.bfloat16:
        weights = logits.float()
    weights = weights.softmax(dim=1)
    weights = weights / (1e-9 + weights.sum(dim=-1, keepdim=True))
    return weights.to(logits.dtype)


class ExternalAttention(nn.Module):
    """Multi-head external attention over tokens (section 3.4): all heads share two memories, between projections.

    Its cost is linear in the number of tokens. Tokens meet in the normalisation only.

    Args:
        dim: input channels.
        dim_out: output channels; None for `dim`.
        num_heads: heads, >= 1.
        dim_head: channels of a head; None for dim_out // num_heads.
        num_slots: rows of each memory, >= 1.
        key_bias, value_bias: biases in the products with the first and the second memory. (That of the first, as that
            of the queries without `skip`, shifts a slot's logits of all tokens alike, which the softmax over tokens
            takes back: it does nothing. The authors' backbones have it.)
        skip: add the projected input to the output; needs num_heads * dim_head == dim_out.
        mirror_init: the second memory starts as a copy of the first.

    Shape: (batch, tokens, dim) -> (batch, tokens, dim_out).

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        num_heads: int = 1,
        dim_head: int | None = None,
        num_slots: int = 64,
        key_bias: bool = False,
        value_bias: bool = False,
        skip: bool = False,
        mirror_init: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        if num_heads < 1 or num_slots < 1:
            raise ValueError(f"need num_heads and num_slots >= 1, got {num_heads=}, {num_slots=}")
        if dim_head is None and dim_out % num_heads:
            raise ValueError(f"{dim_out} channels cannot be divided among num_heads={num_heads}; say dim_head")
        self.num_heads = num_heads
        self.dim_head = dim_head or dim_out // num_heads
        if skip and num_heads * self.dim_head != dim_out:
            raise ValueError(f"skip needs num_heads * dim_head = {num_heads} * {self.dim_head} to be {dim_out=}")
        self.skip = skip
        self.mirror_init = mirror_init
        self.q = nn.Linear(dim, num_heads * self.dim_head, **dd)
        self.key_memory = nn.Linear(self.dim_head, num_slots, bias=key_bias, **dd)
        self.value_memory = nn.Linear(num_slots, self.dim_head, bias=value_bias, **dd)
        self.proj = nn.Linear(num_heads * self.dim_head, dim_out, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal with standard deviation 0.02, biases 0."""
        for linear in (self.q, self.key_memory, self.value_memory, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.mirror_init:
            with torch.no_grad():
                self.value_memory.weight.copy_(self.key_memory.weight.t())

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) -> (batch, tokens, dim_out)."""
        batch, tokens = x.shape[0], x.shape[1]
        q = self.q(x)
        weights = double_normalize(self.key_memory(q.reshape(batch, tokens, self.num_heads, self.dim_head)))
        out = self.value_memory(weights)  # batch, tokens, heads, dim_head
        out = self.proj_drop(self.proj(out.reshape(batch, tokens, self.num_heads * self.dim_head)))
        return out + q if self.skip else out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dim_head={self.dim_head}, skip={self.skip}"


class ExternalAttention2d(ExternalAttention):
    """External attention over a map of any size; see `ExternalAttention` for the arguments.

    Without norm, activation or residual, as `HaloAttention`.

    Shape: (batch, dim, H, W), any H, W >= 1 -> (batch, dim_out, H, W) in channels_last.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        x = self.attend(x.permute(0, 2, 3, 1).flatten(1, 2))
        return x.reshape(batch, height, width, x.shape[2]).permute(0, 3, 1, 2)

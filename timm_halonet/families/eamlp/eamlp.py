"""EAMLP: a vision transformer whose attention reads learned memories, external attention (arXiv 2105.02358).

What the paper leaves to the authors' checkpoints (the stem, four times the heads, one class token, fixed positions) is
built so that these load: see `checkpoint_filter_fn`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, get_act_layer, global_pool_nlc, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import register_model
from torch import nn

from ...models._base import CheckedModel, base_cfg, build, check_images, default_cfgs_of, override
from .attention import ExternalAttention
from .checkpoint import checkpoint_filter_fn

__all__ = ["EAMLP", "EAMLPBlock", "EAMLPCfg", "TokensToToken"]

torch.fx.wrap("check_images")
torch.fx.wrap("add_positions")

POOLS = ("token", "avg", "avgmax", "max", "")


@dataclass(frozen=True)
class EAMLPCfg:
    """The architecture of one EAMLP."""

    dim: int = 384  # channels of a token
    depth: int = 14  # blocks
    num_heads: int = 6  # external attention has `expansion` times as many
    mlp_ratio: float = 3.0  # hidden over block channels of the MLPs
    expansion: int = 4  # channels inside external attention over those of a token
    num_slots: int = 64  # rows of the memories
    stem_dim: int = 64  # channels of the stem's two attentions
    stem_slots: int = 128
    drop_path_rate: float = 0.0  # of the last block, rising linearly from 0
    act_layer: str = "gelu"
    image_size: int = 224  # the authors' training size; any size runs


cfgs: dict[str, EAMLPCfg] = dict(
    eamlp_7=EAMLPCfg(dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    eamlp_14=EAMLPCfg(),
    eamlp_19=EAMLPCfg(dim=448, depth=19, num_heads=7),
)


def add_positions(x: torch.Tensor) -> torch.Tensor:
    """Add the fixed sinusoid of each token's place in the sequence, whatever its length.

    Channel 2 i of place p gets sin(p / 10000 ** (2 i / dim)), channel 2 i + 1 its cosine.

    Shape: (batch, tokens, dim) -> the same.
    """
    # in float64, since float32 is off by 1e-5 at angles of some hundred; Apple's GPUs have none
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    place = torch.arange(x.shape[1], device=x.device, dtype=exact)
    channel = torch.arange(x.shape[2], device=x.device)
    angle = place[:, None] * 10000.0 ** (-2.0 * (channel // 2).to(exact) / x.shape[2])
    return x + torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(x.dtype)


class StemBlock(nn.Module):
    """External attention from `dim` to `dim_out` channels, one head, then an MLP; both pre-norm.

    Shape: (batch, tokens, dim) -> (batch, tokens, dim_out).
    """

    def __init__(self, dim: int, dim_out: int, num_slots: int, act_layer: str, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        # the channels change, so the residual is the projected input
        self.attn = ExternalAttention(
            dim, dim_out, num_slots=num_slots, value_bias=True, skip=True, mirror_init=True, **dd
        )
        self.norm2 = LayerNorm(dim_out, eps=1e-5, **dd)
        self.mlp = Mlp(dim_out, dim_out, act_layer=get_act_layer(act_layer), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """The stem: overlapping patches become tokens, with attention among them before each of the last two splits.

    Shape: (batch, in_chans, H, W), H and W multiples of 16 -> (batch, H / 16 * W / 16, dim), row by row.
    """

    def __init__(self, cfg: EAMLPCfg, in_chans: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attention1 = StemBlock(in_chans * 7 * 7, cfg.stem_dim, cfg.stem_slots, cfg.act_layer, **dd)
        self.attention2 = StemBlock(cfg.stem_dim * 3 * 3, cfg.stem_dim, cfg.stem_slots, cfg.act_layer, **dd)
        self.project = nn.Linear(cfg.stem_dim * 3 * 3, cfg.dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width = x.shape[0], x.shape[2] // 4, x.shape[3] // 4
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = x.transpose(1, 2).reshape(batch, x.shape[2], height, width)
        x = self.attention2(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))
        x = x.transpose(1, 2).reshape(batch, x.shape[2], height // 2, width // 2)
        return self.project(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))


class EAMLPBlock(nn.Module):
    """Pre-norm block: multi-head external attention, then an MLP.

    Shape: (batch, tokens, dim) -> the same.
    """

    def __init__(self, cfg: EAMLPCfg, drop_path_rate: float, proj_drop_rate: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(cfg.dim, eps=1e-5, **dd)
        self.attn = ExternalAttention(
            cfg.dim,
            num_heads=cfg.expansion * cfg.num_heads,
            dim_head=cfg.dim // cfg.num_heads,
            num_slots=cfg.num_slots,
            key_bias=True,
            value_bias=True,
            proj_drop=proj_drop_rate,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(cfg.dim, eps=1e-5, **dd)
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.mlp = Mlp(cfg.dim, hidden, act_layer=get_act_layer(cfg.act_layer), drop=proj_drop_rate, **dd)
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class EAMLP(CheckedModel, nn.Module):
    """EAMLP: tokens-to-token stem, class token, fixed positions, blocks of external attention, norm, classifier.

    Shape: (batch, in_chans, H, W) -> (batch, num_classes); any H, W. Sides that are not a multiple of 16 are padded
    with zeros at the bottom and right, as timm's `dynamic_img_pad` does; features have ceil(H / 16) x ceil(W / 16)
    pixels.

    Args:
        cfg: the variant; any field of `EAMLPCfg` can be overridden by a keyword argument of its name.
        num_classes, in_chans, drop_rate, proj_drop_rate: as in timm.
        global_pool: "token" (the class token), "avg", "max", "avgmax", or "" for all tokens.
        img_size: ignored, since any size runs.

    Raises:
        ValueError: for sizes that do not fit, with the numbers.
        TypeError: for an unknown argument, with the known ones.
    """

    no_decay = ("cls_token",)

    def __init__(
        self,
        cfg: EAMLPCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__()
        cfg = override(cfg, kwargs, "EAMLP", ("global_pool", "img_size", "drop_rate", "proj_drop_rate"))
        _check_cfg(cfg)
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.patch_size = 16  # pixels a token, a side; what the stem's three strides make
        self.num_prefix_tokens = 1  # the class token
        self.num_features = self.embed_dim = self.head_hidden_size = cfg.dim
        self.grad_checkpointing = False
        self.tokens_to_token = TokensToToken(cfg, in_chans, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.dim, **dd))
        rates = torch.linspace(0, cfg.drop_path_rate, cfg.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*[EAMLPBlock(cfg, rate, proj_drop_rate, **dd) for rate in rates])
        self.norm = LayerNorm(cfg.dim, eps=1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            dict(num_chs=cfg.dim, reduction=self.patch_size, module=f"blocks.{i}") for i in range(cfg.depth)
        ]
        self._set_head(num_classes, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal with standard deviation 0.02, biases 0; the stem's second memories copy the first."""
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ExternalAttention):
                module.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from the image to the classifier."""
        return dict(stem=r"^cls_token|^tokens_to_token", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; num_classes 0 for none, global_pool None for the pooling there is, "" for none."""
        pool = self.global_pool if global_pool is None else global_pool
        self._set_head(num_classes, pool, device=self.cls_token.device, dtype=self.cls_token.dtype)
        self.head.train(self.training)

    def _set_head(self, num_classes: int, global_pool: str, device, dtype) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        )

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the sequence of class token and patches, with positions."""
        x = check_images(x, self.in_chans)
        x = self.tokens_to_token(F.pad(x, [0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size]))
        return add_positions(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What `forward_features` returns, and the blocks' outputs.

        Args:
            x: images.
            indices: the last n blocks if an int, these if a list, all if None.
            return_prefix_tokens: pairs of a map and its class token, (batch, 1, dim), in place of maps.
            norm: apply the final norm to each.
            stop_early: compute nothing behind the last of them.
            output_fmt: "NCHW", or "NLC" for tokens without the class token.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        height, width = -(-x.shape[2] // self.patch_size), -(-x.shape[3] // self.patch_size)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self._tokens(x)
        taken = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint_seq(nn.Sequential(block), x) if self.grad_checkpointing else block(x)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)
        intermediates: list[Any] = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            intermediates = [
                y.reshape(len(y), height, width, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates
            ]
        if return_prefix_tokens:
            prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of `indices`, and the final norm and the classifier if told."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_chans, H, W) -> (batch, 1 + tokens, dim), the class token first."""
        x = self._tokens(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _check_cfg(cfg: EAMLPCfg) -> None:
    least = min(cfg.depth, cfg.num_heads, cfg.expansion, cfg.num_slots, cfg.stem_dim, cfg.stem_slots)
    if least < 1 or int(cfg.dim * cfg.mlp_ratio) < 1:
        raise ValueError(f"every size must be >= 1, got {cfg}")
    if cfg.dim % cfg.num_heads:
        raise ValueError(f"{cfg.dim} channels cannot be divided among num_heads={cfg.num_heads}")


def _create_eamlp(variant: str, pretrained: bool = False, **kwargs) -> EAMLP:
    return build(
        EAMLP,
        variant,
        pretrained,
        _cfg(),
        model_cfg=cfgs[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


def _cfg() -> dict[str, Any]:
    """Crop and interpolation are this package's choice: those of tokens-to-token transformers in timm's tradition."""
    return base_cfg(
        224,
        min_input_size=(3, 32, 32),
        crop_pct=0.9,
        first_conv=(),  # a linear layer over unfolded patches, which `checkpoint_filter_fn` adapts
        classifier="head",
        paper_ids="arXiv:2105.02358",
        paper_name="Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks",
    )


default_cfgs = default_cfgs_of({variant: _cfg() for variant in cfgs})


@register_model
def eamlp_7(pretrained: bool = False, **kwargs) -> EAMLP:
    """EAMLP, 6.1 million parameters."""
    return _create_eamlp("eamlp_7", pretrained, **kwargs)


@register_model
def eamlp_14(pretrained: bool = False, **kwargs) -> EAMLP:
    """EAMLP, 29.8 million parameters."""
    return _create_eamlp("eamlp_14", pretrained, **kwargs)


@register_model
def eamlp_19(pretrained: bool = False, **kwargs) -> EAMLP:
    """EAMLP, 54.5 million parameters."""
    return _create_eamlp("eamlp_19", pretrained, **kwargs)

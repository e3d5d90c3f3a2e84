"""What pyramids of attention blocks have in common: stages that give maps, and what timm asks of a model."""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import nn

from ._base import CheckedModel, check_images

torch.fx.wrap("check_images")


class PyramidNet(CheckedModel, nn.Module):
    """A stem, four stages, something behind the last, pooling and a classifier.

    A subclass makes `stem`, `stages` (each with a flag `grad_checkpointing`, each giving (batch, dim, H, W)),
    `feature_info`, `num_features`, `in_chans` and `drop_rate`, and calls `_set_head`. It says in `forward_tail` what
    follows the last stage, and in `_drop_tail` how that is removed.
    """

    if TYPE_CHECKING:  # TorchScript takes annotations of a class for its own
        stem: nn.Module
        stages: nn.Sequential
        num_features: int
        in_chans: int
        drop_rate: float
        feature_info: list[dict[str, Any]]

    def forward_tail(self, x: torch.Tensor) -> torch.Tensor:
        """The layers after the last stage, applied to its output."""
        raise NotImplementedError

    def _drop_tail(self) -> None:
        raise NotImplementedError

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's output as `forward_intermediates(norm=True)` gives it."""
        return x

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier; num_classes 0 for none, global_pool None for the pooling there is, "" for none."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        weight = next(self.stem.parameters())
        self._set_head(num_classes, pool, device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)

    def _set_head(self, num_classes: int, global_pool: str, device, dtype) -> None:
        self.num_classes = num_classes
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, self.drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """What `forward_features` returns, and the stages' outputs.

        Args:
            x: images.
            indices: the last n stages if an int, these if a list, all if None.
            norm: put the last stage's through the final norm, where that is not a part of the stage.
            stop_early: compute nothing behind the last of them.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        x = self.stem(check_images(x, self.in_chans))
        stages = self.stages[: max_index + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self._normed(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.forward_tail(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`; what follows them if told or if it no longer fits."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self._drop_tail()
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(check_images(x, self.in_chans))
        x = self.stages(x)
        return self.forward_tail(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

"""Functions on tensors: what is computed, and how fast."""

from .dispatch import BACKENDS, backend_for, can_run_reference, use_backend
from .functional import halo_attention, halo_attention_weights, scriptable_halo_attention
from .neighbourhood import blocked_attention, cut_windows

__all__ = [
    "BACKENDS",
    "backend_for",
    "blocked_attention",
    "can_run_reference",
    "cut_windows",
    "halo_attention",
    "halo_attention_weights",
    "scriptable_halo_attention",
    "use_backend",
]

"""What one attention layer launches in training next to its convolutions; gradients of keys and values as one tensor."""

import functools
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_halonet.layers import HaloAttention
from timm_halonet.ops import custom_op, packed, triton
from timm_halonet.ops.options import Options
from timm_halonet.ops.packed import split_keys_and_values
from timm_halonet.ops.triton import triton_backward, triton_backward_packed, triton_forward

from .test_native import _inputs, _options
from .test_triton import DEVICE, interpreter  # noqa: F401

# what launches nothing: views, and memory that nobody fills
NOTHING = "as_strided detach empty empty_strided expand new_empty permute select slice split split_with_sizes t unsqueeze"
NOTHING += " view _unsafe_view alias transpose unbind"


class _Launched(TorchDispatchMode):
    """The operators that launch kernels, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NOTHING.split():
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class _Kernels:
    """In place of the kernels: counted, and gradients of a layer that are no numbers are left as they are."""

    def __init__(self, counts):
        self.counts = counts

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return {None: functools.partial(self._launch, name)}.__class__.fromkeys([None]) and _Launcher(self.counts, name)


class _Launcher:
    def __init__(self, counts, name):
        self.counts, self.name = counts, name

    def __getitem__(self, grid):
        def launch(*args, **meta):
            self.counts[self.name] += 1

        return launch

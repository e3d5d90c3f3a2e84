"""Puts this package's attention into timm's own halo models."""

from typing import TypeVar

from torch import jit, nn

from .layers import HaloAttention
from .layers.halo_attention import RelativePositionTables
from .ops.options import make_options

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Replace every HaloAttn of timm inside `model`, in place, by this package's `HaloAttention` computing the same.

    Outputs and gradients stay equal to rounding (1e-5 in float32) at the sizes that timm's layer takes, multiples of
    its block size. Other sizes work too; missing pixels are not used as keys. Each layer stays the same object and only
    changes its class: parameters, buffers, state-dict keys and their order, hooks, mode, dtype and device stay as they
    are. So earlier optimisers, moving averages and checkpoints remain valid. BottleneckAttn and LambdaLayer are not
    replaced and keep their own limits on the size.

    Outputs of the layers are contiguous, as timm's are, whatever the memory format of the input. That is one copy from
    the channels_last that the op writes; a step of halonet26t at 256 px takes as long as without it, to 2 %.

    Call it before torch.compile, torch.jit.script, torch.fx or torch.export. A model accelerated before comes back
    unchanged.

    Args:
        model: any module that contains `timm.layers.halo_attn.HaloAttn`, or is one.

    Returns:
        `model` itself.

    Raises:
        ValueError: it is not a module, has no HaloAttn, is compiled or scripted, or a HaloAttn is not timm's own: a
            subclass, another forward, hooks that would no longer run. The model is then unchanged.
    """
    from timm.layers.halo_attn import HaloAttn

    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate takes a torch.nn.Module, got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        where = f"{path or 'the model itself'} ({type(module).__name__})"
        if isinstance(module, jit.ScriptModule):
            raise ValueError(f"{where} is a TorchScript module: accelerate the model before torch.jit.script or trace")
        # an OptimizedModule, or a module compiled in place by module.compile()
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{where} is compiled already: accelerate the model first, then call torch.compile")
        if isinstance(module, HaloAttn):
            problem = _unknown(module)
            if problem:
                raise ValueError(f"{where} cannot be accelerated: {problem}")
            found.append(module)
    if not found and not any(isinstance(module, HaloAttention) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} contains no HaloAttn of timm: nothing to accelerate "
            "(a traced or exported model has no such modules any more: accelerate it first)"
        )
    for module in found:
        _convert(module)
    return model


def _unknown(module) -> str | None:
    """None, or why a HaloAttn may compute something else than the one of timm does."""
    from timm.layers.halo_attn import HaloAttn, PosEmbedRel

    tables = module.pos_embed
    known: type[nn.Module]
    for what, part, known in (("it", module, HaloAttn), ("its pos_embed", tables, PosEmbedRel)):
        if type(part) is not known:
            return f"{what} is a {type(part).__module__}.{type(part).__qualname__}, not timm's {known.__name__} itself"
        forward = part.__dict__.get("forward") or known.forward
        if "forward" in part.__dict__ or forward.__module__ != known.__module__:
            return f"{what} has a forward of its own, {forward!r}"
    if tables._forward_hooks or tables._forward_pre_hooks or tables._backward_hooks or tables._backward_pre_hooks:
        return "hooks on its pos_embed would never run, since only the tables of it are used"
    return None


def _convert(module) -> None:
    # HaloAttention takes the parameters and the attributes of HaloAttn by the names they have there; what it has as
    # properties goes into the options, which make the function timm's
    module.strided_rel = "grid"
    module.backend = None
    module.contiguous_output = True
    attributes = vars(module)
    block_size, scale = attributes.pop("block_size"), attributes.pop("scale")
    module.options = make_options(
        block_size,
        attributes.pop("halo_size"),
        module.block_stride,
        scale,
        attributes.pop("scale_pos_embed"),
        False,
        module.strided_rel,
    )
    # As in HaloAttention, an odd map's last row pools what it has. timm's never sees one with an even block size; with
    # an odd one it does, and drops the row.
    if isinstance(module.pool, nn.AvgPool2d) and block_size % 2 == 0:
        module.pool.ceil_mode = True
    module.pos_embed.__class__ = RelativePositionTables
    module.__class__ = HaloAttention

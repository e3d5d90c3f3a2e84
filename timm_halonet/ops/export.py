"""Halo attention as exporters want it: few large matrix products, and nothing that an engine might not have.

The function is the reference's; `halo_attention_reference` stays its definition. What is different:

- *Windows are put together from blocks.* A window is its block and parts of the blocks after it, in a map shifted by
  the halo: slices and one concatenation for the rows, the same for the columns. No index and no unfold.
- *Relative logits join the product of q and k.* The products of q with the two tables are more channels of q, and the
  keys have ones there, in the channel of their row and of their column. So the logits are one matrix product, and
  nothing of their size is added to them.
- *No masks on the logits, and no infinite or large constants*, which ruin the scale of an int8 model. Outside the
  image keys repeat the nearest pixel and take the smallest relative logits, so they never exceed the largest logit of
  the window. They take part in the softmax; then values of zero take them out of its sum, and a division by the
  weight of the pixels that exist takes them out of its denominator.

Tensors have at most five dimensions. Batch, height and width may be symbols, and everything here can be scripted.
"""

import torch
import torch.nn.functional as F

from .options import Options


def halo_attention_export(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Attend from every block of queries to its haloed window; shapes as in `timm_halonet.ops.halo_attention`."""
    block_size, halo_size, stride = options.block_size, options.halo_size, options.query_stride
    batch, height, width, heads, dim, dim_v = k.shape[0], k.shape[1], k.shape[2], k.shape[3], k.shape[4], v.shape[4]
    window, block_q = block_size + 2 * halo_size, block_size // stride
    down, across = (height + block_size - 1) // block_size, (width + block_size - 1) // block_size
    # known multiples of the block size need no padding up to one, and nothing cut off afterwards
    whole = _is_multiple(height, block_size) and _is_multiple(width, block_size)
    ring = 0 if options.mask_border else halo_size
    border = not whole or halo_size > ring

    # heads first: (batch * heads, blocks, ...) from here on
    below, beside = down * block_size - height, across * block_size - width
    kv = _windows(torch.cat([k, v], -1).permute(0, 3, 1, 2, 4), below, beside, down, across, whole, options)
    keys, values = kv[..., :dim], kv[..., dim:]
    q = q.permute(0, 3, 1, 2, 4)
    if not whole:
        q = F.pad(q, [0, 0, 0, across * block_q - q.shape[3], 0, down * block_q - q.shape[2]])
    q = q.reshape(_lead(batch * heads * down), block_q, across, block_q * dim).transpose(1, 2)
    q = q.reshape(_lead(batch * heads), down * across, block_q, block_q, dim)

    scaled = q * options.scale
    q_rel = scaled if options.scale_rel else q
    rel_h = torch.matmul(q_rel, _laid_out(rel_height, window, block_q, options.rel_step).to(q.dtype))
    rel_w = torch.matmul(q_rel.transpose(2, 3), _laid_out(rel_width, window, block_q, options.rel_step).to(q.dtype))
    seen = torch.ones(1, device=q.device)
    if border:
        rows, cols = _inside(down, height, ring, options, q.device), _inside(across, width, ring, options, q.device)
        rows = rows[:, None, :].expand(down, across, window).reshape(down * across, 1, window)
        cols = cols[None, :, :].expand(down, across, window).reshape(down * across, 1, window)
        rel_h = torch.where(rows[:, None], rel_h, rel_h.amin(-1, keepdim=True))
        rel_w = torch.where(cols[:, None], rel_w, rel_w.amin(-1, keepdim=True))
        seen = (rows.transpose(1, 2) & cols).reshape(down * across, window * window, 1).to(v.dtype)
        values = values * seen

    eye = torch.eye(window, dtype=q.dtype, device=q.device)
    places = torch.cat([eye.repeat_interleave(window, 0), eye.repeat(window, 1)], 1)
    q = torch.cat([scaled, rel_h, rel_w.transpose(2, 3)], -1).flatten(2, 3)
    keys = torch.cat([keys, places.expand(keys.shape[0], keys.shape[1], -1, -1)], -1)
    logits = torch.matmul(q, keys.transpose(2, 3))
    if logits.dtype != torch.float64:
        logits = logits.float()
    probs = logits.softmax(dim=-1).to(v.dtype)
    out = torch.matmul(probs, values)
    if border:
        out = out / torch.matmul(probs, seen)

    out = out.reshape(_lead(batch * heads * down), across, block_q, block_q * dim_v).transpose(1, 2)
    out = out.reshape(_lead(batch), heads, down * block_q, across * block_q, dim_v).permute(0, 2, 3, 1, 4)
    if not whole:
        out = out[:, : (height + stride - 1) // stride, : (width + stride - 1) // stride]
    return out.contiguous()


def _is_multiple(size: int, block_size: int) -> bool:
    """Whether it is known, without a condition on a size that may vary, that blocks cover the map exactly."""
    if torch.jit.is_scripting():
        return False
    else:
        # dynamo shows symbolic sizes as integers
        return isinstance(size, int) and not torch.compiler.is_dynamo_compiling() and size % block_size == 0


def _lead(size: int) -> int:
    """The first size of a reshape: what it is for symbols, which take minutes to divide; traced, what is left.

    OpenVINO 2026.4 computes garbage where a traced model multiplies sizes for it.
    """
    return -1 if torch.jit.is_scripting() or torch.jit.is_tracing() else size


def _windows(
    x: torch.Tensor, below: int, beside: int, down: int, across: int, whole: bool, options: Options
) -> torch.Tensor:
    """(batch, heads, height, width, dim) -> (batch * heads, blocks, keys of a window, dim)

    `below` and `beside` the map, the last blocks have as many pixels more than it. Outside it there is the nearest
    pixel, of the ring of zeros where the border is not masked.
    """
    block_size, halo_size = options.block_size, options.halo_size
    window, dim = block_size + 2 * halo_size, x.shape[4]
    further = (window - 1) // block_size  # blocks after the first that a window has parts of
    # on the right and at the bottom up to whole blocks; of the last ones slices use the first part
    end = further * block_size - halo_size
    if not options.mask_border and halo_size > 0:
        x = F.pad(x, [0, 0, halo_size, halo_size, halo_size, halo_size])
        pad = [0, 0, 0, beside + end - halo_size, 0, below + end - halo_size]
    else:
        pad = [0, 0, halo_size, beside + end, halo_size, below + end]
    if halo_size > 0 or not whole:
        x = F.pad(x, pad, mode="replicate")
    images = x.shape[0] * x.shape[1]
    x = x.reshape(_lead(images), down + further, block_size, (across + further) * block_size * dim)
    if further > 0:
        x = torch.cat(_pieces(x, 1, further, block_size, window, 1), 2)
    x = x.reshape(_lead(images * down), window, across + further, block_size * dim)
    if further > 0:
        x = torch.cat(_pieces(x, 2, further, block_size, window, dim), 3)
    return x.transpose(1, 2).reshape(_lead(images), down * across, window * window, dim)


def _pieces(x: torch.Tensor, dim: int, further: int, block_size: int, window: int, unit: int) -> list[torch.Tensor]:
    """Of blocks along `dim`, each `unit * block_size` long in the next dimension, those that make up the windows."""
    pieces = []
    for i in range(further + 1):
        size = min(block_size, window - i * block_size) * unit
        end = i - further if i < further else 9223372036854775807  # the last goes to the end, in TorchScript too
        pieces.append(x[:, i:end, :size] if dim == 1 else x[:, :, i:end, :size])
    return pieces


def _laid_out(table: torch.Tensor, window: int, block_q: int, step: int) -> torch.Tensor:
    """(2 * window - 1, dim) -> (query's place in its block, dim, key's place in the window)"""
    rows = [table[window - 1 - i * step : 2 * window - 1 - i * step] for i in range(block_q)]
    return torch.stack(rows).transpose(1, 2)


def _inside(blocks: int, size: int, ring: int, options: Options, device: torch.device) -> torch.Tensor:
    """(blocks, window), True for the rows (or columns) that are keys: those of the map and of the ring around it."""
    window = options.block_size + 2 * options.halo_size
    first = torch.arange(blocks, device=device)[:, None] * options.block_size - options.halo_size
    places = first + torch.arange(window, device=device)[None, :]
    return (places >= -ring) & (places < size + ring)

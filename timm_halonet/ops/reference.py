"""Halo attention in plain PyTorch operators: the definition of correct, and the path that exporters trace.

Any device, any dtype up to float64, any H, W >= 1. Memory grows with the whole map's logits: the other backends
exist so that nobody has to pay that. Everything here can be scripted, exported and traced with dynamic sizes.
"""

import torch
import torch.nn.functional as F

from .options import Options


def halo_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Attend from every block of queries to its haloed window; shapes as in `timm_halonet.ops.halo_attention`."""
    probs, v_win = _probabilities(q, k, v, rel_height, rel_width, options)
    # heads * value dim last, then (batch, blocks down, block, blocks across, block, heads, dim) -> map
    out = torch.einsum("bijnyxuw,biujwnd->biyjxnd", probs.to(v.dtype), v_win)
    height, width = q.shape[1], q.shape[2]
    out = out.reshape(q.shape[0], out.shape[1] * out.shape[2], out.shape[3] * out.shape[4], q.shape[3], v.shape[4])
    # by index, not by slices: exported, the strides of a view would fix H and W
    rows, cols = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    return out.index_select(1, rows).index_select(2, cols)


def attention_weights_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Softmax weights (batch, blocks down, blocks across, heads, query rows, query columns, window, window)."""
    probs, _ = _probabilities(q, k, k, rel_height, rel_width, options)
    return probs


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    block_size, halo_size, scale = options.block_size, options.halo_size, options.scale
    height, width = k.shape[1], k.shape[2]
    window = block_size + 2 * halo_size
    block_q = block_size // options.query_stride
    query_height, query_width = q.shape[1], q.shape[2]
    blocks_h = (height + block_size - 1) // block_size
    blocks_w = (width + block_size - 1) // block_size

    # up to whole blocks on the right and bottom, plus the halo all around
    pad = [
        0, 0, 0, 0,
        halo_size, blocks_w * block_size - width + halo_size,
        halo_size, blocks_h * block_size - height + halo_size,
    ]  # fmt: skip
    key_pos = torch.arange(window, device=q.device)
    rows = torch.arange(blocks_h, device=q.device)[:, None] * block_size + key_pos[None, :]
    cols = torch.arange(blocks_w, device=q.device)[:, None] * block_size + key_pos[None, :]
    k_win, v_win = _windows(F.pad(k, pad), rows, cols), _windows(F.pad(v, pad), rows, cols)
    q = F.pad(q, [0, 0, 0, 0, 0, blocks_w * block_q - q.shape[2], 0, blocks_h * block_q - q.shape[1]])
    q = q.reshape(q.shape[0], blocks_h, block_q, blocks_w, block_q, q.shape[3], q.shape[4])

    # row of the table for (query row in its block, key row in the window)
    query_pos = torch.arange(block_q, device=q.device) * options.rel_step
    index = key_pos[None, :] - query_pos[:, None] + (window - 1)
    logits = torch.einsum("biyjxnd,biujwnd->bijnyxuw", q * scale, k_win)
    q_rel = q * scale if options.scale_rel else q
    # keys that may be seen: the image, and where the border is not masked the ring of zeros of width halo around it
    ring = 0 if options.mask_border else halo_size
    row_ok = (rows - halo_size >= -ring) & (rows - halo_size < height + ring)
    col_ok = (cols - halo_size >= -ring) & (cols - halo_size < width + ring)
    # rows of the tables that no key of a block uses are zeros there: the gradient of q is a sum over them too, and a
    # weight of 0 does not keep a NaN out
    table_h = rel_height[index].to(q.dtype)[None].masked_fill(~row_ok[:, None, :, None], 0.0)
    table_w = rel_width[index].to(q.dtype)[None].masked_fill(~col_ok[:, None, :, None], 0.0)
    rel_h = torch.einsum("biyjxnd,iyud->bijnyxu", q_rel, table_h)
    rel_w = torch.einsum("biyjxnd,jxwd->bijnyxw", q_rel, table_w)
    logits = logits + rel_h[..., :, None] + rel_w[..., None, :]
    if logits.dtype != torch.float64:
        logits = logits.float()

    # what stands in for a logit is a constant: for keys that are not seen, and for queries beyond the map, which have
    # no part in any gradient either
    row_real = torch.arange(blocks_h * block_q, device=q.device).reshape(blocks_h, block_q) < query_height
    col_real = torch.arange(blocks_w * block_q, device=q.device).reshape(blocks_w, block_q) < query_width
    seen = row_ok[:, None, :, None] & col_ok[None, :, None, :]  # blocks_h, blocks_w, window, window
    real = row_real[:, None, :, None] & col_real[None, :, None, :]  # blocks_h, blocks_w, block_q, block_q
    constant = torch.zeros(seen.shape, dtype=logits.dtype, device=q.device).masked_fill(~seen, float("-inf"))
    both = seen[:, :, None, None, None] & real[:, :, None, :, :, None, None]
    logits = torch.where(both, logits, constant[:, :, None, None, None])
    probs = logits.flatten(-2).softmax(dim=-1).reshape(logits.shape)
    return probs, v_win


def _windows(x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Of a padded map (batch, H, W, heads, dim), the windows (batch, blocks_h, window, blocks_w, window, heads, dim).

    Selected by index, not unfolded: ONNX has no unfold of sizes that are not known.
    """
    x = x.index_select(1, rows.flatten()).index_select(2, cols.flatten())
    return x.reshape(x.shape[0], rows.shape[0], rows.shape[1], cols.shape[0], cols.shape[1], x.shape[3], x.shape[4])

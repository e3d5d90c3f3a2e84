"""Halo attention over cache-sized groups of equal blocks, in PyTorch operators, for any device.

Never holds the whole map's logits: the forward works through groups of images and blocks whose logits fit in
`LOGITS_PER_GROUP`, and the backward recomputes them, as flash attention does.

Three ideas carry it:

- *No masks.* The blocks of a map fall into at most a few classes per dimension (first, inner, last ones) whose windows,
  once clipped to the image, have equal size. A class is one batched product over exactly the keys that exist, so a
  3x3 map costs nine keys, not a 14x14 window.
- *Relative logits inside the product.* With one-hot rows e_u, e_w for a key's row and column in the window,
  `[scale * q, q.r_h, q.r_w] . [k, e_u, e_w]` is the whole logit: one matrix product writes it, and the gradient of
  q.r_h and q.r_w is part of the gradient of the longer q. No bias tensor of the logits' size is read or added.
- *Skewed views.* q.r_h for window row u and query row y is column u - y + c of the product of q with the whole table,
  that is, a view of it with a smaller row stride: no gather, and its gradient is a copy through the same view.
"""

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .options import Options

# Logits of one group of blocks (this package's choice): 1 Mi elements are 2 MB in bf16, with the keys and values beside
# them about what the caches of a few CPU cores hold.
LOGITS_PER_GROUP = 1 << 20


class _Span(NamedTuple):
    """Neighbouring blocks along one dimension whose clipped windows are alike."""

    query: int  # first query
    queries: int  # queries a block
    key: int  # first key of the first block's window
    keys: int  # keys a window
    blocks: int  # number of blocks
    clip: int  # rows of the full window that lie outside, at its start


def _spans(length: int, queries: int, block_size: int, halo_size: int, stride: int, ring: int) -> list[_Span]:
    block_q = block_size // stride
    spans = []
    for i in range((length + block_size - 1) // block_size):
        start = i * block_size - halo_size
        first = max(start, -ring)
        last = min(start + block_size + 2 * halo_size, length + ring)
        n = min(block_q, queries - i * block_q)
        spans.append(_Span(i * block_q, n, first + ring, last - first, 1, first - start))
    merged = []
    for _, group in groupby(spans, key=lambda s: (s.queries, s.keys, s.clip)):
        members = list(group)
        merged.append(members[0]._replace(blocks=len(members)))
    return merged


class _Group:
    """One class of blocks of one chunk of images: the views and the long queries and keys its product needs.

    Shapes, with n = images * blocks down * blocks across * heads: q_long (n, queries, long), k_long (n, keys, long),
    v (n, keys, d_v); long = d_qk + window rows + window columns.
    """

    def __init__(self, q, k, v, rel, rows: _Span, cols: _Span, options: Options):
        self.rows, self.cols, self.block_size = rows, cols, options.block_size
        self.block_q = options.block_size // options.query_stride
        self.scale, self.scale_rel, self.steps = options.scale, options.scale_rel, options.rel_step
        window = options.block_size + 2 * options.halo_size
        images, heads, dim = q.shape[0], q.shape[3], q.shape[4]
        self.lead = (images, rows.blocks, cols.blocks, heads)
        n = images * rows.blocks * cols.blocks * heads
        queries, keys = rows.queries * cols.queries, rows.keys * cols.keys
        long = dim + rows.keys + cols.keys
        self.dim, self.table = dim, rel.shape[0] // 2

        self.q = q.new_empty(n, queries, dim)
        self.q.view(*self.lead, rows.queries, cols.queries, dim).copy_(self.query_view(q))
        # where, in the product of q with the tables, the entry for query 0 and the window's first kept key stands
        self.first = (rows.clip + window - 1, cols.clip + window - 1)
        self.q_long = q.new_empty(n, queries, long)
        self.q_long[..., :dim].copy_(self.q * self.scale)
        product = torch.matmul(self.q_rel(), rel.t())  # n, queries, height table and width table
        rel_h, rel_w = self.skewed(product)
        self.long_view(self.q_long, dim, rows.keys).copy_(rel_h)
        self.long_view(self.q_long, dim + rows.keys, cols.keys).copy_(rel_w)

        self.k_long = k.new_zeros(n, keys, long)
        k_view = self.k_long.view(*self.lead, rows.keys, cols.keys, long)
        k_view[..., :dim].copy_(self.window_view(k))
        k_view[..., dim : dim + rows.keys].diagonal(dim1=-3, dim2=-1).fill_(1)
        k_view[..., dim + rows.keys :].diagonal(dim1=-2, dim2=-1).fill_(1)
        self.v = v.new_empty(n, keys, v.shape[4])
        self.v.view(*self.lead, rows.keys, cols.keys, v.shape[4]).copy_(self.window_view(v))

    def q_rel(self):
        return self.q * self.scale if self.scale_rel else self.q

    def query_view(self, x):
        """(images, queries down, queries across, heads, d) -> (images, blocks, blocks, heads, rows, columns, d)"""
        r, c = self.rows, self.cols
        x = x[:, r.query : r.query + (r.blocks - 1) * self.block_q + r.queries]
        x = x[:, :, c.query : c.query + (c.blocks - 1) * self.block_q + c.queries]
        return x.unfold(1, r.queries, self.block_q).unfold(2, c.queries, self.block_q).permute(0, 1, 2, 3, 5, 6, 4)

    def window_view(self, x):
        """(images, H, W, heads, d) -> (images, blocks, blocks, heads, window rows, window columns, d)"""
        r, c = self.rows, self.cols
        x = x[:, r.key : r.key + (r.blocks - 1) * self.block_size + r.keys]
        x = x[:, :, c.key : c.key + (c.blocks - 1) * self.block_size + c.keys]
        return x.unfold(1, r.keys, self.block_size).unfold(2, c.keys, self.block_size).permute(0, 1, 2, 3, 5, 6, 4)

    def long_view(self, x, start, size):
        """Columns start to start + size of a long query as (n, query rows, query columns, size)."""
        return x.view(x.shape[0], self.rows.queries, self.cols.queries, -1)[..., start : start + size]

    def skewed(self, product):
        """The two relative logits (n, query rows, query columns, window rows or columns) as views of q times tables."""
        rows, cols, width = self.rows, self.cols, product.shape[-1]
        n, per_row = product.shape[0], cols.queries * width
        rel_h = product.as_strided(
            (n, rows.queries, cols.queries, rows.keys),
            (rows.queries * per_row, per_row - self.steps, width, 1),
            self.first[0],
        )
        rel_w = product.as_strided(
            (n, rows.queries, cols.queries, cols.keys),
            (rows.queries * per_row, per_row, width - self.steps, 1),
            self.table + self.first[1],
        )
        return rel_h, rel_w

    def probs(self):
        return torch.bmm(self.q_long, self.k_long.transpose(1, 2)).softmax(dim=-1)

    def add_windows(self, target, grad):
        """target (images, H, W, heads, d) += grad (n, keys, d), window by window.

        Windows overlap, but a block-sized piece of each window does not overlap the same piece of its neighbours, so
        the sum is one strided in-place addition a piece: deterministic, without atomics.
        """
        r, c, b = self.rows, self.cols, self.block_size
        grad = grad.view(*self.lead, r.keys, c.keys, grad.shape[-1])
        for u in range(0, r.keys, b):
            high = min(b, r.keys - u)
            for w in range(0, c.keys, b):
                wide = min(b, c.keys - w)
                y, x = r.key + u, c.key + w
                view = target[:, y : y + (r.blocks - 1) * b + high, x : x + (c.blocks - 1) * b + wide]
                view = view.unfold(1, high, b).unfold(2, wide, b).permute(0, 1, 2, 3, 5, 6, 4)
                view.add_(grad[..., u : u + high, w : w + wide, :])


def _groups(q, k, v, rel, ring: int, options: Options):
    """Yields (slice of images, group) over all classes of blocks, chunked by images."""
    block_size, halo_size, stride = options.block_size, options.halo_size, options.query_stride
    batch, heads = q.shape[0], q.shape[3]
    height, width = k.shape[1] - 2 * ring, k.shape[2] - 2 * ring
    for rows in _spans(height, q.shape[1], block_size, halo_size, stride, ring):
        for cols in _spans(width, q.shape[2], block_size, halo_size, stride, ring):
            per_block_row = cols.blocks * heads * rows.queries * cols.queries * rows.keys * cols.keys
            # as many block rows as fit, and only if all of them fit, several images
            step = max(1, min(rows.blocks, LOGITS_PER_GROUP // per_block_row))
            images = max(1, LOGITS_PER_GROUP // (per_block_row * step)) if step == rows.blocks else 1
            for first in range(0, rows.blocks, step):
                part = rows._replace(
                    query=rows.query + first * (block_size // stride),
                    key=rows.key + first * block_size,
                    blocks=min(step, rows.blocks - first),
                )
                for i in range(0, batch, images):
                    s = slice(i, i + images)
                    yield s, _Group(q[s], k[s], v[s], rel, part, cols, options)


def _prepare(q, k, v, rel_height, rel_width, options: Options):
    ring = 0 if options.mask_border else options.halo_size
    if ring:  # keys and values of the ring around the image are zeros that take part
        k, v = (F.pad(x, (0, 0, 0, 0, ring, ring, ring, ring)) for x in (k, v))
    return k, v, torch.cat([rel_height, rel_width]).to(q.dtype), ring


def can_run_blocked(q: torch.Tensor) -> str | None:
    """None, or why the blocked backend cannot run on such tensors: it always can."""
    return None


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """Nothing is kept for the backward but the inputs."""
    return q.new_empty(0)


def blocked_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`. The output is contiguous."""
    k, v, rel, ring = _prepare(q, k, v, rel_height, rel_width, options)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    for s, g in _groups(q, k, v, rel, ring, options):
        y = torch.bmm(g.probs(), g.v)
        g.query_view(out[s]).copy_(y.view(*g.lead, g.rows.queries, g.cols.queries, -1))
    return out, saved_like(q)


def blocked_backward(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; the logits are computed again."""
    k, v, rel, ring = _prepare(q, k, v, rel_height, rel_width, options)
    scale = options.scale
    wide = torch.promote_types(q.dtype, torch.float32)  # sums over windows, blocks and images are kept in float32
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    drel = torch.zeros(rel.shape, dtype=wide, device=rel.device)
    for s, g in _groups(q, k, v, rel, ring, options):
        dim = g.dim
        do = grad.new_empty(g.q.shape[0], g.q.shape[1], grad.shape[4])
        do.view(*g.lead, g.rows.queries, g.cols.queries, -1).copy_(g.query_view(grad[s]))
        p = g.probs()
        g.add_windows(dv[s], torch.bmm(p.transpose(1, 2), do))
        dp = torch.bmm(do, g.v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        g.add_windows(dk[s], torch.bmm(ds.transpose(1, 2), g.q * scale))
        dq_long = torch.bmm(ds, g.k_long)
        dproduct = torch.zeros(g.q.shape[0], g.q.shape[1], rel.shape[0], dtype=q.dtype, device=q.device)
        rel_h, rel_w = g.skewed(dproduct)
        rel_h.copy_(g.long_view(dq_long, dim, g.rows.keys))
        rel_w.copy_(g.long_view(dq_long, dim + g.rows.keys, g.cols.keys))
        drel += (dproduct.flatten(0, 1).t() @ g.q_rel().flatten(0, 1)).to(wide)
        dq_rel = torch.matmul(dproduct, rel)
        dq_group = dq_long[..., :dim] * scale + (dq_rel * scale if options.scale_rel else dq_rel)
        g.query_view(dq[s]).copy_(dq_group.view(*g.lead, g.rows.queries, g.cols.queries, dim))
    if ring:
        dk, dv = (x[:, ring:-ring, ring:-ring] for x in (dk, dv))
    half = rel_height.shape[0]
    # own memory for each, as a custom op's outputs must have
    return (
        dq,
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        drel[:half].to(rel_height.dtype, copy=True),
        drel[half:].to(rel_width.dtype, copy=True),
    )

"""Halo attention over cache-sized groups of equal blocks, in PyTorch operators, for any device.

Never holds the whole map's logits: the forward works through groups of images and blocks whose logits fit in
`LOGITS_PER_GROUP`, and the backward computes them again, as flash attention does. Everything is computed in float32
(float64 for float64 inputs), in place wherever that can be.

Five ideas carry it:

- *No masks.* The blocks of a map fall into at most a few classes per dimension (first, inner, last ones) whose windows,
  once clipped to the image, have equal size. A class is one batched product over exactly the keys that exist, so a
  3x3 map costs nine keys, not a 14x14 window.
- *Keys down, queries across.* Logits are (keys, queries): relative logits, maxima, sums over the window or over one
  of its dimensions all run along whole rows of queries, several times faster on a CPU than along rows of 14 keys.
- *Relative logits first.* Their sum starts the logits, and the product of k and q is added to it in place.
- *Skewed views.* q.r_h for window row u and query row y is column u - y + c of the product of q with the whole table,
  that is, a view of it with a smaller row stride: no gather, and its gradient is a copy through the same view.
- *Differences first.* The largest logit of a query is saved and subtracted from logits as they are. Only then come the
  factor log2(e), since exp2 is the faster function, and the division by the sum. So logits that are exact in float32
  stay exact, however large, in the backward too.
"""

import math
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .options import Options

# Logits of one group of blocks (this package's choice): 8 MB in float32. With fewer, calling PyTorch's functions costs
# more than what they compute; more leave a CPU's caches.
LOGITS_PER_GROUP = 1 << 21
LOG2_E = math.log2(math.e)


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


class _Scratch:
    """Memory by name, kept from group to group: fresh pages cost as much as the arithmetic on them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.empty = torch.empty(0, dtype=dtype, device=device)
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised tensor, valid until the name is used again."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.empty.new_empty(size)
        return self.buffers[name][:size].view(shape)


class _Group:
    """One class of blocks of one chunk of images: its queries, keys and values, block by block.

    Shapes, with n = images * blocks down * blocks across * heads: q (n, queries, d_qk), k (n, keys, d_qk),
    v (n, keys, d_v).
    """

    def __init__(self, q, k, v, rel, rows: _Span, cols: _Span, options: Options, scratch: _Scratch):
        self.rows, self.cols, self.block_size = rows, cols, options.block_size
        self.block_q = options.block_size // options.query_stride
        self.scale, self.steps = options.scale, options.rel_step
        self.window = options.block_size + 2 * options.halo_size
        self.lead = (q.shape[0], rows.blocks, cols.blocks, q.shape[3])
        self.n = math.prod(self.lead)
        self.queries, self.keys = rows.queries * cols.queries, rows.keys * cols.keys
        self.rel, self.table, self.scratch = rel, rel.shape[0] // 2, scratch
        self.q = self.gather("q", self.query_view(q))
        # scaled here, since BLAS does not compute a product times 0, and would lose its NaN
        self.scaled_q = torch.mul(self.q, self.scale, out=scratch("scaled_q", *self.q.shape))
        self.k, self.v = (self.gather(name, self.window_view(x)) for name, x in (("k", k), ("v", v)))

    def gather(self, name, view):
        """A copy of (images, blocks, blocks, heads, rows, columns, d) as (n, rows * columns, d)."""
        copy = self.scratch(name, *view.shape)
        copy.copy_(view)
        return copy.view(self.n, -1, view.shape[-1])

    def blocks_view(self, x, row, col, step, high, wide):
        """(images, height, width, heads, d) -> (images, blocks, blocks, heads, high, wide, d)

        The first of the blocks starts at (row, col), their neighbours `step` further on.
        """
        s = x.stride()
        size = (*self.lead, high, wide, x.shape[4])
        stride = (s[0], s[1] * step, s[2] * step, s[3], s[1], s[2], s[4])
        return x.as_strided(size, stride, x.storage_offset() + row * s[1] + col * s[2])

    def query_view(self, x):
        """(images, queries down, queries across, heads, d) -> (images, blocks, blocks, heads, rows, columns, d)"""
        r, c = self.rows, self.cols
        return self.blocks_view(x, r.query, c.query, self.block_q, r.queries, c.queries)

    def window_view(self, x):
        """(images, H, W, heads, d) -> (images, blocks, blocks, heads, window rows, window columns, d)"""
        r, c = self.rows, self.cols
        return self.blocks_view(x, r.key, c.key, self.block_size, r.keys, c.keys)

    def set_queries(self, x, value):
        """x (images, queries down, queries across, heads, d) takes value (n, queries, d)."""
        view = self.query_view(x)
        view.copy_(value.view(view.shape))

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
                view = self.blocks_view(target, r.key + u, c.key + w, b, high, wide)
                view.add_(grad[..., u : u + high, w : w + wide, :])

    def skewed(self, product):
        """The two relative logits, as views of a product of q with both tables (n, queries, tables).

        (n, window rows, 1, query rows, query columns) and (n, 1, window columns, query rows, query columns)
        """
        rows, cols, width = self.rows, self.cols, product.shape[-1]
        per_row = cols.queries * width
        # where the entry for query 0 and the window's first kept key stands
        first_h, first_w = rows.clip + self.window - 1, cols.clip + self.window - 1 + self.table
        n = product.shape[0]
        rel_h = product.as_strided(
            (n, rows.keys, 1, rows.queries, cols.queries),
            (rows.queries * per_row, 1, 0, per_row - self.steps, width),
            product.storage_offset() + first_h,
        )
        rel_w = product.as_strided(
            (n, 1, cols.keys, rows.queries, cols.queries),
            (rows.queries * per_row, 0, 1, per_row, width - self.steps),
            product.storage_offset() + first_w,
        )
        return rel_h, rel_w

    def used(self):
        """1 where a query uses a row of the tables (queries, tables), else 0; which ones is the same in all blocks."""
        used = self.rel.new_zeros(1, self.queries, 2 * self.table)
        for view in self.skewed(used):
            view.fill_(1)
        return used[0]

    def logits(self, minus=None):
        """Logits as (n, keys, queries), less `minus` (images, query rows, query columns, heads)."""
        product = self.scratch("product", self.n * self.queries, 2 * self.table)
        torch.mm(self.q.view(-1, self.q.shape[2]), self.rel.t(), out=product)
        rel_h, rel_w = (
            self.scratch(name, *view.shape).copy_(view)
            for name, view in zip(("rel_h", "rel_w"), self.skewed(product.view(self.n, self.queries, -1)), strict=True)
        )
        if minus is not None:
            rel_h -= self.query_view(minus[..., None]).reshape(self.n, 1, 1, self.rows.queries, self.cols.queries)
        logits = self.scratch("logits", self.n, self.rows.keys, self.cols.keys, self.queries)
        torch.add(rel_h.flatten(-2), rel_w.flatten(-2), out=logits)
        logits = logits.view(self.n, self.keys, self.queries)
        return logits.baddbmm_(self.k, self.scaled_q.transpose(1, 2))


class _Map:
    """A whole problem: the ring of zeros around the image where it takes part, tables ready for the logits, memory."""

    def __init__(self, q, k, v, rel_height, rel_width, options: Options):
        self.options = options
        self.ring = 0 if options.mask_border else options.halo_size
        if self.ring:  # keys and values of the ring around the image are zeros that take part
            pad = (0, 0, 0, 0, self.ring, self.ring, self.ring, self.ring)
            k, v = F.pad(k, pad), F.pad(v, pad)
        self.q, self.k, self.v = q, k, v
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.rel_factor = options.scale if options.scale_rel else 1.0
        rel = torch.cat([rel_height, rel_width]).to(q.dtype).to(self.dtype)
        self.rel = rel * self.rel_factor
        self.scratch = _Scratch(self.dtype, q.device)

    def _parts(self):
        """Yields the rows and the columns of a class of blocks, and how many images to take at once."""
        block_size, halo_size, stride = self.options[:3]
        batch, heads = self.q.shape[0], self.q.shape[3]
        height, width = self.k.shape[1] - 2 * self.ring, self.k.shape[2] - 2 * self.ring
        for rows in _spans(height, self.q.shape[1], block_size, halo_size, stride, self.ring):
            for cols in _spans(width, self.q.shape[2], block_size, halo_size, stride, self.ring):
                per_row = cols.blocks * heads * rows.queries * cols.queries * rows.keys * cols.keys
                # as many block rows as fit, of nearly equal number, and only if all of them fit, several images
                pieces = -(-rows.blocks // max(1, LOGITS_PER_GROUP // per_row))
                step = -(-rows.blocks // pieces)
                images = min(batch, max(1, LOGITS_PER_GROUP // (per_row * step))) if step == rows.blocks else 1
                for first in range(0, rows.blocks, step):
                    part = rows._replace(
                        query=rows.query + first * (block_size // stride),
                        key=rows.key + first * block_size,
                        blocks=min(step, rows.blocks - first),
                    )
                    yield part, cols, images

    def groups(self):
        """Yields (slice of images, group)."""
        for rows, cols, images in self._parts():
            for i in range(0, self.q.shape[0], images):
                s = slice(i, i + images)
                yield s, _Group(self.q[s], self.k[s], self.v[s], self.rel, rows, cols, self.options, self.scratch)


def can_run_blocked(q: torch.Tensor) -> str | None:
    """None, or why the blocked backend cannot run on such tensors: it always can."""
    return None


def saved_like(q: torch.Tensor) -> torch.Tensor:
    """What the backward needs next to inputs and output: the largest logit of each query."""
    return q.new_empty(q.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32))


def blocked_forward(q, k, v, rel_height, rel_width, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Halo attention; shapes as in `timm_halonet.ops.halo_attention`.

    Returns:
        The output, contiguous, and the largest logit of each query, (batch, query rows, query columns, heads), in
        float32 (float64 for float64 inputs).
    """
    out = q.new_empty(*q.shape[:4], v.shape[4])
    saved = saved_like(q)
    with torch.autocast(q.device.type, enabled=False):
        for s, g in _Map(q, k, v, rel_height, rel_width, options).groups():
            weights = g.logits()
            top = weights.amax(1, keepdim=True)
            total = weights.sub_(top).mul_(LOG2_E).exp2_().sum(1, keepdim=True)
            y = g.scratch("out", g.n, g.queries, v.shape[4])
            torch.bmm(weights.transpose(1, 2), g.v, out=y)
            g.set_queries(out[s], y.div_(total.transpose(1, 2)))
            g.set_queries(saved[s][..., None], top)
    return out, saved


def blocked_backward(
    grad, q, k, v, rel_height, rel_width, out, saved, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the two tables, each in its tensor's dtype; the logits are computed again.

    `saved` is the forward's, `out` not needed.
    """
    with torch.autocast(q.device.type, enabled=False):
        whole = _Map(q, k, v, rel_height, rel_width, options)
        # sums over windows, blocks and images are kept in float32
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.zeros(whole.k.shape, dtype=whole.dtype, device=k.device)
        dv = torch.zeros(whole.v.shape, dtype=whole.dtype, device=v.device)
        drel = torch.zeros_like(whole.rel)
        # a row that is not finite is zeros in products with the zeros of rows not used, and marked here instead
        rel_bad = (whole.rel - whole.rel).ne(0).to(whole.dtype)
        rel_finite = _finite(whole.rel)
        for s, g in whole.groups():
            _group_backward(g, rel_finite, rel_bad, grad[s], saved[s], dq[s], dk[s], dv[s], drel)
    if whole.ring:
        dk, dv = (x[:, whole.ring : -whole.ring, whole.ring : -whole.ring] for x in (dk, dv))
    drel *= whole.rel_factor
    half = rel_height.shape[0]
    # own memory for each, as a custom op's outputs must have
    return (
        dq,
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        drel[:half].to(rel_height.dtype, copy=True),
        drel[half:].to(rel_width.dtype, copy=True),
    )


def _finite(x):
    return x.nan_to_num(0.0, 0.0, 0.0)


def _group_backward(g: _Group, rel_finite, rel_bad, grad, saved, dq, dk, dv, drel) -> None:
    """Sets dq and adds to dk, dv and drel what one group of blocks gives to them."""
    do = g.gather("grad", g.query_view(grad))
    weights = g.logits(minus=saved).mul_(LOG2_E).exp2_()
    weights /= weights.sum(1, keepdim=True)
    # The gradients of a query's logits add up to 0, and large tables or keys show where they do not: the mean is taken
    # off twice, the second time what rounding has left of it.
    dlogits = g.scratch("dlogits", *weights.shape)
    torch.bmm(g.v, do.transpose(1, 2), out=dlogits).mul_(weights)
    for _ in range(2):
        dlogits.addcmul_(weights, dlogits.sum(1, keepdim=True), value=-1)
    g.add_windows(dv, torch.bmm(weights, do, out=g.v))  # keys and values are overwritten once done with

    dproduct = g.scratch("product", g.n, g.queries, 2 * g.table).zero_()
    per_window = dlogits.view(g.n, g.rows.keys, g.cols.keys, g.rows.queries, g.cols.queries)
    for view, dim in zip(g.skewed(dproduct), (2, 1), strict=True):
        view.copy_(per_window.sum(dim, keepdim=True))
    # queries that are not finite have NaN in all rows of the tables that they use, and nothing to do with the others
    drel.addmm_(dproduct.flatten(0, 1).t(), _finite(g.q).flatten(0, 1))
    dq_group = g.scratch("dq", g.n * g.queries, g.q.shape[2])
    torch.mm(dproduct.flatten(0, 1), rel_finite, out=dq_group)
    dq_group = dq_group.view(g.q.shape).baddbmm_(dlogits.transpose(1, 2), g.k, alpha=g.scale)
    sees_bad = g.used() @ rel_bad > 0
    dq_group += torch.zeros_like(rel_bad[:1]).masked_fill(sees_bad, math.nan)
    g.set_queries(dq, dq_group)
    g.add_windows(dk, torch.bmm(dlogits, g.scaled_q, out=g.k))

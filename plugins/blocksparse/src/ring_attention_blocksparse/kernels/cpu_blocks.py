"""Block-sparse attention on CPUs: lists of blocks as batches for torch's flash attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from ring_attention_standard.kernels.heads import common_size, padded
from torch import Tensor

from ring_attention_blocksparse.mask import BlockMask, join, of
from ring_attention_blocksparse.tables import FULL, Tables
from ring_core.dropout import Dropout
from ring_core.masks import Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem
from ring_core.rows import grouped
from ring_core.softmax import accumulation_dtype

_SCORES = 1 << 22
"""Pairs of rows looked at together, over all heads."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuBlocks:
    """Every dtype and head size, in the accumulation dtype; what no list names costs nothing,
    forward or backward."""

    name = "cpu_blocks"
    priority = 20
    supports_dropout = False
    rounds = False

    def refuse(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return "CPU only"
        if problem.masks != {BlockMask}:
            return "block-sparse masks only"
        if problem.dropout:
            return "cannot repeat a dropout mask"
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return join(tiles)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
        size = common_size(q.shape[-1], v.shape[-1])
        for lane in _lanes(of(mask).tables(q.device), q, k):
            queries, keys, values = lane.q(q), lane.kv(k), lane.kv(v)
            results, sums = lane.q(out), lane.q(lse.transpose(1, 2))
            for some in lane.chunks():
                inputs = (some.q(queries, size), some.kv(keys, size), some.kv(values, size))
                bias = some.bias(queries.shape[0], wide)
                found, total = _forward(*inputs, 0.0, False, attn_mask=bias, scale=scale)
                found = some.back(found, queries)[..., : v.shape[-1]]
                total = some.back(total.unsqueeze(-1), queries).squeeze(-1)
                if some.shown is not None:
                    empty = ~some.shown.any(-1)[:, :, None, None]  # it writes 0 for them
                    total = total.masked_fill(empty, -torch.inf)
                    found = found.masked_fill(empty[..., None], 0)
                there = some.q_there
                results[:, some.q_rows[there]] = found[:, there]
                sums[:, some.q_rows[there]] = total[:, there]
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: Dropout | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        size = common_size(q.shape[-1], v.shape[-1])
        # exp(score - inf) is the 0 that all weighs where nothing is seen.
        lse = lse.to(wide).masked_fill(lse == -torch.inf, torch.inf)
        for lane in _lanes(of(mask).tables(q.device), q, k):
            queries, keys, values = lane.q(q), lane.kv(k), lane.kv(v)
            douts, outs, sums = lane.q(dout), lane.q(out), lane.q(lse.transpose(1, 2)[..., None])
            to_q, to_k, to_v = lane.q(dq), lane.kv(dk), lane.kv(dv)
            for some in lane.chunks():
                found = _backward(
                    some.q(douts, size),
                    some.q(queries, size),
                    some.kv(keys, size),
                    some.kv(values, size),
                    some.q(outs, size),
                    some.q(sums, 1).squeeze(-1).contiguous(),
                    0.0,
                    False,
                    attn_mask=some.bias(queries.shape[0], wide),
                    scale=scale,
                )
                there = some.q_there
                d_queries = some.back(found[0], queries)[..., : q.shape[-1]]
                to_q[:, some.q_rows[there]] = d_queries[:, there]
                for total, x in ((to_k, found[1]), (to_v, found[2])):
                    some.add(total, x[..., : total.shape[-1]])
        return dq, dk, dv


@dataclass(frozen=True)
class _Chunk:
    """Some pieces of queries, each with as many pieces of keys: a batch of its own.

    Attributes:
        q_rows, q_there: [n, rows]: their rows, and whether a piece has so many.
        kv_rows: [n, pieces * rows]: rows of the pieces of keys; the first one where it has fewer.
        shown: bool [n, rows, pieces * rows]; None: all.
    """

    q_rows: Tensor
    q_there: Tensor
    kv_rows: Tensor
    shown: Tensor | None

    def q(self, x: Tensor, size: int) -> Tensor:
        """[B*n, K*G, rows, size] of x [B, S, K, G, D]."""
        found = x[:, self.q_rows].permute(0, 1, 3, 4, 2, 5)
        return _ready(found.flatten(0, 1).flatten(1, 2), size)

    def kv(self, x: Tensor, size: int) -> Tensor:
        """[B*n, K, rows, size] of x [B, S, K, D]."""
        return _ready(x[:, self.kv_rows].transpose(2, 3).flatten(0, 1), size)

    def bias(self, batch: int, dtype: torch.dtype) -> Tensor | None:
        """[B*n, 1, rows, keys]: 0 where a row sees a key, else -inf; None where all is seen."""
        if self.shown is None:
            return None
        bias = torch.zeros(self.shown.shape, dtype=dtype).masked_fill_(~self.shown, -torch.inf)
        return bias[:, None].repeat(batch, 1, 1, 1)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """[B, n, rows, K, G, D] of x [B*n, K*G, rows, D]."""
        x = torch.unflatten(torch.unflatten(x, 1, like.shape[2:4]), 0, (like.shape[0], -1))
        return x.permute(0, 1, 4, 2, 3, 5)

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add x [B*n, K, rows, D] to the rows of keys of total [B, S, K, D]."""
        x = torch.unflatten(x, 0, (total.shape[0], -1)).transpose(2, 3).flatten(1, 2)
        total.index_add_(1, self.kv_rows.flatten(), x)


def _ready(x: Tensor, size: int) -> Tensor:
    """In the accumulation dtype, with heads of ``size``."""
    return padded(x.to(accumulation_dtype(x.dtype)), size).contiguous()


@dataclass(frozen=True)
class _Lane:
    """The lists of some batch rows and KV heads: of all, where all are alike."""

    tables: Tables
    layer: int
    batch: slice
    heads: slice
    kv_heads: int
    most: int

    def q(self, x: Tensor) -> Tensor:
        """View [B, rows, K, G, ...] of what is this lane's of [B, rows, H, ...]."""
        return grouped(x, self.kv_heads)[self.batch, :, self.heads]

    def kv(self, x: Tensor) -> Tensor:
        """View [B, rows, K, D] of what is this lane's."""
        return x[self.batch, :, self.heads]

    def chunks(self) -> Iterator[_Chunk]:
        """All pieces of queries that see something, those with equally many of keys together."""
        tables = self.tables
        q, kv, lists = tables.q, tables.kv, tables.by_query
        start = lists.start[self.layer * len(q) : (self.layer + 1) * len(q) + 1].long()
        degree = start.diff()
        for count in torch.unique(degree).tolist():
            if not count:
                continue
            pieces = (degree == count).nonzero().squeeze(1)
            step = max(1, self.most // (count * q.largest * kv.largest))
            for some in torch.split(pieces, step):
                pair = start[some][:, None] + torch.arange(count)
                kv_rows, kv_there = kv.rows(lists.other[pair].long())
                q_rows, q_there = q.rows(some)
                yield _Chunk(
                    q_rows,
                    q_there,
                    kv_rows.flatten(1),
                    _shown(tables, lists.mask[pair], q_there, kv_there),
                )


def _shown(tables: Tables, mask: Tensor, q_there: Tensor, kv_there: Tensor) -> Tensor | None:
    """bool [n, rows, pieces * rows] for masks [n, pieces]; None if all is seen."""
    masked = bool((mask != FULL).any())
    if not masked and bool(q_there.all()) and bool(kv_there.all()):
        return None
    shown = kv_there[:, :, None, :] & q_there[:, None, :, None]
    if masked:
        shown = shown & tables.unpacked(mask)
    return shown.transpose(1, 2).flatten(2)


def _lanes(tables: Tables, q: Tensor, k: Tensor) -> Iterator[_Lane]:
    for b in range(tables.batch):
        batch = slice(None) if tables.batch == 1 else slice(b, b + 1)
        for h in range(tables.heads):
            heads = slice(None) if tables.heads == 1 else slice(h, h + 1)
            lanes = tables.batch * tables.heads
            most = max(1, _SCORES * lanes // (q.shape[0] * q.shape[2]))
            yield _Lane(tables, b * tables.heads + h, batch, heads, k.shape[2], most)

"""Block-sparse attention in plain torch operations: lists of blocks as batched products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_attention_blocksparse.mask import BlockMask, join, of
from ring_attention_blocksparse.tables import FULL, Pieces, Tables
from ring_core.dropout import Dropout
from ring_core.masks import Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem
from ring_core.rows import grouped
from ring_core.softmax import accumulation_dtype

_SCORES = 1 << 22
"""Scores held at once: 16 MiB in float32, and a few tensors of that size beside them."""


class Batched:
    """Every device, dtype and head size, in the accumulation dtype; what no list names costs
    nothing, forward or backward."""

    name = "blocks"
    priority = 0
    supports_dropout = False
    rounds = False

    def refuse(self, problem: Problem) -> str | None:
        if problem.masks != {BlockMask}:
            return "block-sparse masks only"
        if problem.dropout:
            return "cannot repeat a dropout mask"
        if problem.deterministic and problem.device.type == "cuda":
            return "adds gradients of keys in any order on CUDA"
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return join(tiles)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
        k, v = k.to(wide), v.to(wide)
        for lane in _lanes(of(mask).tables(q.device), q, k):
            queries, keys, values = lane.q(q), lane.kv(k), lane.kv(v)
            results, sums = lane.q(out), lane.q(lse.transpose(1, 2))
            for some in lane.chunks():
                scores = _scores(some, queries, keys, scale)
                total = torch.logsumexp(scores, dim=-1)
                weights = _weights(scores, total)
                found = torch.einsum("bnkgij,bnjkd->bnikgd", weights, values[:, some.kv_rows])
                x, there = some.q_rows, some.q_there
                results[:, x[there]] = found[:, there]
                sums[:, x[there]] = total.permute(0, 1, 4, 2, 3)[:, there]
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
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        k, v = k.to(wide), v.to(wide)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for lane in _lanes(of(mask).tables(q.device), q, k):
            queries, keys, values = lane.q(q), lane.kv(k), lane.kv(v)
            douts, outs, sums = lane.q(dout), lane.q(out), lane.q(lse.transpose(1, 2))
            to_q, to_k, to_v = lane.q(dq), lane.kv(dk), lane.kv(dv)
            for some in lane.chunks():
                x, y = some.q_rows, some.kv_rows
                scores = _scores(some, queries, keys, scale)
                weights = _weights(scores, sums[:, x].to(wide).permute(0, 1, 3, 4, 2))
                d_out = _rows(douts, some, wide)
                _add(to_v, y, torch.einsum("bnkgij,bnikgd->bnjkd", weights, d_out))
                delta = (d_out * _rows(outs, some, wide)).sum(-1).permute(0, 1, 3, 4, 2)
                d_weights = torch.einsum("bnikgd,bnjkd->bnkgij", d_out, values[:, y])
                d_scores = weights * (d_weights - delta[..., None]) * scale
                found = torch.einsum("bnkgij,bnjkd->bnikgd", d_scores, keys[:, y])
                to_q[:, x[some.q_there]] = found[:, some.q_there]
                d_keys = torch.einsum("bnkgij,bnikgd->bnjkd", d_scores, _rows(queries, some, wide))
                _add(to_k, y, d_keys)
        return dq, dk, dv


@dataclass(frozen=True)
class _Chunk:
    """Some pieces of queries, each with as many pieces of keys.

    Attributes:
        q_rows, q_there: [n, rows]: their rows, and whether a piece has so many.
        kv_rows: [n, pieces * rows]: rows of the pieces of keys; row 0 of one where there is none.
        shown: bool [n, rows, pieces * rows].
    """

    q_rows: Tensor
    q_there: Tensor
    kv_rows: Tensor
    shown: Tensor


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
            for some in pieces.split(step):
                pair = start[some][:, None] + torch.arange(count, device=some.device)
                kv_rows, kv_there = _rows_of(kv, lists.other[pair].long())
                q_rows, q_there = _rows_of(q, some)
                mask = lists.mask[pair]
                shown = kv_there[:, :, None, :] & q_there[:, None, :, None]
                if bool((mask != FULL).any()):
                    shown = shown & tables.unpacked(mask)
                yield _Chunk(
                    q_rows,
                    q_there,
                    kv_rows.flatten(1),
                    shown.transpose(1, 2).flatten(2),
                )


def _lanes(tables: Tables, q: Tensor, k: Tensor) -> Iterator[_Lane]:
    for b in range(tables.batch):
        batch = slice(None) if tables.batch == 1 else slice(b, b + 1)
        for h in range(tables.heads):
            heads = slice(None) if tables.heads == 1 else slice(h, h + 1)
            lanes = tables.batch * tables.heads
            most = max(1, _SCORES * lanes // (q.shape[0] * q.shape[2]))
            yield _Lane(tables, b * tables.heads + h, batch, heads, k.shape[2], most)


def _rows_of(pieces: Pieces, which: Tensor) -> tuple[Tensor, Tensor]:
    """[..., largest]: rows of some pieces, and whether they have so many."""
    place = torch.arange(pieces.largest, device=which.device)
    there = place < pieces.size[which][..., None]
    return pieces.row[which][..., None] + place * there, there


def _rows(x: Tensor, some: _Chunk, dtype: torch.dtype) -> Tensor:
    """[B, n, rows, K, G, D] of a chunk's queries."""
    return x[:, some.q_rows].to(dtype)


def _scores(some: _Chunk, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[B, n, K, G, rows, keys], -inf where nothing is seen."""
    q = _rows(queries, some, keys.dtype)
    scores = torch.einsum("bnikgd,bnjkd->bnkgij", q, keys[:, some.kv_rows]) * scale
    return scores.masked_fill(~some.shown[:, None, None], -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for rows that see nothing."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])


def _add(x: Tensor, rows: Tensor, added: Tensor) -> None:
    """Add [B, n, rows, K, D] to the rows of ``x`` [B, S, K, D]."""
    x.index_add_(1, rows.flatten(), added.flatten(1, 2))

"""Attention in plain torch operations: every device, dtype, mask, and dropout, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ring_core.dropout import Dropout
from ring_core.masks import Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem
from ring_core.rows import grouped
from ring_core.softmax import accumulation_dtype

_SCORES = 1 << 22
"""Scores held at once: 16 MiB in float32, and a few tensors of that size beside them."""


class Eager:
    """The kernel for whatever no other one does: named ``reference``."""

    name = "reference"
    priority = -10
    supports_dropout = True
    rounds = False

    def refuse(self, problem: Problem) -> str | None:
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return tiles

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        (q,), (k, v) = _read(mask, (q,), (k, v))
        kv_heads, wide = k.shape[2], accumulation_dtype(q.dtype)
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)
        k, v = k.to(wide), v.to(wide)
        for rows in _blocks(q, k):
            seen = mask.visible(_range(rows, q), k.shape[1], q.device)
            scores = _scores(q[:, rows].to(wide), k, scale).masked_fill(~seen, -torch.inf)
            total = torch.logsumexp(scores, dim=-1)
            weights = _weights(scores, total) * _kept(dropout, rows, kv_heads, wide)
            out[:, rows] = torch.einsum("bkgij,bjkd->bikgd", weights, v).flatten(2, 3)
            lse[:, :, rows] = total.flatten(1, 2)
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
        (q, dout, out), (k, v) = _read(mask, (q, dout, out), (k, v))
        kv_heads, wide = k.shape[2], accumulation_dtype(q.dtype)
        k, v = k.to(wide), v.to(wide)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows in _blocks(q, k):
            seen = mask.visible(_range(rows, q), k.shape[1], q.device)
            q_rows = q[:, rows].to(wide)
            dout_rows = grouped(dout[:, rows].to(wide), kv_heads)
            scores = _scores(q_rows, k, scale).masked_fill(~seen, -torch.inf)
            weights = _weights(scores, torch.unflatten(lse[:, :, rows], 1, (kv_heads, -1)))
            kept = _kept(dropout, rows, kv_heads, wide)
            dv += torch.einsum("bkgij,bikgd->bjkd", weights * kept, dout_rows)
            delta = (dout_rows * grouped(out[:, rows].to(wide), kv_heads)).sum(-1)
            dweights = torch.einsum("bikgd,bjkd->bkgij", dout_rows, v) * kept
            dscores = weights * (dweights - delta.movedim(1, -1)[..., None]) * scale
            dq[:, rows] = torch.einsum("bkgij,bjkd->bikgd", dscores, k).flatten(2, 3)
            dk += torch.einsum("bkgij,bikgd->bjkd", dscores, grouped(q_rows, kv_heads))
        return dq, dk, dv


def _read(
    mask: Mask, queries: Sequence[Tensor], keys: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Tensors [B, S, ...] with 0 where the mask says that a row holds nothing."""
    unread = mask.unread(queries[0].shape[1], keys[0].shape[1], queries[0].device)
    if unread is None:
        return queries, keys
    rows, columns = (x[:, None, None] for x in unread)
    return [x.masked_fill(rows, 0) for x in queries], [x.masked_fill(columns, 0) for x in keys]


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    for start in range(0, q.shape[1], rows):
        yield slice(start, start + rows)


def _range(rows: slice, q: Tensor) -> range:
    return range(*rows.indices(q.shape[1]))


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, K, G, Sq, Sk]."""
    return torch.einsum("bikgd,bjkd->bkgij", grouped(q, k.shape[2]), k) * scale


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for rows that see nothing."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])


def _kept(
    dropout: Dropout | None, rows: slice, kv_heads: int, dtype: torch.dtype
) -> Tensor | float:
    if dropout is None:
        return 1.0
    return torch.unflatten(dropout.factor(rows).to(dtype), 1, (kv_heads, -1))

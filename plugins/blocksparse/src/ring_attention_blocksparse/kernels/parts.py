"""Long lists are cut: a program that goes through all keys alone would keep a whole GPU waiting.

The pieces of few lists that are much longer than the others, as those of global tokens are, are
copied, each copy with a part of the list. What the copies give is put together by rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention_blocksparse.scene import ragged
from ring_attention_blocksparse.tables import Pieces, Tables

_LEAST = 16
"""Lists of so many pairs are never cut."""
_TIMES = 4
"""Nor are those of so many times the mean."""


class Copies(NamedTuple):
    """Pieces that stand several times, end to end.

    Attributes:
        rows: int64 [copies * largest], their rows in the tensor.
        counts: int64 [pieces], how many copies each piece has.
        lines: int64 [pieces, largest], each piece's rows in the tensor. there: bool, whether it has
            so many; the first one stands where not.
    """

    rows: Tensor
    counts: Tensor
    lines: Tensor
    there: Tensor

    def put(self, x: Tensor, dim: int, into: Tensor) -> None:
        """Write sums over copies of rows x, along ``dim``, to their place in ``into``."""
        self._put(self._summed(self._by_copy(x.float(), dim)), dim, into)

    def merge(self, out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor) -> None:
        """Put what copies attended to together, at its place.

        Args:
            out, lse: [B, S, H, Dv] and [B, H, S]. outs, lses: the same of the copies' rows.
        """
        found, weight = self._by_copy(outs.float(), 1), self._by_copy(lses, 2)
        most = torch.segment_reduce(weight, "max", lengths=self.counts)
        pivot = most.masked_fill(most == -torch.inf, 0)
        weight = torch.exp(weight - self._spread(pivot))
        total = self._summed(weight)
        share = weight / self._spread(total.masked_fill(total == 0, 1))
        self._put(self._summed(found * share.transpose(2, 3)[..., None]), 1, out)
        self._put(pivot + torch.log(total), 2, lse)

    def _by_copy(self, x: Tensor, dim: int) -> Tensor:
        """[copies, ...], rows behind what was before ``dim``."""
        found = torch.unflatten(x, dim, (-1, self.lines.shape[1]))
        return found.movedim(dim, 0).contiguous()

    def _spread(self, x: Tensor) -> Tensor:
        """[copies, ...] from [pieces, ...]."""
        return x.repeat_interleave(
            self.counts, 0, output_size=len(self.rows) // self.lines.shape[1]
        )

    def _summed(self, x: Tensor) -> Tensor:
        """[pieces, ...] from [copies, ...]; in the order of the copies, however often."""
        return torch.segment_reduce(x, "sum", lengths=self.counts)

    def _put(self, x: Tensor, dim: int, into: Tensor) -> None:
        found = x.movedim(dim + 1, 1)[self.there].to(into.dtype)
        into.movedim(dim, 0)[self.lines[self.there]] = found


class Part(NamedTuple):
    """Tables whose lists of one side count: all lists but the long ones, which are empty; or those
    of the ``copies``."""

    tables: Tables
    copies: Copies | None


def parts(tables: Tables, side: int) -> tuple[Part, ...]:
    """The lists of pieces of queries (side 0) or of keys (1)."""
    pieces, lists = ((tables.q, tables.by_query), (tables.kv, tables.by_key))[side]
    n, layers = len(pieces), tables.batch * tables.heads
    count = lists.start.diff().long()
    longest = count.view(layers, n).amax(0)
    limit = max(_LEAST, _TIMES * -(-int(longest.sum()) // max(1, n)))
    long = (longest > limit).nonzero().squeeze(1)
    if not len(long):
        return (Part(tables, None),)
    which, place = ragged(count)
    line, layer = which % n, which // n
    other, mask = (x[: len(which)].long() for x in (lists.other, lists.mask))
    counts = -(-longest[long] // limit)
    first = torch.full((n,), -1, device=long.device)
    first[long] = counts.cumsum(0) - counts
    cut = first[line] >= 0
    rest = _tables(tables, side, pieces, layer[~cut], line[~cut], other[~cut], mask[~cut])
    source = long.repeat_interleave(counts)
    size = pieces.largest
    rows, there = pieces.rows(source)
    copied = replace(
        pieces,
        **{
            name: getattr(pieces, name)[source]
            for name in ("size", "place", "step", "first", "last", "block")
        },
        row=size * torch.arange(len(source), device=source.device),
        total=int(there.sum()),
        most=pieces.most * int(counts.max()),
    )
    at = first[line[cut]] + place[cut] // limit
    apart = _tables(tables, side, copied, layer[cut], at, other[cut], mask[cut])
    return Part(rest, None), Part(apart, Copies(rows.flatten(), counts, *pieces.rows(long)))


def _tables(
    like: Tables,
    side: int,
    pieces: Pieces,
    layer: Tensor,
    line: Tensor,
    other: Tensor,
    mask: Tensor,
) -> Tables:
    """Tables of some pairs, with other pieces on one side."""
    sides = [(pieces, line), (like.kv, other)] if side == 0 else [(like.q, other), (pieces, line)]
    (q, x), (kv, y) = sides
    which = layer * len(q) + x
    limits = replace(like.limits, q=q, kv=kv)
    return Tables.of_pairs(q, kv, like.bits, like.batch, like.heads, which, y, mask, limits)

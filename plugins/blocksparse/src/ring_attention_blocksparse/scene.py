"""What a pattern looks at: tokens, their documents, the mask, and the blocks that tokens fall into.

Everything here is asked for many blocks at a time, and costs time and memory in proportion to the
answer, never to all pairs of blocks. Tensors are int64 unless said otherwise.

A sequence may be laid out in an order first. Blocks are then runs of *places*, while patterns and
the mask speak of *tokens*; without one they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_core.masks import Band

if TYPE_CHECKING:
    from ring_core.order import Order

_TOGETHER = 1 << 24
"""Runs of tokens looked at together."""


@dataclass(frozen=True)
class Blocks:
    """Some query blocks.

    Attributes:
        index: [n], which ones. first, last: [n], their first and last token; in an order others
            may lie between.
    """

    index: Tensor
    first: Tensor
    last: Tensor

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.index.device


@dataclass(frozen=True)
class Reach:
    """Key blocks that some query blocks see, under a pattern and no mask.

    A pair may stand in it twice, and blocks may lie outside of the sequence: such pairs are
    dropped.

    Attributes:
        query: [m], a place in the query blocks that were asked for. block: [m], a key block.
        whole: bool [m], whether every token of the one surely sees every token of the other.
        some: bool [m], whether some token of the one surely sees one of the other; in an order
            under the mask, too. Where neither is sure, pairs of tokens are looked at.
    """

    query: Tensor
    block: Tensor
    whole: Tensor
    some: Tensor

    def where(self, kept: Tensor) -> Reach:
        """Some of the pairs; ``kept`` is bool [m]."""
        return Reach(self.query[kept], self.block[kept], self.whole[kept], self.some[kept])

    def at_most(self) -> Reach:
        """The same pairs, of which nothing is sure: for patterns that see less of them."""
        never = torch.zeros_like(self.whole)
        return Reach(self.query, self.block, never, never)

    @staticmethod
    def together(reaches: list[Reach]) -> Reach:
        """What any of them has."""
        return Reach(
            *(
                torch.cat([getattr(one, name) for one in reaches])
                for name in ("query", "block", "whole", "some")
            )
        )


@dataclass(frozen=True)
class Scene:
    """A sequence under a mask.

    Attributes:
        length: tokens.
        documents: ascending; a token sees only its own document, one outside of all sees nothing.
        band: bounds ``j - i``: causal and window.
        block_q, block_kv: tokens of a query block and of a key block.
        order: in which the tokens stand; None: the sequence's own.
        prefix: tokens before the cells of a grid.
    """

    length: int
    documents: tuple[range, ...]
    band: Band
    block_q: int
    block_kv: int
    order: Order | None = None
    prefix: int = 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: thousands of documents are a key of several caches."""
        sizes = self.length, self.block_q, self.block_kv, self.prefix
        return hash((sizes, self.documents, self.band, self.order))

    @property
    def query_blocks(self) -> int:
        """How many query blocks there are."""
        return -(-self.length // self.block_q)

    @property
    def key_blocks(self) -> int:
        """How many key blocks there are."""
        return -(-self.length // self.block_kv)

    @property
    def stop(self) -> int:
        """The token behind the last document."""
        return self.documents[-1].stop if self.documents else 0

    def blocks(self, index: Tensor) -> Blocks:
        """The query blocks of that ``index``."""
        return Blocks(index, *self._ends(index, self.block_q))

    def keys(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """First and last token of key blocks."""
        return self._ends(block, self.block_kv)

    def _ends(self, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        if self.order is not None:
            first, last = _hulls(self.order, size, index.device)
            return first[index], last[index]
        first = index * size
        return first, (first + size - 1).clamp_max(self.length - 1)

    def size_of(self, block: Tensor, size: int) -> Tensor:
        """How many tokens blocks of ``size`` places hold: the last one may be smaller."""
        return (self.length - block * size).clamp_max(size)

    def places(self, token: Tensor) -> Tensor:
        """The places of some tokens."""
        return token if self.order is None else self.order.places(token.device)[token]

    def own(self, q: Blocks) -> tuple[Tensor, Tensor]:
        """First and last key block that hold tokens of query blocks."""
        first = q.index * self.block_q
        last = (first + self.block_q - 1).clamp_max(self.length - 1)
        return first // self.block_kv, last // self.block_kv

    # The mask

    def bounds(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key that the mask lets queries ``i`` see; last < first where there is
        none. Both grow with i, from document to document too."""
        start, stop = self.document(i)
        lo, hi = start, stop - 1
        if self.band.lo is not None:
            lo = torch.maximum(lo, i + self.band.lo)
        if self.band.hi is not None:
            hi = torch.minimum(hi, i + self.band.hi)
        return lo, hi

    def admits(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the mask lets query i see key j: bool, of the shape that both broadcast to."""
        lo, hi = self.bounds(i)
        return (lo <= j) & (j <= hi)

    def document(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First token of the documents of tokens ``i``, and the one behind the last; both i where
        it has none."""
        starts, stops = _ends(self.documents, i.device)
        if not len(starts):
            return i, i
        which = (torch.searchsorted(starts, i.contiguous(), right=True) - 1).clamp_min(0)
        start, stop = starts[which], stops[which]
        inside = (start <= i) & (i < stop)
        return torch.where(inside, start, i), torch.where(inside, stop, i)

    def documents_of(self, q: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """The documents that query blocks hold tokens of, one behind the other: [m], the place in
        ``q``; each document's first token, and the one behind its last."""
        starts, stops = _ends(self.documents, q.device)
        first = torch.searchsorted(stops, q.first, right=True)
        count = (torch.searchsorted(starts, q.last, right=True) - first).clamp_min(0)
        query, place = ragged(count)
        which = first[query] + place
        return query, starts[which], stops[which]

    def visible(self, q: Blocks) -> tuple[Tensor, Tensor]:
        """First and last key block of which the mask lets any pair through; in an order maybe more
        than that. All between are too: every query sees itself, so what neighbours see overlaps or
        touches."""
        if self.order is not None:
            last = torch.where(q.first < self.stop, self.key_blocks - 1, -1)
            return torch.zeros_like(last), last
        lo, _ = self.bounds(q.first)
        # Padding of a batch lies behind the last document: what blocks hold of it sees nothing.
        _, hi = self.bounds(q.last.clamp_max(self.stop - 1))
        first, last = lo // self.block_kv, hi.div(self.block_kv, rounding_mode="floor")
        return first, torch.where(q.first < self.stop, last, first - 1)

    @cached_property
    def is_open(self) -> bool:
        """Whether every token sees every other one."""
        return self.documents == (range(self.length),) and self.band == Band()

    # What patterns are made of

    def between(self, q: Blocks, query: Tensor, first: Tensor, last: Tensor) -> Reach:
        """Key blocks that hold tokens from ``first`` to ``last`` and are visible.

        Args:
            query: [n], places in ``q``. first, last: [n], tokens; nothing where last < first.

        Returns:
            Pairs with ``whole`` False, and ``some`` True; in an order False: the tokens of a block
            may all lie beside those that the query block was asked for.
        """
        if self.order is not None:
            none = (last < first) | (last < 0) | (first >= self.length)
            starts, blocks = _strips(self.order, self.block_kv, q.device)
            begin, end = (
                torch.searchsorted(starts, x.clamp(0, self.length - 1), right=True) - 1
                for x in (first, last)
            )
            count = (end - begin + 1).masked_fill(none, 0)
            keys = []
            for some in _portions(count):
                which, place = ragged(count[some])
                which = some[which]
                found = query[which] * self.key_blocks + blocks[begin[which] + place]
                keys.append(torch.unique(found))
            key = torch.unique(torch.cat(keys)) if keys else query
            never = torch.zeros_like(key, dtype=torch.bool)
            return Reach(key // self.key_blocks, key % self.key_blocks, never, never)
        low, high = (x[query] for x in self.visible(q))
        begin = torch.maximum(first.div(self.block_kv, rounding_mode="floor"), low)
        end = torch.minimum(last.div(self.block_kv, rounding_mode="floor"), high)
        none = (last < first) | (last < 0) | (first >= self.length)
        count = (end - begin + 1).masked_fill(none, 0).clamp_min(0)
        which, place = ragged(count)
        block = begin[which] + place
        sure = torch.ones_like(block, dtype=torch.bool)
        return Reach(query[which], block, ~sure, sure)

    def offsets(self, q: Blocks, step: int, low: int | None, high: int | None) -> Reach:
        """Key blocks with a token whose distance ``j - i`` from a query is a multiple of ``step``,
        and from ``low`` to ``high`` (None: unbounded)."""
        if self.order is not None and step == 1:
            return self._windows(q, low, high)
        each = torch.arange(len(q.index), device=q.device)
        seen_first, seen_last = self._visible_tokens(q)
        if step > self.block_kv:
            # Tokens that the block's queries see at one multiple are neighbours; then comes a gap.
            fewest = (seen_first - q.last).div(step, rounding_mode="floor")
            most = (seen_last - q.first).div(step, rounding_mode="floor")
            if low is not None:
                fewest = fewest.clamp_min(-(-low // step))
            if high is not None:
                most = most.clamp_max(high // step)
            which, place = ragged((most - fewest + 1).clamp_min(0))
            apart = (fewest[which] + place) * step
            found = self.between(q, each[which], q.first[which] + apart, q.last[which] + apart)
        else:
            begin = seen_first if low is None else torch.maximum(seen_first, q.first + low)
            end = seen_last if high is None else torch.minimum(seen_last, q.last + high)
            found = self.between(q, each, begin, end)
        first, last = self.keys(found.block)
        least, largest = first - q.last[found.query], last - q.first[found.query]
        inside = torch.ones_like(found.some)
        if low is not None:
            inside &= least >= low
            least = least.clamp_min(low)
        if high is not None:
            inside &= largest <= high
            largest = largest.clamp_max(high)
        hit = largest.div(step, rounding_mode="floor") * step >= least
        whole = inside if step == 1 else torch.zeros_like(inside)
        some = hit if self.order is None else torch.zeros_like(hit)
        return Reach(found.query, found.block, whole, some).where(hit)

    def _windows(self, q: Blocks, low: int | None, high: int | None) -> Reach:
        """:meth:`offsets` of all distances from ``low`` <= 0 to ``high`` >= 0, in an order.

        What neighbouring tokens see under the mask overlaps or touches, as every one sees itself:
        of a run of them it is one range, and all of it is seen by some.
        """
        assert self.order is not None
        known = _runs(self.order, self.block_q, q.device)
        query, place = ragged(known.start.diff()[q.index])
        run = known.start[q.index][query] + place
        first, last = known.first[run], known.last[run].clamp_max(self.stop - 1)
        held = first <= last
        query, first, last = query[held], first[held], last[held]
        lo, hi = self.bounds(first)[0], self.bounds(last)[1]
        if low is not None:
            lo = torch.maximum(lo, first + low)
        if high is not None:
            hi = torch.minimum(hi, last + high)
        # Ranges of one block that overlap are one.
        apart = torch.ones_like(query, dtype=torch.bool)
        apart[1:] = (query[1:] != query[:-1]) | (lo[1:] > hi[:-1] + 1)
        ends = torch.ones_like(apart)
        ends[:-1] = apart[1:]
        found = self.between(q, query[apart], lo[apart], hi[ends])
        first, last = self.keys(found.block)
        whole = torch.ones_like(found.some)
        if low is not None:
            whole &= first - q.last[found.query] >= low
        if high is not None:
            whole &= last - q.first[found.query] <= high
        return Reach(found.query, found.block, whole, torch.ones_like(whole))

    def _visible_tokens(self, q: Blocks) -> tuple[Tensor, Tensor]:
        """Tokens before and behind which the mask lets blocks see nothing."""
        if self.order is None:
            low, high = self.visible(q)
            return self.keys(low)[0], self.keys(high)[1]
        lo, _ = self.bounds(q.first)
        _, hi = self.bounds(q.last.clamp_max(self.stop - 1))
        return lo, torch.where(q.first < self.stop, hi, lo - 1)


def ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """For counts [n] the lists 0..count-1 end to end: to which entry each item belongs, and its
    place in that entry's list."""
    which = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    start = torch.cumsum(count, 0) - count
    return which, torch.arange(len(which), device=count.device) - start[which]


@lru_cache(maxsize=64)
def _ends(documents: tuple[range, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        starts = torch.tensor([one.start for one in documents], dtype=torch.int64, device=device)
        stops = torch.tensor([one.stop for one in documents], dtype=torch.int64, device=device)
    return starts, stops


@lru_cache(maxsize=64)
def _hulls(order: Order, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and the largest token of each block of ``size`` places."""
    with torch.inference_mode(False):
        tokens = order.tokens(device)
        rest = -len(tokens) % size
        first, last = (
            torch.nn.functional.pad(tokens, (0, rest), value=int(tokens[-1]))
            .view(-1, size)
            .aminmax(dim=1)
        )
        return first, last


@lru_cache(maxsize=64)
def _strips(order: Order, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Runs of neighbouring tokens that stand in one block of ``size`` places: each run's first
    token, ascending, and its block."""
    with torch.inference_mode(False):
        block = order.places(device) // size
        starts = torch.cat([block.new_zeros(1), (block.diff() != 0).nonzero().squeeze(1) + 1])
        return starts, block[starts]


@dataclass(frozen=True)
class _Runs:
    """Runs of neighbouring tokens by block: those of block i are ``start[i]`` to ``start[i + 1]``,
    ascending."""

    start: Tensor
    first: Tensor
    last: Tensor


@lru_cache(maxsize=64)
def _runs(order: Order, size: int, device: torch.device) -> _Runs:
    with torch.inference_mode(False):
        first, block = _strips(order, size, device)
        length = len(order.tokens(device))
        last = torch.cat([first[1:], first.new_full((1,), length)]) - 1
        by_block = torch.argsort(block, stable=True)
        edges = torch.arange(-(-length // size) + 1, device=device)
        start = torch.searchsorted(block[by_block], edges)
        return _Runs(start, first[by_block], last[by_block])


def _portions(count: Tensor) -> list[Tensor]:
    """Indices of counts [n], in portions whose sums are not much over :data:`_TOGETHER`."""
    portion = count.cumsum(0) // _TOGETHER
    sizes = torch.unique_consecutive(portion, return_counts=True)[1].tolist()
    return list(torch.split(torch.arange(len(count), device=count.device), sizes))

"""Which pairs of blocks a list of patterns makes active under the mask, in the whole sequence.

Time and memory go with the number of active pairs. A plan asks here which keys a rank needs and
what its queries cost; kernels' tables (:mod:`ring_attention_blocksparse.tables`) start here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Blocks, Reach, Scene, ragged
from ring_core.order import Order

PAIRS = 1 << 24
"""Pairs of tokens looked at together: a few tensors of that many numbers."""


@dataclass(frozen=True)
class Active:
    """Key blocks by query block: those of block i are ``block[start[i]:start[i + 1]]``, ascending.

    Attributes:
        start: [query blocks + 1]. block: [pairs]. Both int64 on the CPU.
    """

    start: Tensor
    block: Tensor

    def count(self) -> Tensor:
        """[query blocks]: how many key blocks each one sees."""
        return self.start.diff()

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of some query blocks: places in ``index``, and key blocks."""
        query, place = ragged(self.count()[index])
        return query, self.block[self.start[index][query] + place]


@lru_cache(maxsize=128)
def active(scene: Scene, patterns: tuple[Pattern, ...], head: int) -> Active:
    """Pairs of blocks with at least one visible pair of tokens; the choices of a call apart."""
    index = torch.arange(scene.query_blocks, device="cpu")
    q = scene.blocks(index)
    found = candidates(scene, patterns, q, head)
    key_first, key_last = scene.keys(found.block)
    clear = admitted(scene, q.first[found.query], q.last[found.query], key_first, key_last)
    if scene.order is None:
        sure = (found.whole & clear.some) | (found.some & clear.whole)
    else:
        sure = (found.whole & clear.whole) | found.some
    doubtful = (~sure & clear.some).nonzero().squeeze(1)
    kept = sure.clone()
    step = max(1, PAIRS // (scene.block_q * scene.block_kv))
    for some in torch.split(doubtful, step):
        kept[some] = (
            seen(
                scene,
                patterns,
                Span.of(scene, q.index[found.query[some]], scene.block_q),
                Span.of(scene, found.block[some], scene.block_kv),
                found.whole[some],
            )
            .flatten(1)
            .any(1)
        )
    found = found.where(kept)
    count = torch.bincount(found.query, minlength=len(index))
    return Active(torch.cat([count.new_zeros(1), count.cumsum(0)]), found.block)


def visible_count(scene: Scene, q: Blocks) -> Tensor:
    """[n]: how many key blocks the mask lets each of some query blocks see some token of."""
    if scene.order is None or scene.is_open:
        low, high = scene.visible(q)
        return (high - low + 1).clamp_min(0)
    return _visible(scene).count().to(q.device)[q.index]


def visible_block(scene: Scene, q: Blocks, query: Tensor, place: Tensor) -> Tensor:
    """Of the key blocks that a query block sees some token of that at ``place``, ascending.

    Args:
        query: places in ``q``.
    """
    if scene.order is None or scene.is_open:
        return scene.visible(q)[0][query] + place
    known = _visible(scene)
    start, block = (x.to(q.device) for x in (known.start, known.block))
    return block[start[q.index[query]] + place]


@lru_cache(maxsize=128)
def _visible(scene: Scene) -> Active:
    """Pairs of blocks of which the mask lets some pair of tokens through, in an order."""
    blocks, counts = [], []
    queries = torch.arange(scene.query_blocks, device="cpu")
    for index in torch.split(queries, max(1, PAIRS // scene.key_blocks)):
        q = scene.blocks(index)
        query = torch.arange(len(index), device="cpu").repeat_interleave(scene.key_blocks)
        block = torch.arange(scene.key_blocks, device="cpu").repeat(len(index))
        clear = admitted(scene, q.first[query], q.last[query], *scene.keys(block))
        kept = clear.whole.clone()
        doubtful = (~clear.whole & clear.some).nonzero().squeeze(1)
        for some in torch.split(doubtful, max(1, PAIRS // (scene.block_q * scene.block_kv))):
            mine = Span.of(scene, index[query[some]], scene.block_q)
            theirs = Span.of(scene, block[some], scene.block_kv)
            whole = torch.ones_like(some, dtype=torch.bool)
            kept[some] = seen(scene, (), mine, theirs, whole).flatten(1).any(1)
        counts.append(kept.view(len(index), -1).sum(1))
        blocks.append(block[kept])
    count = torch.cat(counts)
    return Active(torch.cat([count.new_zeros(1), count.cumsum(0)]), torch.cat(blocks))


@lru_cache(maxsize=128)
def admitted_count(scene: Scene) -> Tensor:
    """[query blocks]: how many key blocks the mask lets each of them see some token of."""
    return visible_count(scene, scene.blocks(torch.arange(scene.query_blocks, device="cpu")))


def candidates(scene: Scene, patterns: Sequence[Pattern], q: Blocks, head: int) -> Reach:
    """What any of the patterns reaches, sorted by query and block, each pair once."""
    reaches = [pattern.reach(scene, q, head) for pattern in patterns]
    found = Reach.together(reaches)
    low, high = scene.visible(q)
    inside = (low[found.query] <= found.block) & (found.block <= high[found.query])
    found = found.where(inside)
    key, which = torch.unique(
        found.query * scene.key_blocks + found.block, sorted=True, return_inverse=True
    )
    return Reach(
        key // scene.key_blocks,
        key % scene.key_blocks,
        _any(found.whole, which, len(key)),
        _any(found.some, which, len(key)),
    )


@dataclass(frozen=True)
class Admitted:
    """What the mask lets through between sets of tokens: bool, ``whole`` surely all of it, and
    ``some`` where it may be a part."""

    whole: Tensor
    some: Tensor


def admitted(
    scene: Scene, q_first: Tensor, q_last: Tensor, key_first: Tensor, key_last: Tensor
) -> Admitted:
    """For pairs of sets of tokens, by the first and the last, whose queries are all in documents or
    behind the last one."""
    (first_lo, first_hi), (last_lo, last_hi) = scene.bounds(q_first), scene.bounds(q_last)
    whole = (last_lo <= key_first) & (key_last <= first_hi)
    inside = scene.stop > q_last
    some = (first_lo <= key_last) & (key_first <= torch.where(inside, last_hi, scene.stop - 1))
    return Admitted(whole & inside, some & (q_first < scene.stop))


@dataclass(frozen=True)
class Span:
    """Runs of places: ``first`` to ``last`` [n] in steps [n] or 1, at most ``size`` of them."""

    first: Tensor
    last: Tensor
    size: int
    step: Tensor | int = 1

    @staticmethod
    def of(scene: Scene, index: Tensor, size: int) -> Span:
        """Some blocks of ``size`` places."""
        first = index * size
        return Span(first, (first + size - 1).clamp_max(scene.length - 1), size)

    def tokens(self, order: Order | None = None) -> tuple[Tensor, Tensor]:
        """[n, size]: the tokens, and whether there is one."""
        place = torch.arange(self.size, device=self.first.device)
        step = self.step if isinstance(self.step, int) else self.step[:, None]
        places = self.first[:, None] + place * step
        there = places <= self.last[:, None]
        return (places if order is None else order.tokens(places.device)[places * there]), there


def seen(scene: Scene, patterns: Sequence[Pattern], q: Span, kv: Span, whole: Tensor) -> Tensor:
    """Which query sees which key in pairs of runs of places: bool [n, q.size, kv.size].

    Args:
        whole: bool [n], where some pattern shows all.
    """
    (i, there_i), (j, there_j) = q.tokens(scene.order), kv.tokens(scene.order)
    i, j = i[:, :, None], j[:, None, :]
    found = whole[:, None, None].expand(-1, q.size, kv.size)
    for pattern in patterns:
        more = pattern.sees(scene, i, j)
        if more is not None:
            found = found | more
    return found & scene.admits(i, j) & there_i[:, :, None] & there_j[:, None, :]


def _any(flags: Tensor, which: Tensor, groups: int) -> Tensor:
    found = torch.zeros(groups, dtype=torch.bool, device=flags.device)
    found[which[flags]] = True
    return found

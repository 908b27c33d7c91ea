"""Branches of dilated attention (LongNet, arXiv 2307.02486): segments, and the tokens they keep.

In a segment of ``w`` tokens of a document, KV head h and the query heads that it serves keep the
tokens whose index in the segment leaves the remainder ``h mod r``; kept queries see kept keys of
the same segment. Dense attention is the one branch whose segments are whole documents, at rate 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ring_core.masks import Band
from ring_core.plan import Tile
from ring_core.tiling import Document, Run, band_tile, common, visible_pairs


@dataclass(frozen=True, slots=True)
class Branch:
    """Segments of ``segment`` tokens (None: a document is one), of which every ``rate``-th is kept.

    The last segment of a document may be short.
    """

    segment: int | None = None
    rate: int = 1

    def meets(self, document: Document, q: Run, kv: Run) -> bool:
        """Whether both runs hold tokens of one segment, kept or not."""
        return self.segment is None or bool(self._shared(document, q, kv))

    def tiles(self, document: Document, phase: int, q: Run, kv: Run, band: Band) -> Iterator[Tile]:
        """What queries of one run see of keys of another, in a document, for heads of one phase.

        Segments that lie alike in both runs are one tile, repeated: there may be thousands.
        """
        if self.segment is None:
            tile = band_tile(q, kv, document.q, document.kv, band, document.shift)
            if tile:
                yield tile
            return
        shared = self._shared(document, q, kv)
        inside = self._inside(document, q.tokens, kv.tokens)
        before = range(shared.start, min(shared.stop, inside.start))
        behind = range(max(shared.start, inside.stop), shared.stop)
        for n in (*before, *behind):
            yield from self._one(document, phase, n, q, kv, band)
        # A shard may hold every n-th token: so many segments on, the next one lies as the first.
        period = math.lcm(self.segment, q.tokens.step, kv.tokens.step) // self.segment
        for n in inside[:period]:
            repeat = len(range(n, inside.stop, period))
            for tile in self._one(document, phase, n, q, kv, band):
                yield _repeated(tile, repeat, period * self.segment, q, kv)

    def pairs(self, rows: range, document: Document, band: Band) -> int:
        """Pairs of one batch row that unit-step queries see if the rate is 1; at another one a KV
        head keeps one in ``rate`` squared of them."""
        if self.segment is None:
            return visible_pairs(rows, document, band)
        touched, inside = self._touched(document, rows), self._inside(document, rows, rows)
        edges = [n for n in (*touched[:1], *touched[-1:]) if n not in inside]
        segments = [self._segment(document, n) for n in dict.fromkeys(edges)]
        pairs = len(inside) * band.count(self.segment, self.segment)
        return pairs + sum(visible_pairs(rows, Document(one, one), band) for one in segments)

    def _one(
        self, document: Document, phase: int, n: int, q: Run, kv: Run, band: Band
    ) -> Iterator[Tile]:
        kept = self._segment(document, n)[phase :: self.rate]
        tile = band_tile(q, kv, kept, kept, band)
        if tile:
            yield tile

    def _segment(self, document: Document, n: int) -> range:
        assert self.segment is not None
        return document.q[n * self.segment : (n + 1) * self.segment]

    def _shared(self, document: Document, q: Run, kv: Run) -> range:
        """The segments of which both hold some tokens."""
        mine, theirs = (self._touched(document, run.tokens) for run in (q, kv))
        first = max(mine.start, theirs.start)
        return range(first, max(first, min(mine.stop, theirs.stop)))

    def _touched(self, document: Document, tokens: range) -> range:
        """The segments of which ``tokens`` hold some."""
        assert self.segment is not None
        held = common(tokens, document.q)
        if not held:
            return range(0)
        first, last = ((token - document.q.start) // self.segment for token in (held[0], held[-1]))
        return range(first, last + 1)

    def _inside(self, document: Document, q: range, kv: range) -> range:
        """The full segments of which both hold all that one in their steps can."""
        assert self.segment is not None
        start = max(tokens[0] - tokens.step + 1 for tokens in (q, kv)) - document.q.start
        stop = min(tokens[-1] + tokens.step for tokens in (q, kv)) - document.q.start
        first = max(0, -(-start // self.segment))
        last = min(stop, len(document.q)) // self.segment
        return range(first, max(first, last))


def _repeated(tile: Tile, repeat: int, tokens: int, q: Run, kv: Run) -> Tile:
    """A tile, and again every so many tokens."""
    if repeat == 1:
        return tile
    return replace(
        tile,
        q=replace(tile.q, repeat=repeat, stride=tokens // q.tokens.step),
        kv=replace(tile.kv, repeat=repeat, stride=tokens // kv.tokens.step),
    )

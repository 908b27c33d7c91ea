"""The planner of dense and dilated attention: a band, within documents or their segments."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from ring_attention_standard.branches import Branch
from ring_core.config import LayoutName, RingAttentionConfig
from ring_core.layout import (
    EVEN,
    LAYOUTS,
    Layout,
    balanced,
    contiguous,
    imbalance,
    layout_for,
    zigzag,
)
from ring_core.masks import Band, Mask
from ring_core.plan import Heads, Plan, Tile
from ring_core.prediction.rates import planned
from ring_core.rounds import elements_fetched
from ring_core.sequences import Sequences
from ring_core.tiling import Document, Run, common, join_phases, merge_tiles, runs_of


@dataclass(frozen=True)
class BranchPlan(Plan):
    """Every visible pair of every branch: within a document's segments, under a band."""

    documents: tuple[Document, ...]
    band: Band
    branches: tuple[Branch, ...]
    kv_heads: int | None = None
    """Of phases that no KV head has there are no tiles; None: any number."""

    def for_heads(self, kv_heads: int) -> BranchPlan:
        return replace(self, kv_heads=kv_heads)

    def share(self, heads: Heads) -> Fraction:
        if self.kv_heads is None:
            return super().share(heads)
        return Fraction(heads.count(self.kv_heads), self.kv_heads)

    @property
    def masks(self) -> frozenset[type[Mask]]:
        return frozenset({Band})

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        pairs = list(self._pairs(rank, owner))
        apart: dict[int, list[Tile]] = {}
        joined: dict[int, list[Tile]] = {}
        for branch in self.branches:
            met = [pair for pair in pairs if branch.meets(*pair)]
            tiles = [
                tile
                for phase in range(self._phases(branch) if met else 0)
                for heads in [Heads(phase, branch.rate)]
                for tile in merge_tiles(
                    Tile(tile.q, tile.kv, tile.mask, heads, document.batch)
                    for document, q, kv in met
                    for tile in branch.tiles(document, phase, q, kv, self.band)
                )
            ]
            apart.setdefault(branch.rate, []).extend(tiles)
            joined.setdefault(branch.rate, []).extend(join_phases(tiles))
        found: list[Tile] = []
        for rate, tiles in joined.items():
            # Rows of other ranks are asked for by heads: some of them twice, if tiles that read the
            # same ones named different heads.
            phases = min(rate, self.kv_heads or rate)
            alike = rank == owner or all(tile.heads.phases == phases for tile in tiles)
            found += tiles if alike else apart[rate]
        return found

    def _phases(self, branch: Branch) -> int:
        """How many phases keep a token that some KV head has."""
        longest = max((len(document.q) for document in self.documents), default=0)
        return min(branch.rate, self.kv_heads or branch.rate, branch.segment or longest, longest)

    def _pairs(self, rank: int, owner: int) -> Iterator[tuple[Document, Run, Run]]:
        """Each document with the runs of both ranks that hold some of it."""
        theirs = runs_of(self.keys, owner)
        for members in _by_batch(self.documents):
            starts = [document.q.start for document in members]
            for q in runs_of(self.queries, rank):
                first = max(0, bisect_right(starts, q.tokens[0]) - 1)
                for document in members[first:]:
                    if document.q.start > q.tokens[-1]:
                        break
                    if common(q.tokens, document.q):
                        for kv in theirs:
                            if common(kv.tokens, document.kv):
                                yield document, q, kv


def plan_branches(config: RingAttentionConfig, sequences: Sequences, world: int) -> BranchPlan:
    """A plan for ``world`` ranks: dilated where the config has segments, else dense.

    Raises:
        InputError: dilated cross-attention, which is not defined.
    """
    band, branches = band_of(config), branches_of(config)
    if config.segment_lengths is not None:
        given = f"segment_lengths={list(config.segment_lengths)}"
        sequences.refuse("cross", why=f"dilated cross-attention is not defined; leave {given} out")
    queries = keys = _layout(config.layout, sequences, band, branches, world)
    if sequences.cross:
        keys = LAYOUTS.get(config.layout, contiguous)(sequences.kv_len, world)
    return BranchPlan(queries, keys, sequences.documents, band, branches)


def band_of(config: RingAttentionConfig) -> Band:
    """``causal`` and ``window``, AND-ed, as bounds on j - i."""
    left, right = config.window or (None, None)
    if config.causal:
        right = 0
    return Band(None if left is None else -left, right)


def branches_of(config: RingAttentionConfig) -> tuple[Branch, ...]:
    """``segment_lengths`` and ``dilation_rates``; one dense branch where there are none."""
    if config.segment_lengths is None or config.dilation_rates is None:
        return (Branch(),)
    return tuple(map(Branch, config.segment_lengths, config.dilation_rates))


def _layout(
    name: LayoutName, sequences: Sequences, band: Band, branches: tuple[Branch, ...], world: int
) -> Layout:
    length = sequences.q_len
    work = partial(_work, sequences=sequences, band=band, branches=branches)
    dense = all(one.rate == 1 and (one.segment or length) >= length for one in branches)

    def dealt() -> Layout:
        plain = zigzag(length, world)
        one = len(sequences.documents) == 1 and sequences.documents[0].q == range(length)
        if one and (name == "zigzag" or dense or imbalance(plain, work) <= EVEN):
            return plain
        return balanced(length, world, work)

    def uneven() -> Layout:
        if dense or band.lo is None or band.hi is None:
            return dealt()
        # Keys in a window are near: to deal them out may cost more than it saves.
        return min(contiguous(length, world), dealt(), key=price)

    def price(layout: Layout) -> float:
        plan = BranchPlan(layout, layout, sequences.documents, band, branches)
        some = {world // 2, world - 1}  # the first ones have fewer keys before them
        fetched = max(elements_fetched(plan, rank, 1) for rank in some) * sequences.batch
        whole = math.lcm(*(branch.rate**2 for branch in branches))
        busiest = max(sum(map(work, runs)) for runs in layout.rows) / whole
        return busiest + fetched * planned().pairs_a_key

    return dealt() if name == "zigzag" else layout_for(name, length, world, work, uneven)


def _work(rows: range, sequences: Sequences, band: Band, branches: tuple[Branch, ...]) -> int:
    """What a run of queries costs: visible pairs, in whole multiples of what one KV head keeps."""
    whole = math.lcm(*(branch.rate**2 for branch in branches))
    return sum(
        branch.pairs(rows, document, band)
        * (whole // branch.rate**2)
        * (sequences.batch if document.batch is None else len(document.batch))
        for document in sequences.documents
        for branch in branches
    )


def _by_batch(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents of the same batch rows together: within those they are in ascending order."""
    groups: dict[range | None, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.batch, []).append(document)
    yield from groups.values()

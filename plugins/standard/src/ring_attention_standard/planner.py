"""The planner of dense attention: one band, within documents, over any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ring_core.config import LayoutName, RingAttentionConfig
from ring_core.layout import Layout, balanced, contiguous, striped, zigzag
from ring_core.masks import Band, Mask
from ring_core.plan import Plan, Tile
from ring_core.sequences import Sequences
from ring_core.tiling import Document, band_tiles, visible_pairs

_EVEN = 1.05
"""Up to this imbalance ``auto`` keeps contiguous shards, which move the least data."""


@dataclass(frozen=True)
class DensePlan(Plan):
    """Every visible pair of every document, under a band."""

    documents: tuple[Document, ...]
    band: Band

    @property
    def masks(self) -> frozenset[type[Mask]]:
        return frozenset({Band})

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        return band_tiles(self.queries, self.keys, self.documents, self.band, rank, owner)


def band_of(config: RingAttentionConfig) -> Band:
    """``causal`` and ``window``, AND-ed, as bounds on j - i."""
    left, right = config.window or (None, None)
    if config.causal:
        right = 0
    return Band(None if left is None else -left, right)


def plan_dense(config: RingAttentionConfig, sequences: Sequences, world: int) -> DensePlan:
    """A plan for ``world`` ranks."""
    band = band_of(config)
    queries = _layout(config.layout, sequences, band, world)
    if not sequences.cross:
        keys = queries
    elif config.layout in ("zigzag", "striped"):
        keys = {"zigzag": zigzag, "striped": striped}[config.layout](sequences.kv_len, world)
    else:
        keys = contiguous(sequences.kv_len, world)
    return DensePlan(queries, keys, sequences.documents, band)


def _layout(name: LayoutName, sequences: Sequences, band: Band, world: int) -> Layout:
    length = sequences.q_len
    if name == "contiguous":
        return contiguous(length, world)
    if name == "striped":
        return striped(length, world)
    work = partial(visible_pairs, documents=sequences.documents, band=band, batch=sequences.batch)
    if name == "auto" and _imbalance(contiguous(length, world), work) <= _EVEN:
        return contiguous(length, world)
    plain = zigzag(length, world)
    one_ramp = len(sequences.documents) == 1 and sequences.documents[0].q == range(length)
    return plain if one_ramp else balanced(length, world, work)


def _imbalance(layout: Layout, work: Callable[[range], int]) -> float:
    loads = [sum(work(run) for run in runs) for runs in layout.rows]
    return max(loads) * layout.world / max(1, sum(loads))

"""The planner: in each document one band over the keys of the prefix and one over the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ring_core.layout import layout_for
from ring_core.masks import Band, Mask
from ring_core.plan import Plan, Tile
from ring_core.sequences import Sequences
from ring_core.tiling import Run, band_tile, merge_tiles, runs_of

from ring_attention_prefix_lm.config import PrefixLMConfig


@dataclass(frozen=True, slots=True)
class Region:
    """Queries that see keys of the same document where ``band`` lets ``j - i`` through.

    Attributes:
        q, kv: global token indices. batch: the batch rows that have this document; None: all.
    """

    q: range
    kv: range
    band: Band
    batch: range | None

    def tile(self, q: Run, kv: Run) -> Tile | None:
        """What a run of queries sees of a run of keys in this region, if anything."""
        tile = band_tile(q, kv, self.q, self.kv, self.band)
        return None if tile is None else replace(tile, batch=self.batch)


@dataclass(frozen=True)
class PrefixPlan(Plan):
    """Regions of which no two share a pair: each visible pair stands in one tile."""

    regions: tuple[Region, ...]

    @property
    def masks(self) -> frozenset[type[Mask]]:
        return frozenset({Band})

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        tiles = (
            region.tile(q, kv)
            for region in self.regions
            for q in runs_of(self.queries, rank)
            for kv in runs_of(self.keys, owner)
        )
        return merge_tiles(tile for tile in tiles if tile)


def plan_prefix(config: PrefixLMConfig, sequences: Sequences, world: int) -> PrefixPlan:
    """A plan for ``world`` ranks.

    Raises:
        InputError: cross-attention, for which a prefix is not defined.
    """
    why = "a prefix is not defined for cross-attention; take variant 'standard'"
    sequences.refuse("cross", why=why)
    regions = regions_of(config, sequences)
    work = partial(_visible_pairs, regions=regions)
    layout = layout_for(config.layout, sequences.q_len, world, work)
    return PrefixPlan(layout, layout, regions)


def regions_of(config: PrefixLMConfig, sequences: Sequences) -> tuple[Region, ...]:
    """Two regions in each document: all queries with the prefix, and the others among themselves.

    Keys of the prefix hide from nobody, other keys from queries before them; that is "j <= i or
    j < prefix_length" with no pair named twice. The window is AND-ed to both.
    """
    left, right = config.window or (None, None)
    first = None if left is None else -left
    window, causal_window = Band(first, right), Band(first, 0)
    regions = []
    for document in sequences.documents:
        tokens, batch = document.q, document.batch
        prefix, others = tokens[: config.prefix_length], tokens[config.prefix_length :]
        regions.append(Region(tokens, prefix, window, batch))
        regions.append(Region(others, others, causal_window, batch))
    return tuple(region for region in regions if region.kv)


def _visible_pairs(rows: range, regions: Sequence[Region]) -> int:
    """Of a run of queries with all keys, over all batch rows."""
    tiles = (region.tile(Run(0, rows), Run(0, region.kv)) for region in regions)
    return sum(
        tile.pairs * (1 if tile.batch is None else len(tile.batch)) for tile in tiles if tile
    )

"""Who computes what and when, as a map of the sequence against itself, for pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ring_core.plan import Plan, Tile

_ROWS = 256
"""Query rows of a tile that are looked at."""


@dataclass(frozen=True)
class TileMap:
    """Cells of queries (rows) against keys (columns), each so many tokens wide.

    Attributes:
        rank: int64 [cells, cells]: who computes something of a cell, -1: nobody; of several ranks
            the last.
        step: int64 [cells, cells]: at which offset of the ring, 0 for a rank's own keys.
        tokens: along a side of a cell.
    """

    rank: Tensor
    step: Tensor
    tokens: float


def tile_map(plan: Plan, cells: int = 256) -> TileMap:
    """The map of a plan's first KV head and first batch rows.

    Of bands and other masks some rows are looked at; a plan that knows its cells overrides
    :meth:`ring_core.plan.Plan.cells`.
    """
    q_len, kv_len = plan.queries.length, plan.keys.length
    length = max(q_len, kv_len)
    cells = min(cells, length)
    rank_of = torch.full((cells, cells), -1, dtype=torch.int64)
    step_of = torch.full((cells, cells), -1, dtype=torch.int64)
    for rank in range(plan.world):
        for step in range(plan.world):
            shown = plan.cells(rank, (rank - step) % plan.world, cells, length)
            if shown is None:
                shown = _sampled(plan, rank, (rank - step) % plan.world, cells, length)
            rank_of[shown], step_of[shown] = rank, step
    return TileMap(rank_of, step_of, length / cells)


def _sampled(plan: Plan, rank: int, owner: int, cells: int, length: int) -> Tensor:
    shown = torch.zeros(cells, cells, dtype=torch.bool)
    mine, theirs = plan.queries.positions(rank), plan.keys.positions(owner)
    for tile in plan.tiles(rank, owner):
        if tile.heads.start == 0 and (tile.batch is None or tile.batch.start == 0):
            _mark(shown, tile, mine, theirs, cells / length)
    return shown


def _mark(shown: Tensor, tile: Tile, mine: Tensor, theirs: Tensor, scale: float) -> None:
    q, kv = tile.q, tile.kv
    queries = mine[torch.tensor(q.indices())].view(q.repeat, q.count)
    keys = theirs[torch.tensor(kv.indices())].view(kv.repeat, kv.count)
    rows = range(0, q.count, max(1, q.count // _ROWS))
    seen = tile.mask.visible(rows, kv.count).expand(1, 1, 1, len(rows), kv.count)[0, 0, 0]
    x, y = seen.nonzero(as_tuple=True)
    for n in range(0, q.repeat, max(1, q.repeat // _ROWS)):
        i, j = queries[n][list(rows)][x], keys[n][y]
        shown[(i * scale).long(), (j * scale).long()] = True

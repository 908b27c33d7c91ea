"""Planners that no shipped variant has yet: what a plan's data can say, and the engine must run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_core.attention import BaseRingAttention
from ring_core.layout import contiguous
from ring_core.masks import FULL, Mask
from ring_core.plan import Plan, Rows, Tile
from ring_core.sequences import Sequences


@dataclass(frozen=True)
class BlockColumns(Plan):
    """Block n of every rank's queries sees block n of every rank's keys: repeated remote rows."""

    block: int

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        rows = Rows(0, self.block, 1, self.queries.size // self.block, self.block)
        return [Tile(rows, rows, FULL)]


@dataclass(frozen=True)
class Checkerboard(Mask):
    """A mask of a third party: row x sees row y if their sum is even."""

    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        x = torch.arange(rows.start, rows.stop, device=device)
        return (x[:, None] + torch.arange(nk, device=device)) % 2 == 0

    def count(self, nq: int, nk: int) -> int:
        return (nq * nk + (nq % 2) * (nk % 2)) // 2


@dataclass(frozen=True)
class Checkered(Plan):
    """Every tile under a mask class that only the reference kernel knows."""

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        rows = Rows(0, self.queries.size)
        return [Tile(rows, rows, Checkerboard())]


@dataclass(frozen=True)
class FirstCheckered(Plan):
    """Only the first rank's tiles have that mask; all ranks must compute with one kernel."""

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        rows = Rows(0, self.queries.size)
        return [Tile(rows, rows, FULL if rank else Checkerboard())]


class Planned(BaseRingAttention):
    """An attention whose plan is chosen by name: the plan is all that differs."""

    planner = "checkered"

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        layout = contiguous(sequences.q_len, world)
        makers = {
            "block columns": lambda: BlockColumns(layout, layout, block=4),
            "checkered": lambda: Checkered(layout, layout),
            "first checkered": lambda: FirstCheckered(layout, layout),
        }
        return makers[self.planner]()


def visible(planner: str, length: int, world: int, kv_heads: int) -> Tensor:
    """The same meaning, pair by pair in plain Python: bool [kv_heads, length, length]."""
    shard = length // world
    seen = torch.zeros(kv_heads, length, length, dtype=torch.bool)
    for h in range(kv_heads):
        for i in range(length):
            for j in range(length):
                if planner == "block columns":
                    seen[h, i, j] = i % shard // 4 == j % shard // 4
                elif planner == "first checkered" and i >= shard:
                    seen[h, i, j] = True
                else:
                    seen[h, i, j] = (i % shard + j % shard) % 2 == 0
    return seen

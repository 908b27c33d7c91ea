"""Plans: who holds which rows, who computes which tiles in which order, who needs whose rows.

A plan is pure data, the same on every rank, testable with no device and no process group. It is a
small hashable value; what one rank does is expanded from it on demand. A variant brings a subclass
of :class:`Plan` with one method, :meth:`Plan.tiles`; ring order and transfers
(:mod:`ring_core.rounds`) and balance figures follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ring_core.layout import Layout
from ring_core.masks import Mask


@dataclass(frozen=True, slots=True, order=True)
class Rows:
    """Rows ``start + n*stride + x*step`` of a shard, for x < count and each of n < repeat.

    ``repeat`` > 1 makes one batched tile of many uniform ones: repetition n of the queries meets
    repetition n of the keys, under one mask.
    """

    start: int
    count: int
    step: int = 1
    repeat: int = 1
    stride: int = 0

    def __len__(self) -> int:
        return self.count * self.repeat

    @property
    def is_run(self) -> bool:
        """Whether these are neighbouring rows: a unit step, and no repetition."""
        return self.repeat == 1 and (self.step == 1 or self.count == 1)

    def chosen(self, which: range) -> Rows:
        """Some neighbouring ones of the ``count`` rows, in every repetition."""
        return replace(self, start=self.start + which.start * self.step, count=len(which))

    def indices(self) -> list[int]:
        """The row indices, repetition by repetition."""
        return [
            self.start + n * self.stride + x * self.step
            for n in range(self.repeat)
            for x in range(self.count)
        ]


@dataclass(frozen=True, slots=True, order=True)
class Heads:
    """KV heads ``start, start+step, ...`` and the query heads that they serve.

    Dilated attention gives KV head h the phase ``h mod r``: that is one tile per phase, with
    ``Heads(phase, r)`` and rows that start at the phase.
    """

    start: int = 0
    step: int = 1

    def count(self, kv_heads: int) -> int:
        """How many of ``kv_heads`` these are."""
        return len(range(self.start, kv_heads, self.step))


ALL_HEADS = Heads()


@dataclass(frozen=True, slots=True)
class Tile:
    """These query rows attend to those key/value rows under this mask.

    ``q`` counts in the rank's own query shard. ``kv`` counts in the owner's key shard as a planner
    gives it, and in block ``block`` of what was fetched as a round holds it. ``batch`` is a run
    of batch rows; None means all.
    """

    q: Rows
    kv: Rows
    mask: Mask
    heads: Heads = ALL_HEADS
    batch: range | None = None
    block: int = 0

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs, for one head and one batch row."""
        return self.q.repeat * self.mask.count(self.q.count, self.kv.count)


@dataclass(frozen=True)
class Plan(ABC):
    """A plan for a group of ranks; a planner is a subclass with fields and :meth:`tiles`."""

    queries: Layout
    keys: Layout

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.queries.world

    @abstractmethod
    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        """Tiles of ``rank``'s queries with ``owner``'s keys; ``kv`` counts in the owner's shard.

        Every visible pair stands in exactly one tile of exactly one (rank, owner); tiles that see
        nothing are left out.
        """

    @property
    def masks(self) -> frozenset[type[Mask]]:
        """The kinds of mask that any rank's tiles have: all ranks choose one kernel by them.

        A planner that knows them overrides this, and spares going through all tiles.
        """
        ranks = range(self.world)
        return frozenset(
            type(t.mask) for r in ranks for owner in ranks for t in self.tiles(r, owner)
        )

    def work(self, rank: int, batch: int = 1) -> int:
        """Visible pairs that ``rank`` computes, summed over ``batch`` batch rows, per head."""
        return sum(
            tile.pairs * (batch if tile.batch is None else len(tile.batch))
            for owner in range(self.world)
            for tile in self.tiles(rank, owner)
        )

    def imbalance(self, batch: int = 1) -> float:
        """Work of the busiest rank over the mean; 1.0 is perfect balance."""
        work = [self.work(rank, batch) for rank in range(self.world)]
        return max(work) * self.world / sum(work) if sum(work) else 1.0

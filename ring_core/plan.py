"""Plans: who holds which rows, who computes which tiles in which order, who needs whose rows.

A plan is pure data, the same on every rank, testable with no device and no process group. It is a
small hashable value; what one rank does is expanded from it on demand. A variant brings a subclass
of :class:`Plan` with one method, :meth:`Plan.tiles`; ring order, transfers, dropped steps and
balance figures follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
class Part:
    """Rows of a peer's key/value shard that cross the wire together, for some heads."""

    rows: Rows
    heads: Heads = ALL_HEADS


@dataclass(frozen=True, slots=True)
class Tile:
    """These query rows attend to those key/value rows under this mask.

    ``q`` counts in the rank's own query shard. ``kv`` counts in the owner's key shard as a planner
    gives it, and in part ``part`` of what was fetched as a step holds it. ``batch`` is a run
    of batch rows; None means all.
    """

    q: Rows
    kv: Rows
    mask: Mask
    heads: Heads = ALL_HEADS
    batch: range | None = None
    part: int = 0

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs, for one head and one batch row."""
        return self.q.repeat * self.mask.count(self.q.count, self.kv.count)


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does at one step of the ring.

    At step 0 the keys are the rank's own and nothing is fetched. ``give`` are the parts of the
    rank's own shard that ``requester`` needs at this step.
    """

    index: int
    source: int
    parts: tuple[Part, ...]
    tiles: tuple[Tile, ...]
    requester: int
    give: tuple[Part, ...]


@dataclass(frozen=True)
class Plan(ABC):
    """A plan for a group of ranks; a planner is a subclass with its own fields and :meth:`tiles`.

    At step t every rank computes with the keys of the rank t before it and sends its own to the
    rank t after it, straight from the owner. So at each step every rank sends to at most one peer
    and receives from at most one; steps that move and compute nothing are dropped.
    """

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

    def steps(self, rank: int) -> tuple[Step, ...]:
        """What ``rank`` does, in order."""
        return _expand(self, rank)

    def wanted(self, rank: int, owner: int) -> tuple[Part, ...]:
        """Parts of ``owner``'s key shard that ``rank`` fetches."""
        return _parts(self.tiles(rank, owner))[0] if rank != owner else ()

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

    def elements_sent(self, rank: int, kv_heads: int) -> int:
        """(Row, KV head) pairs of its own keys that ``rank`` sends in one forward.

        Times ``(D + Dv) * batch * itemsize`` this is the bytes that a communicator counts.
        """
        return sum(
            len(part.rows) * part.heads.count(kv_heads)
            for step in self.steps(rank)
            for part in step.give
        )

    def elements_fetched(self, rank: int, kv_heads: int) -> int:
        """(Row, KV head) pairs that ``rank`` gets in one forward; their gradients go back."""
        return sum(
            len(part.rows) * part.heads.count(kv_heads)
            for step in self.steps(rank)
            for part in step.parts
        )


@lru_cache(maxsize=64)
def _expand(plan: Plan, rank: int) -> tuple[Step, ...]:
    world = plan.world
    steps = []
    for t in range(world):
        source, requester = (rank - t) % world, (rank + t) % world
        parts, tiles = _parts(plan.tiles(rank, source))
        if t == 0:  # own keys are used where they lie
            steps.append(Step(0, rank, (), tuple(plan.tiles(rank, rank)), rank, ()))
            continue
        give = plan.wanted(requester, rank)
        if tiles or give:
            steps.append(Step(t, source, parts, tiles, requester, give))
    return tuple(steps)


def _parts(tiles: Sequence[Tile]) -> tuple[tuple[Part, ...], tuple[Tile, ...]]:
    """The rows that ``tiles`` read, each once, and the tiles with ``kv`` counted in those parts.

    Unit-step rows are merged into intervals. Strided and repeated rows travel packed: they are
    sent as they are, once however many tiles read them.
    """
    parts: list[Part] = []
    solid: dict[Heads, tuple[list[int], int]] = {}  # starts of the intervals, and the first's index
    packed: dict[tuple[Heads, Rows], int] = {}
    for heads in dict.fromkeys(tile.heads for tile in tiles):
        mine = [tile.kv for tile in tiles if tile.heads == heads]
        intervals = _intervals(rows for rows in mine if _solid(rows))
        solid[heads] = [rows.start for rows in intervals], len(parts)
        parts += [Part(rows, heads) for rows in intervals]
        for rows in dict.fromkeys(rows for rows in mine if not _solid(rows)):
            packed[heads, rows] = len(parts)
            parts.append(Part(rows, heads))
    placed = []
    for tile in tiles:
        rows = tile.kv
        if _solid(rows):
            starts, first = solid[tile.heads]
            part = first + bisect_right(starts, rows.start) - 1
            rows = replace(rows, start=rows.start - parts[part].rows.start)
        else:
            part = packed[tile.heads, rows]
            rows = Rows(0, rows.count, 1, rows.repeat, rows.count)
        placed.append(replace(tile, kv=rows, part=part))
    return tuple(parts), tuple(placed)


def _solid(rows: Rows) -> bool:
    return rows.repeat == 1 and (rows.step == 1 or rows.count == 1)


def _intervals(rows: Iterable[Rows]) -> list[Rows]:
    merged: list[Rows] = []
    for one in sorted(rows):
        if merged and one.start <= merged[-1].start + merged[-1].count:
            stop = max(merged[-1].start + merged[-1].count, one.start + one.count)
            merged[-1] = Rows(merged[-1].start, stop - merged[-1].start)
        else:
            merged.append(Rows(one.start, one.count))
    return merged

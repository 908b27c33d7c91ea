"""Plans: who holds which rows, who computes which tiles in which order, who needs whose rows.

A plan is pure data, the same on every rank, testable with no device and no process group. It is a
small hashable value; what one rank does is expanded from it on demand. A variant brings a subclass
of :class:`Plan` with one method, :meth:`Plan.tiles`; ring order and transfers
(:mod:`ring_core.rounds`) and balance figures follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ring_core.errors import PlanError
from ring_core.layout import Layout
from ring_core.masks import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from ring_core.order import Walk


@dataclass(frozen=True, slots=True, order=True)
class Rows:
    """Rows ``start + n*stride + x*step`` of a shard, for x < count and each of n < repeat.

    ``repeat`` > 1 makes one batched tile of many uniform ones: repetition n of the queries meets
    repetition n of the keys, under one mask. These are the rows of the first phase of
    :class:`Heads`; each further phase's lie ``slant`` rows behind.
    """

    start: int
    count: int
    step: int = 1
    repeat: int = 1
    stride: int = 0
    slant: int = 0

    def __len__(self) -> int:
        return self.count * self.repeat

    @property
    def is_run(self) -> bool:
        """Whether these are neighbouring rows of all heads: a unit step, and no repetition."""
        return self.repeat == 1 and self.span is not None

    @property
    def lattice(self) -> tuple[int, int, int]:
        """Step, remainder of it, slant: rows of one lattice can be counted together."""
        return self.step, self.start % self.step, self.slant

    @property
    def span(self) -> range | None:
        """All rows as one range, if they are neighbours in the order that they are counted in."""
        together = self.repeat == 1 or self.stride == self.count
        if together and (self.step == 1 or self.count == 1) and not self.slant:
            return range(self.start, self.start + len(self))
        return None

    def extent(self, phases: int) -> range:
        """From the first to the last of the rows of so many phases; there is at least one row."""
        last = self.start + (self.repeat - 1) * self.stride + (self.count - 1) * self.step
        return range(self.start, last + (phases - 1) * self.slant + 1)

    def chosen(self, which: range) -> Rows:
        """Some neighbouring ones of the ``count`` rows, in every repetition."""
        return replace(self, start=self.start + which.start * self.step, count=len(which))

    def of_phases(self, phases: range) -> Rows:
        """The rows of some neighbouring phases."""
        slant = self.slant if len(phases) > 1 else 0
        return replace(self, start=self.start + phases.start * self.slant, slant=slant)

    def repetitions(self, which: range) -> Rows:
        """Some neighbouring ones of the repetitions."""
        start = self.start + which.start * self.stride
        return replace(
            self, start=start, repeat=len(which), stride=self.stride if len(which) > 1 else 0
        )

    def indices(self) -> list[int]:
        """The row indices of the first phase, repetition by repetition."""
        return [
            self.start + n * self.stride + x * self.step
            for n in range(self.repeat)
            for x in range(self.count)
        ]


@dataclass(frozen=True, slots=True)
class Segments(Rows):
    """``count`` rows in several ``runs``, ascending, that are no lattice.

    In a plan those of a peer, that are fetched: where they have arrived they are neighbours, and
    plain :class:`Rows`. A kernel that joins tiles may have any gathered for one call.
    """

    runs: tuple[range, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Every call looks up where the rows lie, many times; there may be thousands of runs.
        object.__setattr__(self, "_hash", hash((self.start, self.count, self.runs)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Segments], tuple[Any, ...]]:
        # Another process hashes otherwise.
        rest = self.step, self.repeat, self.stride, self.slant, self.runs
        return Segments, (self.start, self.count, *rest)

    @staticmethod
    def of(runs: Sequence[range]) -> Rows:
        """Rows of ascending runs; of one run the plain ones."""
        if len(runs) == 1:
            return Rows(runs[0].start, len(runs[0]), runs[0].step)
        return Segments(runs[0].start, sum(map(len, runs)), runs=tuple(runs))

    @property
    def span(self) -> None:
        return None

    def extent(self, phases: int) -> range:
        return range(self.runs[0].start, self.runs[-1].stop)

    def indices(self) -> list[int]:
        return [row for run in self.runs for row in run]


@dataclass(frozen=True, slots=True, order=True)
class Heads:
    """KV heads ``start + g*step + p`` for all g and each phase p < phases, and the query heads that
    they serve.

    Dilated attention gives KV head h the phase ``h mod r``: ``Heads(phase, r)`` are the heads of
    one phase, whose rows start at it; ``Heads(0, r, r)`` are all heads, with slanted rows.
    """

    start: int = 0
    step: int = 1
    phases: int = 1

    def count(self, kv_heads: int) -> int:
        """How many of ``kv_heads`` these are; in plans :class:`ForHeads` a multiple of phases."""
        groups, rest = divmod(max(0, kv_heads - self.start), self.step)
        return groups * self.phases + min(rest, self.phases)

    def indices(self, kv_heads: int) -> list[int]:
        """Which of ``kv_heads`` these are, in the order in which their rows are selected."""
        starts = range(self.start, kv_heads, self.step)
        return [
            head for first in starts for head in range(first, min(first + self.phases, kv_heads))
        ]

    def only(self, phases: range) -> Heads:
        """Some neighbouring ones of the phases."""
        return replace(self, start=self.start + phases.start, phases=len(phases))


ALL_HEADS = Heads()


@dataclass(frozen=True, slots=True)
class HeldHeads:
    """Which heads of the whole attention tensors hold, where each rank has only some of them.

    Attributes:
        kv: the KV heads. kv_heads: of how many. first_query: the first query head; the others
            follow it, and each KV head serves equally many of those held.
    """

    kv: range
    kv_heads: int
    first_query: int


@dataclass(frozen=True, slots=True)
class Tile:
    """These query rows attend to those key/value rows under this mask.

    ``q`` counts in the rank's own query shard. ``kv`` counts in the owner's key shard as a planner
    gives it (:class:`Segments` only if that is a peer), and in block ``block`` of what was fetched
    as a round holds it. ``batch`` is a run of batch rows; None means all.
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

    def only(self, phases: range) -> Tile:
        """The tile for some neighbouring ones of its heads' phases."""
        if len(phases) == self.heads.phases:
            return self
        q, kv = (rows.of_phases(phases) for rows in (self.q, self.kv))
        return replace(
            self, q=q, kv=kv, mask=self.mask.of_phases(phases), heads=self.heads.only(phases)
        )


@dataclass(frozen=True)
class Plan(ABC):
    """A plan for a group of ranks; a planner is a subclass with fields and :meth:`tiles`."""

    queries: Layout
    keys: Layout

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.queries.world

    @property
    def shards(self) -> tuple[Layout, Layout]:
        """How callers hold queries and keys, where that is not how tiles count them: each rank's
        tokens, in whatever order."""
        return self.queries, self.keys

    @abstractmethod
    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        """Tiles of ``rank``'s queries with ``owner``'s keys; ``kv`` counts in the owner's shard.

        Every visible pair stands in exactly one tile of exactly one (rank, owner), or in as many
        tiles as it counts in the softmax. Tiles whose mask lets nothing through are left out; those
        without rows may stay. Rows are those that the ranks own: padding is in no tile.
        """

    def for_heads(self, kv_heads: int) -> Plan:
        """The plan where there are so many KV heads: it may leave out tiles of heads beyond."""
        return self

    def over(self, queries: Layout, keys: Layout) -> Plan:
        """The same attention with the rows dealt out otherwise, over as many ranks as that is.

        Planners with fields that follow from the layouts override this.
        """
        return replace(self, queries=queries, keys=keys)

    @property
    def chooses(self) -> bool:
        """Whether the tensors of a call decide what is seen; see
        :meth:`ring_core.attention.BaseRingAttention.choose`."""
        return False

    @property
    def masks(self) -> frozenset[type[Mask]]:
        """The kinds of mask that any rank's tiles have: all ranks choose one kernel by them.

        A planner that knows them overrides this, and spares going through all tiles.
        """
        ranks = range(self.world)
        return frozenset(
            type(t.mask) for r in ranks for owner in ranks for t in self.tiles(r, owner)
        )

    def share(self, heads: Heads) -> Fraction:
        """Of all KV heads; of as many as there are phases, where a plan knows no number."""
        return Fraction(heads.phases, heads.step)

    def facts(self) -> Mapping[str, str]:
        """What a variant says of a plan beside work and transfers, for people, by name."""
        return {}

    def alternatives(self) -> Sequence[Mapping[str, str]]:
        """What a variant weighed before it chose this plan, for people: the rows of a table, each
        by the names of its columns."""
        return ()

    @property
    def walk(self) -> Walk | None:
        """For pictures: how the tokens that callers hold are laid out; None if there is no grid."""
        order = self.shards[0].order
        return None if order is None else order.walk()

    def cells(self, rank: int, owner: int, cells: int, length: int) -> Tensor | None:
        """For pictures: of which cells ``rank`` computes something with ``owner``'s keys.

        Args:
            cells: along each side of the map. length: tokens along each side.

        Returns:
            bool [cells, cells], queries first; None: it is found out by looking at tiles.
        """
        return None

    def work(self, rank: int, batch: int = 1) -> Fraction:
        """Visible pairs that ``rank`` computes, summed over ``batch`` batch rows: the mean over
        heads."""
        return sum(
            (
                tile.pairs
                * (batch if tile.batch is None else len(tile.batch))
                * self.share(tile.heads)
                for owner in range(self.world)
                for tile in self.tiles(rank, owner)
            ),
            start=Fraction(),
        )

    def imbalance(self, batch: int = 1) -> float:
        """Work of the busiest rank over the mean; 1.0 is perfect balance."""
        work = [self.work(rank, batch) for rank in range(self.world)]
        return float(max(work) * self.world / sum(work)) if sum(work) else 1.0


@dataclass(frozen=True)
class ForHeads(Plan):
    """A plan for tensors of ``kv_heads`` KV heads.

    Tiles are left out of heads that the tensors do not have, and each of a tile's phases has
    equally many. ``apart``: each tile has one phase. ``held``: which heads those are, where the
    attention has more; tiles then count heads from the first one held.
    """

    whole: Plan
    kv_heads: int
    apart: bool = False
    held: HeldHeads | None = None

    @staticmethod
    def of(
        plan: Plan, kv_heads: int, apart: bool = False, held: HeldHeads | None = None
    ) -> ForHeads:
        """``plan`` for so many KV heads."""
        if isinstance(plan, ForHeads):
            plan = plan.whole
        whole = plan.for_heads(kv_heads if held is None else held.kv_heads)
        return ForHeads(plan.queries, plan.keys, whole, kv_heads, apart, held)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: a plan of many documents is a key of several caches."""
        return hash((self.whole, self.kv_heads, self.apart, self.held))

    @property
    def masks(self) -> frozenset[type[Mask]]:
        return self.whole.masks

    def share(self, heads: Heads) -> Fraction:
        return Fraction(heads.count(self.kv_heads), self.kv_heads)

    def work(self, rank: int, batch: int = 1) -> Fraction:
        return self.whole.work(rank, batch)

    def facts(self) -> Mapping[str, str]:
        return self.whole.facts()

    def alternatives(self) -> Sequence[Mapping[str, str]]:
        return self.whole.alternatives()

    @property
    def walk(self) -> Walk | None:
        return self.whole.walk

    def cells(self, rank: int, owner: int, cells: int, length: int) -> Tensor | None:
        return self.whole.cells(rank, owner, cells, length)

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        return [
            part
            for tile in self.whole.tiles(rank, owner)
            for mine in ([tile] if self.held is None else _held(tile, self.held.kv))
            for part in self._parts(mine)
            if part.heads.count(self.kv_heads)
        ]

    def _parts(self, tile: Tile) -> Sequence[Tile]:
        phases = tile.heads.phases
        if self.apart:
            return [tile.only(range(p, p + 1)) for p in range(phases)]
        more = max(0, self.kv_heads - tile.heads.start) % tile.heads.step
        if 0 < more < phases:  # the last heads do not go through all phases
            return [tile.only(range(more)), tile.only(range(more, phases))]
        return [tile]


def check_tiles(plan: Plan, rank: int, owner: int, tiles: Sequence[Tile]) -> None:
    """Check that ``tiles``, which the plan gave for ``rank`` and ``owner``, name rows of theirs.

    Raises:
        PlanError: one does not; names the planner, its rows, and how many there are.
    """
    queries, keys = plan.queries.owned(rank), plan.keys.owned(owner)
    for tile in tiles:
        q, kv = (rows.extent(tile.heads.phases) for rows in (tile.q, tile.kv))
        if min(q.start, kv.start) < 0 or q.stop > queries or kv.stop > keys:
            planner = plan.whole if isinstance(plan, ForHeads) else plan
            raise PlanError(
                f"{type(planner).__qualname__}.tiles(rank={rank}, owner={owner}): a tile has query "
                f"rows {q.start} to {q.stop - 1} and key rows {kv.start} to {kv.stop - 1}, and "
                f"rank {rank} holds {queries} queries, rank {owner} {keys} keys. Rows count in "
                "shards, from 0, without padding: see Layout.owned and ring_core.tiling.runs_of"
            )


def _held(tile: Tile, held: range) -> list[Tile]:
    """The tile for those of its heads that are held, counted from the first one held."""
    heads = tile.heads
    if heads == ALL_HEADS:
        return [replace(tile, mask=tile.mask.of_heads(held))]
    runs: list[tuple[range, int]] = []  # phases, and the first held head of the first one
    for phase in range(heads.phases):
        first = heads.start + phase - held.start
        first += max(0, -(first // heads.step)) * heads.step
        if first >= len(held):
            continue
        phases, start = runs[-1] if runs else (range(0), 0)
        if phases and phases.stop == phase and start + len(phases) == first:
            runs[-1] = range(phases.start, phase + 1), start
        else:
            runs.append((range(phase, phase + 1), first))
    return [
        replace(tile.only(phases), heads=Heads(start, heads.step, len(phases)))
        for phases, start in runs
    ]

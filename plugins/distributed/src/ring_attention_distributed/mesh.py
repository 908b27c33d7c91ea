"""Groups of ranks that exchange heads, and the rings between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.child import child_group, destroy
from ring_core.layout import Layout, joined
from ring_core.plan import Plan
from ring_core.rank_plan import RankPlan

_FEW = 16
"""Stretches that are copied one by one; an index takes longer for each row."""


@dataclass(frozen=True)
class Mesh:
    """Rank ``ring * degree + place`` of the group is number ``place`` of its head group, and number
    ``ring`` of the ring of all with that number.

    Neighbouring ranks exchange heads: a launcher numbers those of one host together.
    """

    world: int
    degree: int
    rank: int

    @property
    def ring(self) -> int:
        """This rank's number in its ring."""
        return self.rank // self.degree

    @property
    def place(self) -> int:
        """This rank's number in its head group."""
        return self.rank % self.degree

    @property
    def ring_peers(self) -> range:
        """The ranks of this one's ring."""
        return range(self.place, self.world, self.degree)

    @property
    def peers(self) -> range:
        """The ranks of this one's head group."""
        return range(self.ring * self.degree, (self.ring + 1) * self.degree)


def ring_plan(plan: Plan, degree: int) -> Plan:
    """The plan of the rings: a head group's ranks bring their rows together."""
    queries = _together(plan.queries, degree)
    keys = queries if plan.keys == plan.queries else _together(plan.keys, degree)
    return plan.over(queries, keys)


def _together(layout: Layout, degree: int) -> Layout:
    if layout.world == degree:
        rows: tuple[tuple[range, ...], ...] = ((range(layout.length),),)
    else:
        rows = tuple(
            joined(sorted((run for runs in some for run in runs), key=lambda run: run.start))
            for first in range(0, layout.world, degree)
            for some in [layout.rows[first : first + degree]]
        )
    return replace(layout, rows=rows)


@dataclass(frozen=True, slots=True)
class Stretch:
    """``count`` neighbouring rows, from ``shard`` on in a rank's shard and from ``ring`` on in the
    ring's."""

    shard: int
    ring: int
    count: int


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of a head group's shards stand in the shard of the ring.

    Attributes:
        shard: rows of each rank's shard. together: rows of the ring's.
        counts: of each rank of the group, how many of its rows are no padding.
        rows: of each rank, where those stand: a few stretches, or an index.
    """

    shard: int
    together: int
    counts: tuple[int, ...]
    rows: tuple[tuple[Stretch, ...] | Tensor, ...]

    @staticmethod
    def of(shards: Sequence[Tensor], together: Tensor) -> Places:
        """From the tokens in the rows of each: int64, -1 for padding, which stands at the end."""
        held = together[together >= 0]
        order = torch.argsort(held)
        counts, rows = [], []
        for positions in shards:
            mine = positions[positions >= 0]
            counts.append(len(mine))
            rows.append(_stretches(order[torch.searchsorted(held[order], mine)]))
        return Places(len(shards[0]), len(together), tuple(counts), tuple(rows))

    @property
    def in_order(self) -> bool:
        """Whether the ring's shard is the group's shards end to end."""
        return self.together == self.shard * len(self.rows) and all(
            isinstance(rows, tuple) and rows == (Stretch(0, place * self.shard, self.shard),)
            for place, rows in enumerate(self.rows)
        )

    def room(self, like: Tensor, heads: int) -> Tensor:
        """A shard of the ring [B, together, heads, D], of which padding is 0."""
        shape = like.shape[0], self.together, heads, like.shape[3]
        room = like.new_empty(shape)
        room[:, sum(self.counts) :] = 0
        return room

    def put(self, there: Tensor, place: int, rows: Tensor) -> None:
        """Copy a rank's shard into the ring's."""
        at = self.rows[place]
        if isinstance(at, Tensor):
            there.index_copy_(1, at.to(there.device), rows[:, : self.counts[place]])
            return
        for one in at:
            there[:, one.ring : one.ring + one.count] = rows[:, one.shard : one.shard + one.count]

    def end_to_end(self, x: Tensor) -> Tensor:
        """The rows of the ring's shard as the group's shards [B, degree * shard, heads, D]."""
        if self.in_order:
            return x.contiguous()
        whole = x.new_empty(x.shape[0], len(self.rows) * self.shard, *x.shape[2:])
        for place, (at, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            mine = whole[:, place * self.shard : (place + 1) * self.shard]
            mine[:, count:] = 0
            if isinstance(at, Tensor):
                mine[:, :count] = x.index_select(1, at.to(x.device))
                continue
            for one in at:
                mine[:, one.shard : one.shard + one.count] = x[:, one.ring : one.ring + one.count]
        return whole


def _stretches(rows: Tensor) -> tuple[Stretch, ...] | Tensor:
    """Rows of a ring's shard as stretches, if they are few."""
    breaks = (rows.diff() != 1).nonzero().squeeze(1) + 1
    if len(breaks) >= _FEW:
        return rows
    edges = [0, *breaks.tolist(), len(rows)]
    return tuple(Stretch(a, int(rows[a]), b - a) for a, b in pairwise(edges) if b > a)


def places(plan: RankPlan, ring: Plan, mesh: Mesh) -> tuple[Places, Places]:
    """Of queries and of keys."""
    found = [
        Places.of([layout.positions(rank) for rank in mesh.peers], together.positions(mesh.ring))
        for layout, together in (
            (plan.plan.queries, ring.queries),
            (plan.plan.keys, ring.keys),
        )
    ]
    return found[0], found[1]


_parts: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def part_of(group: Any, members: Sequence[int], timeout: float) -> Any | None:
    """The process group of some ranks of ``group``, made at the first question; all its ranks ask
    alike, each for a part that it is in. It goes with ``group``. None for a single rank, and
    ``group`` itself for all of its ranks.

    Args:
        members: ranks in the group, ascending.

    Raises:
        CommunicatorError: a rank did not ask within ``timeout`` seconds.
    """
    if len(members) == 1:
        return None
    if len(members) == dist.get_world_size(group):
        return group
    made, key = _parts.setdefault(group, {}), tuple(members)
    if key not in made:
        ranks = dist.get_process_group_ranks(group)
        made[key] = child_group(group, [ranks[member] for member in members], timeout)
        finalize(group, destroy, made[key])
    return made[key]

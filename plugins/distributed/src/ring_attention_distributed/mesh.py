"""Groups of ranks that exchange heads, and the rings between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attention_distributed.child import child_group
from ring_core.layout import Layout, joined
from ring_core.plan import Plan
from ring_core.rank_plan import RankPlan


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
    def rings(self) -> int:
        """Ranks of a ring."""
        return self.world // self.degree

    @property
    def ring(self) -> int:
        """This rank's number in its ring."""
        return self.rank // self.degree

    @property
    def place(self) -> int:
        """This rank's number in its head group."""
        return self.rank % self.degree

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


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of a head group's shards stand in the shard of the ring.

    Attributes:
        shard: rows of each rank's shard. together: rows of the ring's.
        rows: for each rank of the group, where its rows stand that are no padding: neighbours, or
            an index.
    """

    shard: int
    together: int
    rows: tuple[slice | Tensor, ...]

    @staticmethod
    def of(shards: Sequence[Tensor], together: Tensor) -> Places:
        """From the tokens in the rows of each: int64, -1 for padding, which stands at the end."""
        held = together[together >= 0]
        order = torch.argsort(held)
        rows: list[slice | Tensor] = []
        for positions in shards:
            mine = positions[positions >= 0]
            found = order[torch.searchsorted(held[order], mine)]
            first = int(found[0]) if len(found) else 0
            run = slice(first, first + len(found))
            neighbours = torch.equal(found, torch.arange(run.start, run.stop, device="cpu"))
            rows.append(run if neighbours else found)
        return Places(len(shards[0]), len(together), tuple(rows))

    def count(self, place: int) -> int:
        """Rows of a rank's shard that are no padding."""
        rows = self.rows[place]
        return rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    @property
    def in_order(self) -> bool:
        """Whether the ring's shard is the group's shards end to end."""
        return (
            self.together == self.shard * len(self.rows)
            and all(
                rows == slice(place * self.shard, (place + 1) * self.shard)
                for place, rows in enumerate(self.rows)
                if isinstance(rows, slice)
            )
            and all(isinstance(rows, slice) for rows in self.rows)
        )

    def room(self, like: Tensor, heads: int, dtype: torch.dtype | None = None) -> Tensor:
        """A shard of the ring [B, together, heads, D], of which padding is 0."""
        shape = like.shape[0], self.together, heads, like.shape[3]
        room = like.new_empty(shape, dtype=dtype or like.dtype)
        real = sum(self.count(place) for place in range(len(self.rows)))
        room[:, real:] = 0
        return room

    def put(self, there: Tensor, place: int, rows: Tensor) -> None:
        """Copy a rank's shard into the ring's."""
        at, rows = self.rows[place], rows[:, : self.count(place)]
        if isinstance(at, slice):
            there[:, at] = rows
        else:
            there.index_copy_(1, at.to(there.device), rows)

    def end_to_end(self, x: Tensor) -> Tensor:
        """The rows of the ring's shard as the group's shards [B, degree * shard, heads, D]."""
        if self.in_order:
            return x.contiguous()
        shards = x.new_zeros(x.shape[0], len(self.rows) * self.shard, *x.shape[2:])
        for place, at in enumerate(self.rows):
            rows = x[:, at] if isinstance(at, slice) else x.index_select(1, at.to(x.device))
            first = place * self.shard
            shards[:, first : first + rows.shape[1]] = rows
        return shards


def places(plan: RankPlan, ring: RankPlan, mesh: Mesh) -> tuple[Places, Places]:
    """Of queries and of keys."""
    found = [
        Places.of([layout.positions(rank) for rank in mesh.peers], together.positions(mesh.ring))
        for layout, together in (
            (plan.plan.queries, ring.plan.queries),
            (plan.plan.keys, ring.plan.keys),
        )
    ]
    return found[0], found[1]


_rings: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()


def ring_group(group: Any, mesh: Mesh, timeout: float) -> Any | None:
    """The process group of this rank's ring, made at the first question, which all ranks of the
    group ask alike. None where a ring is one rank.

    Raises:
        CommunicatorError: a rank did not ask within ``timeout`` seconds.
    """
    if mesh.rings == 1:
        return None
    made = _rings.setdefault(group, {})
    if mesh.degree not in made:
        ranks = dist.get_process_group_ranks(group)[mesh.place :: mesh.degree]
        made[mesh.degree] = child_group(group, ranks, timeout)
    return made[mesh.degree]

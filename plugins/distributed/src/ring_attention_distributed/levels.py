"""Rings in two levels: keys cross from host to host once, and go round within each host.

In a ring of all ranks each of a host's ranks would fetch the keys of other hosts for itself. Here
a rank fetches those of the rank with its number on another host, while the ring within its host
goes over those fetched before (as in LoongTrain's double ring, arXiv 2406.18485): between hosts
each rank moves one shard for each other host instead of all its ranks' shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ring_attention_distributed.mesh import Mesh, part_of
from ring_core import engine
from ring_core.accumulation import Merge, Sum
from ring_core.calls import Call
from ring_core.given import Given
from ring_core.layout import Layout
from ring_core.masks import FULL
from ring_core.plan import HeldHeads, Plan, Rows, Tile
from ring_core.protocols import Communicator
from ring_core.rank_plan import RankPlan
from ring_core.rounds import Round, rounds, tiles_of
from ring_core.softmax import accumulation_dtype


@dataclass(frozen=True)
class RelayPlan(Plan):
    """What hosts fetch of each other, for the ranks of one number in their host; a rank of this
    plan is a host.

    Attributes:
        needed: for each host and each owner the rows that some rank of the host needs, or None.
    """

    needed: tuple[tuple[range | None, ...], ...]

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        rows = self.needed[rank][owner]
        if rank == owner or rows is None:
            return []
        return [Tile(Rows(0, 1), Rows(rows.start, len(rows)), FULL)]


@dataclass(frozen=True, eq=False)
class _Arrival:
    """Keys and values of a rank of another host, in the rows of its shard.

    Attributes:
        stood: in which step of the round, and which rows came; None where none did.
    """

    host: int
    keys: Tensor
    values: Tensor
    stood: tuple[int, Rows] | None


@dataclass(frozen=True, eq=False)
class Levels:
    """A ring of several hosts as one rank sees it.

    Attributes:
        host: this rank's. met: those of whose keys some rank of this host needs any.
        whole: the plan of all ranks of the ring, where tensors decide what is seen; else None.
        relay: between hosts. within: for the keys of each host the plan of the ring within this
            one.
    """

    host: int
    met: frozenset[int]
    whole: RankPlan | None
    relay: RankPlan
    within: tuple[RankPlan, ...]

    @cached_property
    def _rounds(self) -> dict[float, tuple[Round, ...]]:
        return {}

    def rounds(self, shards: float) -> tuple[Round, ...]:
        """Between hosts, for a communicator that may hold so many shards."""
        if shards not in self._rounds:
            self._rounds[shards] = rounds(self.relay.plan, self.relay.rank, shards)
        return self._rounds[shards]

    def arrived(
        self,
        walk: Iterable[tuple[Round, Sequence[Tensor], Sequence[Tensor]]],
        like: Sequence[Tensor],
    ) -> Iterator[tuple[Round | None, list[_Arrival]]]:
        """Rounds between hosts, each with the keys that the ring within this host goes over next.

        All ranks of a host go over the same hosts' keys in one order, whether or not some of theirs
        came: behind the last round stands what came for none of this rank's number.
        """
        hosts = self.relay.world
        todo = [t for t in range(1, hosts) if (self.host - t) % hosts in self.met]
        for one, keys, values in walk:
            if one.index == 0:
                yield one, [_Arrival(self.host, keys[0], values[0], None)]
                continue
            came = {}
            for place, step in enumerate(one.steps):
                for part in step.parts:
                    rows = slice(part.row, part.row + len(part.rows))
                    key, value = (
                        _in_place(x[part.block][:, rows], part.rows.start, whole)
                        for x, whole in zip((keys, values), like, strict=True)
                    )
                    came[step.offset] = _Arrival(step.source, key, value, (place, part.rows))
            last = max(step.offset for step in one.steps)
            now, todo = [t for t in todo if t <= last], [t for t in todo if t > last]
            yield one, [came.get(t) or self._nothing(t, like) for t in now]
        if todo:
            yield None, [self._nothing(t, like) for t in todo]

    def _nothing(self, offset: int, like: Sequence[Tensor]) -> _Arrival:
        key, value = (x.new_zeros(()).expand(x.shape) for x in like)
        return _Arrival((self.host - offset) % self.relay.world, key, value, None)

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse of this rank's queries."""
        settings = call.tagged("forward", self.within[self.host])
        choice = self._choice(call, q, k, settings.tag)
        merged = Merge(q, v.shape[-1], k.shape[2])
        outer = self._outer(call, q)
        walk = engine.with_keys(self.rounds(outer.shards), k, v, outer, settings)
        for _, arrivals in self.arrived(walk, (k, v)):
            for came in arrivals:
                plan = self.within[came.host]
                engine.attend_into(
                    merged,
                    call.program(plan, q, came.values),
                    q,
                    came.keys,
                    came.values,
                    call.runtime.communicator(plan, q.device),
                    replace(settings, tag=settings.tag + came.host),
                    choice=choice,
                )
        return merged.result()

    def differentiate(
        self, call: Call, given: Given, kv_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        q, k, v = given.q, given.k, given.v
        settings = call.tagged("backward", self.within[self.host])
        choice = self._choice(call, q, k, settings.tag)
        dout, out = engine.with_column(given.dout, given.out, given.dlse)
        wide = accumulation_dtype(k.dtype)
        dq, dk, dv = (Sum.of(x, k.shape[2]) for x in (q, k, v))
        homeward: engine.Homeward | None = None
        outer = self._outer(call, q)
        walk = engine.with_keys(
            self.rounds(outer.shards), k, v, outer, settings, gives_back=call.need_kv
        )
        for one, arrivals in self.arrived(walk, (k, v)):
            steps = one.steps if one is not None else ()
            found: list[list[tuple[Tensor, ...]]] = [[] for _ in steps]
            for came in arrivals:
                plan = self.within[came.host]
                own = one is not None and one.index == 0
                here = (dk, dv) if own else (Sum.of(k, k.shape[2]), Sum.of(v, k.shape[2]))
                last = engine.differentiate_into(
                    (dq, *here),
                    call.program(plan, q, came.values, int(given.dlse is not None)),
                    dout,
                    q,
                    came.keys,
                    came.values,
                    out,
                    given.lse,
                    call.runtime.communicator(plan, q.device),
                    replace(settings, tag=settings.tag + came.host),
                    need_kv=call.need_kv,
                    choice=choice,
                )
                if last:
                    _take(last, *here)
                if came.stood is not None:
                    place, rows = came.stood
                    span = range(rows.start, rows.start + len(rows))
                    found[place].append(tuple(x.rows(span, wide) for x in here))
            if call.need_kv and one is not None and one.index:
                if homeward:
                    _take(homeward, dk, dv)
                pending = outer.give_back(one, found, (k, v), settings.tag)
                homeward = engine.Homeward(one, pending)
        if homeward:
            _take(homeward, dk, dv)
        return dq.result(), dk.result(kv_dtype), dv.result(kv_dtype)

    def _choice(self, call: Call, q: Tensor, k: Tensor, tag: int) -> Any:
        return None if self.whole is None else call.chosen(self.whole, q, k, tag)

    def _outer(self, call: Call, q: Tensor) -> Communicator:
        communicator = call.runtime.communicator(self.relay, q.device)
        assert communicator is not None
        return communicator


def levels_of(
    plan: Plan,
    group: Any,
    mesh: Mesh,
    per_host: int,
    sequences: Any,
    held: HeldHeads | None,
    timeout: float,
) -> Levels | None:
    """The levels of this rank's ring; None where it does not span hosts with several of its ranks
    each. All ranks of the group ask alike.

    Args:
        plan: of the ring. group: all ranks.
    """
    if per_host % mesh.degree or mesh.world % per_host or per_host >= mesh.world:
        return None
    each, hosts = per_host // mesh.degree, mesh.world // per_host
    if each == 1:
        return None
    host, number = divmod(mesh.ring, each)
    ring = list(mesh.ring_peers)
    inside = part_of(group, ring[host * each : (host + 1) * each], timeout)
    across = part_of(group, ring[number::each], timeout)
    whole = None
    if plan.chooses:
        around = part_of(group, ring, timeout)
        whole = RankPlan(plan, sequences, around, held=held, within=True)
    queries = _of_host(plan.queries, host, each)
    within = tuple(
        RankPlan(
            plan.over(queries, _of_host(plan.keys, owner, each)),
            sequences,
            inside,
            held=held,
            within=True,
        )
        for owner in range(hosts)
    )
    owned = Layout(
        plan.keys.length, tuple(plan.keys.rows[owner * each + number] for owner in range(hosts))
    )
    needed = [_needed(plan, one, each, hosts) for one in range(each)]
    relay = RelayPlan(owned, owned, needed[number])
    met = (owner for owner in range(hosts) if any(rows[host][owner] for rows in needed))
    return Levels(
        host,
        frozenset(met),
        whole,
        RankPlan(relay, sequences, across, within=True),
        within,
    )


def _needed(plan: Plan, number: int, each: int, hosts: int) -> tuple[tuple[range | None, ...], ...]:
    def of(host: int, owner: int) -> range | None:
        read = [
            tile.kv.extent(tile.heads.phases)
            for rank in range(host * each, (host + 1) * each)
            for tile in tiles_of(plan, rank, owner * each + number)
        ]
        if host == owner or not read:
            return None
        return range(min(one.start for one in read), max(one.stop for one in read))

    return tuple(tuple(of(host, owner) for owner in range(hosts)) for host in range(hosts))


def _of_host(layout: Layout, host: int, each: int) -> Layout:
    return replace(layout, rows=layout.rows[host * each : (host + 1) * each])


def _in_place(rows: Tensor, first: int, whole: Tensor) -> Tensor:
    """Rows of a shard where they stand in it; what is not needed there is 0."""
    if rows.shape[1] == whole.shape[1]:
        return rows
    shard = whole.new_zeros(whole.shape)
    shard[:, first : first + rows.shape[1]] = rows
    return shard


def _take(homeward: engine.Homeward, dk: Sum, dv: Sum) -> None:
    """Add gradients that come home, and give their buffers back."""
    homeward.add_to(dk, dv)
    dk.settle()
    dv.settle()
    homeward.pending.release()

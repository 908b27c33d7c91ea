"""Heads for rows: a head group's ranks exchange them before and after they attend.

Before, each rank has some rows of all heads; between, all rows of the group, of some heads
(DeepSpeed-Ulysses, arXiv 2309.14509). It travels through the communicator, as keys do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ring_attention_distributed.mesh import Mesh, Places
from ring_core.exchange import brought, of_sizes
from ring_core.masks import FULL
from ring_core.plan import Heads, Plan, Rows, Tile
from ring_core.protocols import Communicator
from ring_core.rounds import Round, rounds
from ring_core.softmax import accumulation_dtype


@dataclass(frozen=True)
class _Heads(Plan):
    """Each rank of the group needs all rows of every other one, of the heads that it computes."""

    heads: tuple[range, ...]
    of: int

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        if rank == owner:
            return []
        mine = self.heads[rank]
        named = Heads(mine.start, self.of, len(mine))
        return [Tile(Rows(0, 1), Rows(0, self.keys.size), FULL, named)]


@dataclass(frozen=True)
class _Rows(Plan):
    """Each rank of the group needs its own rows, of every other one's heads.

    The owner's heads stand beside its rows: ``counts[owner]`` of them for each row.
    """

    counts: tuple[int, ...]
    shard: int

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        if rank == owner:
            return []
        rows = self.shard * self.counts[owner]
        return [Tile(Rows(0, 1), Rows(rank * rows, rows), FULL)]


class HeadExchange:
    """One call's exchanges.

    Args:
        communicator: of the whole group, of which the head group is a part.
    """

    def __init__(self, mesh: Mesh, communicator: Communicator, tag: int) -> None:
        self._mesh, self._communicator, self._tag = mesh, communicator, tag

    def to_heads(
        self, tensors: Sequence[Tensor], heads: tuple[range, ...], places: Places
    ) -> list[Tensor]:
        """From this rank's rows [B, shard, all heads, D] to the group's, [B, together, some, D].

        Args:
            heads: of each rank of the group.
        """
        mesh, mine = self._mesh, heads[self._mesh.place]
        steps = _to_heads(heads, tensors[0].shape[2], places.shard, mesh, self._communicator.shards)
        found = [places.room(x, len(mine)) for x in tensors]
        for there, x in zip(found, tensors, strict=True):
            places.put(there, mesh.place, x[:, :, mine.start : mine.stop])
        for source, received in brought(steps, self._communicator, tensors, self._tag):
            for there, rows in zip(found, received, strict=True):
                places.put(there, source - mesh.peers.start, rows)
        return found

    def to_rows(
        self, tensors: Sequence[Tensor], heads: tuple[range, ...], of: int, places: Places
    ) -> list[Tensor]:
        """The way back: from [B, together, this rank's heads, D] to [B, shard, ``of`` heads, D].

        What several ranks have of one head is added up.
        """
        mesh, shard = self._mesh, places.shard
        counts = tuple(map(len, heads))
        shares = sum(counts) > of
        steps = _to_rows(counts, shard, mesh, self._communicator.shards)
        apart = [places.end_to_end(x) for x in tensors]
        found = [
            x.new_zeros(x.shape[0], shard, of, x.shape[3], dtype=accumulation_dtype(x.dtype))
            if shares
            else x.new_empty(x.shape[0], shard, of, x.shape[3])
            for x in tensors
        ]
        own = [x[:, mesh.place * shard :][:, :shard] for x in apart]
        for place, parts in self._parts(apart, own, counts, steps):
            mine = heads[place]
            for there, part in zip(found, parts, strict=True):
                window = there[:, :, mine.start : mine.stop]
                if shares:
                    window += part
                else:
                    window.copy_(part)
        return [there.to(x.dtype) for there, x in zip(found, tensors, strict=True)]

    def _parts(
        self,
        apart: Sequence[Tensor],
        own: Sequence[Tensor],
        counts: tuple[int, ...],
        steps: tuple[Round, ...],
    ) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """This rank's rows of each rank's heads."""
        yield self._mesh.place, own
        folded = [x.flatten(1, 2).unsqueeze(2) for x in apart]
        for source, received in brought(steps, self._communicator, folded, self._tag):
            place = source - self._mesh.peers.start
            yield place, [torch.unflatten(x.squeeze(2), 1, (-1, counts[place])) for x in received]


@lru_cache(maxsize=256)
def _to_heads(
    heads: tuple[range, ...], of: int, shard: int, mesh: Mesh, shards: float
) -> tuple[Round, ...]:
    layout = of_sizes([shard] * mesh.degree)
    return _of_peers(_Heads(layout, layout, heads, of), mesh, shards)


@lru_cache(maxsize=256)
def _to_rows(counts: tuple[int, ...], shard: int, mesh: Mesh, shards: float) -> tuple[Round, ...]:
    layout = of_sizes([mesh.degree * shard * count for count in counts])
    return _of_peers(_Rows(layout, layout, counts, shard), mesh, shards)


def _of_peers(plan: Plan, mesh: Mesh, shards: float) -> tuple[Round, ...]:
    """The rounds of a plan for a head group, between ranks of the whole group."""
    first = mesh.peers.start
    return tuple(
        replace(
            one,
            steps=tuple(
                replace(step, source=first + step.source, requester=first + step.requester)
                for step in one.steps
            ),
        )
        for one in rounds(plan, mesh.place, shards)[1:]
    )

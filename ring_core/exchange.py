"""Small tensors that every rank needs of every other one before it can attend, such as pooled keys.

They travel through the communicator like keys: as the rounds of a plan in which all see all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ring_core.layout import Layout, contiguous
from ring_core.masks import FULL
from ring_core.plan import Plan, Rows, Tile
from ring_core.protocols import Communicator
from ring_core.rounds import Round, rounds


@dataclass(frozen=True)
class _Everything(Plan):
    """Every rank needs all rows of every other one."""

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        rows = self.keys.owned(owner)
        return [Tile(Rows(0, 1), Rows(0, rows), FULL)] if rows and rank != owner else []


@dataclass(frozen=True)
class Exchange:
    """What one call has to reach the other ranks with.

    Attributes:
        rank, world: this process's place in the group.
        communicator: None with one rank. tag: of the call's messages.
    """

    rank: int
    world: int
    communicator: Communicator | None
    tag: int = 0

    def gather(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """All ranks' tensors, rank by rank; a collective of the group.

        Args:
            tensors: this rank's [B, rows, K, D]; B, K, D and dtypes alike on all ranks.
            sizes: how many rows each rank has.
        """
        empty = tuple(x[:, :0] for x in tensors)
        found = [tuple(tensors) if rank == self.rank else empty for rank in range(self.world)]
        if self.communicator is None:
            return found
        plan = _Everything(contiguous(self.world, self.world), of_sizes(sizes))
        steps = rounds(plan, self.rank, self.communicator.shards)[1:]
        for source, received in brought(steps, self.communicator, tensors, self.tag):
            found[source] = tuple(x.clone() for x in received)
        return found


def brought(
    steps: Sequence[Round], communicator: Communicator, tensors: Sequence[Tensor], tag: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """What rounds bring, source by source: [B, rows, heads, D], one per tensor, valid until the
    next."""
    for one in steps:
        pending = communicator.fetch(one, tensors, tag)
        received = pending.wait()
        for step in one.steps:
            for part in step.parts:
                rows = slice(part.row, part.row + len(part.rows))
                yield step.source, tuple(x[:, rows] for x in received[part.block])
        pending.release()


def of_sizes(sizes: Sequence[int]) -> Layout:
    """The layout of ranks that hold so many rows each, one behind the other."""
    ends = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    runs = (range(*pair) for pair in pairwise(ends))
    return Layout(ends[-1], tuple((run,) if run else () for run in runs))

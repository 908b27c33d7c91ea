"""Which tokens each rank holds: pure data, as ranges of global token indices."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ring_core.order import Order


EVEN = 1.05
"""Up to this imbalance ``auto`` keeps the layout that moves the least data."""


@dataclass(frozen=True)
class Layout:
    """Ownership of ``length`` tokens by the ranks of a group.

    ``rows[r]`` are rank r's tokens in the order in which it holds them: ranges
    ``start, start+step, ...`` of global indices; of places, if the sequence was first laid out in
    an ``order``. Every token is owned once. Shards are padded at their end to one :attr:`size`.
    """

    length: int
    rows: tuple[tuple[range, ...], ...]
    order: Order | None = None

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @cached_property
    def size(self) -> int:
        """Rows of every rank's shard, padding included; at least 1."""
        return max(1, *(self.owned(rank) for rank in range(self.world)))

    def owned(self, rank: int) -> int:
        """Number of tokens that ``rank`` holds, padding not counted."""
        return sum(len(run) for run in self.rows[rank])

    def positions(self, rank: int) -> Tensor:
        """Global token index of each of the rank's rows: int64 [size], -1 for padding."""
        import torch

        # Whatever mode or default device the first caller was in: others use the result too.
        with torch.inference_mode(False):
            positions = torch.full((self.size,), -1, dtype=torch.int64, device="cpu")
            filled = 0
            for run in self.rows[rank]:
                tokens = torch.arange(run.start, run.stop, run.step, device="cpu")
                if self.order is not None:
                    tokens = self.order.tokens()[tokens]
                positions[filled : filled + len(run)] = tokens
                filled += len(run)
        return positions


def cut(length: int, pieces: int) -> list[range]:
    """``length`` tokens in ``pieces`` runs whose sizes differ by at most one."""
    return [range(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]


def contiguous(length: int, world: int) -> Layout:
    """Rank r holds the r-th of ``world`` equal runs."""
    return Layout(length, tuple(joined([run]) for run in cut(length, world)))


def striped(length: int, world: int) -> Layout:
    """Rank r holds tokens r, r+world, r+2*world, ... (Striped Attention, arXiv 2311.09431)."""
    return Layout(length, tuple(joined([range(rank, length, world)]) for rank in range(world)))


def zigzag(length: int, world: int) -> Layout:
    """Of ``2*world`` equal runs rank r holds the r-th from the front and the r-th from the back.

    Under a causal mask late tokens see more keys than early ones; a pair of runs costs the same on
    every rank (as in Llama 3's context parallelism, arXiv 2407.21783 section 3.3.2).
    """
    runs = cut(length, 2 * world)
    return Layout(
        length, tuple(joined([runs[rank], runs[2 * world - 1 - rank]]) for rank in range(world))
    )


LAYOUTS: Mapping[str, Callable[[int, int], Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}
"""Of a length and a number of ranks, by the name that the config field ``layout`` has for it."""


def balanced(
    length: int, world: int, work: Callable[[range], int], tolerance: float = EVEN
) -> Layout:
    """Zigzag for masks whose work is not a ramp: equal runs, dealt out by the work each one costs.

    The heaviest run goes to the least busy rank that still has room, and so on. With two runs a
    rank and one causal document this is :func:`zigzag`. More and shorter runs (up to 8 a rank) are
    tried until the busiest rank has at most ``tolerance`` times the mean.

    Args:
        work: the number of visible pairs that a run of queries has.
    """
    best: tuple[float, Layout] | None = None
    for per_rank in (2, 4, 8):
        runs = cut(length, per_rank * world)
        costs = [work(run) if run else 0 for run in runs]
        held: list[list[int]] = [[] for _ in range(world)]
        room = [(0, rank) for rank in range(world)]
        load = [0] * world
        for index in sorted(range(len(runs)), key=lambda i: costs[i], reverse=True):
            _, rank = heapq.heappop(room)
            held[rank].append(index)
            load[rank] += costs[index]
            if len(held[rank]) < per_rank:
                heapq.heappush(room, (load[rank], rank))
        imbalance = max(load) * world / max(1, sum(load))
        layout = Layout(length, tuple(joined([runs[i] for i in sorted(mine)]) for mine in held))
        if best is None or imbalance < best[0]:
            best = (imbalance, layout)
        if imbalance <= tolerance:
            break
    assert best is not None
    return best[1]


def imbalance(layout: Layout, work: Callable[[range], float]) -> float:
    """Work of the busiest rank over the mean, as :meth:`ring_core.plan.Plan.imbalance`.

    Args:
        work: what a run of queries costs.
    """
    loads = [sum(work(run) for run in runs) for runs in layout.rows]
    return max(loads) * layout.world / sum(loads) if sum(loads) else 1.0


def layout_for(
    name: str,
    length: int,
    world: int,
    work: Callable[[range], int],
    uneven: Callable[[], Layout] | None = None,
) -> Layout:
    """What the config field ``layout`` asks for.

    ``auto`` is contiguous shards, which move the least data, as long as they are about even.

    Args:
        name: one of :data:`LAYOUTS`, or ``auto``.
        work: the number of visible pairs that a run of queries has.
        uneven: what ``auto`` is where contiguous shards are not even; None: :func:`balanced`.
    """
    if name != "auto":
        return LAYOUTS[name](length, world)
    near = contiguous(length, world)
    if imbalance(near, work) <= EVEN:
        return near
    return balanced(length, world, work) if uneven is None else uneven()


def joined(runs: Sequence[range]) -> tuple[range, ...]:
    """Leave out empty runs and join those that continue each other."""
    joined: list[range] = []
    for run in runs:
        if not run:
            continue
        if joined and run.step == joined[-1].step and joined[-1][-1] + run.step == run.start:
            joined[-1] = range(joined[-1].start, run.stop, run.step)
        else:
            joined.append(run)
    return tuple(joined)

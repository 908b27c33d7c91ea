"""Which heads each rank of a head group computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ring_core.layout import cut
from ring_core.plan import HeldHeads


@dataclass(frozen=True)
class Split:
    """Query heads and the KV heads that serve them, by rank of the group.

    KV heads are dealt out in runs whose sizes differ by at most one. Where there are fewer of them
    than ranks, each is held by several, which share its query heads.
    """

    q_heads: int
    kv_heads: int
    q: tuple[range, ...]
    kv: tuple[range, ...]

    @staticmethod
    def refuse(q_heads: int, kv_heads: int, degree: int) -> str | None:
        """Why these heads cannot be dealt out to ``degree`` ranks, or None if they can."""
        if degree <= kv_heads:
            return None
        if degree % kv_heads:
            return f"{degree} ranks cannot share {kv_heads} KV heads evenly"
        group, sharing = q_heads // kv_heads, degree // kv_heads
        if group % sharing:
            return (
                f"{sharing} ranks cannot share the {group} query heads of each of {kv_heads} KV "
                "heads evenly"
            )
        return None

    @staticmethod
    def of(q_heads: int, kv_heads: int, degree: int) -> Split:
        """Heads that are not refused, dealt out to ``degree`` ranks."""
        group = q_heads // kv_heads
        if degree <= kv_heads:
            kv = tuple(cut(kv_heads, degree))
            q = tuple(range(run.start * group, run.stop * group) for run in kv)
        else:
            q = tuple(cut(q_heads, degree))
            kv = tuple(range(run.start // group, run.start // group + 1) for run in q)
        return Split(q_heads, kv_heads, q, kv)

    @property
    def shares(self) -> bool:
        """Whether a KV head is held by several ranks."""
        return len(self.kv) > self.kv_heads

    @property
    def imbalance(self) -> float:
        """Query heads of the rank that has most of them, over the mean."""
        return max(map(len, self.q)) * len(self.q) / self.q_heads

    def held(self, place: int) -> HeldHeads:
        """What the group's rank number ``place`` holds."""
        return HeldHeads(self.kv[place], self.kv_heads, self.q[place].start)

    def groups(self) -> tuple[range, ...]:
        """By rank, all query heads of the KV heads that it holds."""
        group = self.q_heads // self.kv_heads
        return tuple(range(run.start * group, run.stop * group) for run in self.kv)


def degrees(q_heads: int, kv_heads: int, world: int) -> Iterator[int]:
    """The degrees that these heads and so many ranks allow, ascending."""
    for degree in range(1, world + 1):
        if world % degree == 0 and Split.refuse(q_heads, kv_heads, degree) is None:
            yield degree

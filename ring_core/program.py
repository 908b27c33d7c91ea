"""A plan made ready for one kernel and one communicator: what the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ring_core.plan import Plan, Tile
from ring_core.protocols import AttentionKernel
from ring_core.rounds import Part, Round, rounds


@dataclass(frozen=True)
class Program:
    """A rank's rounds, with tiles lowered to what one kernel computes directly."""

    plan: Plan
    rank: int
    kernel: AttentionKernel
    rounds: tuple[Round, ...]

    @staticmethod
    def build(
        plan: Plan,
        rank: int,
        kernel: AttentionKernel,
        shards: float = 1,
        usual: AttentionKernel | None = None,
    ) -> Program:
        """Lower every tile of the rank's rounds.

        Args:
            shards: how many shards' worth of fetched keys may be held; see :func:`rounds`.
            usual: the kernel by which all ranks know in which dtype gradients travel, where this
                rank computes with another one for reasons of its own.
        """
        usual = usual or kernel
        mine = _lowered(plan, rank, kernel, shards)
        if not usual.rounds:
            return Program(plan, rank, kernel, mine)
        rounded: dict[int, bool] = {}
        for peer in range(plan.world):
            for one in _lowered(plan, peer, usual, shards):
                for step in one.steps:
                    once = _read_once(one.tiles, step.parts)
                    rounded[step.offset] = rounded.get(step.offset, True) and once
        marked = (
            replace(
                one,
                steps=tuple(replace(step, rounded=rounded[step.offset]) for step in one.steps),
            )
            for one in mine
        )
        return Program(plan, rank, kernel, tuple(marked))


def _lowered(plan: Plan, rank: int, kernel: AttentionKernel, shards: float) -> tuple[Round, ...]:
    return tuple(
        replace(one, tiles=tuple(piece for tile in one.tiles for piece in kernel.lower(tile)))
        for one in rounds(plan, rank, shards)
    )


def _read_once(tiles: Sequence[Tile], parts: Sequence[Part]) -> bool:
    """Whether no row of ``parts`` is read by two tiles: then its gradient is one tile's.

    A kernel that rounds gave that gradient in the inputs' dtype, and more bits would carry nothing.
    """
    for part in parts:
        inside = []
        for tile in tiles:
            if tile.block == part.block:
                first = max(tile.kv.start, part.row)
                last = min(tile.kv.start + len(tile.kv), part.row + len(part.rows))
                if first < last:
                    inside.append((first, last, tile.batch))
        inside.sort(key=lambda one: one[:2])
        for i, (_, last, batch) in enumerate(inside):
            for first, _, other in inside[i + 1 :]:
                if first >= last:
                    break
                if batch is None or other is None or _overlap(batch, other):
                    return False
    return True


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)

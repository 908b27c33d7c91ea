"""A plan made ready for one kernel and one communicator: what the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ring_core.masks import Diagonal
from ring_core.plan import ForHeads, HeldHeads, Plan, Segments, Tile
from ring_core.protocols import AttentionKernel
from ring_core.rounds import Part, Round, check, rounds

_REPETITIONS = 32768
"""Of a tile, times batch rows, in one kernel call; CUDA's grids end at 65535."""
_ROWS = 1 << 21
"""Of all repetitions, times batch rows, in one kernel call: it holds copies of strided rows."""


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
        *,
        kv_heads: int = 1,
        batch: int = 1,
        apart: bool = False,
        held: HeldHeads | None = None,
    ) -> Program:
        """Lower every tile of the rank's rounds.

        Args:
            kv_heads, batch: of the keys.
            apart: whether tiles have heads of one phase each; held: which heads the keys are of.
                See :class:`ForHeads`.
            shards: how many shards' worth of fetched keys may be held; see :func:`rounds`.
            usual: the kernel by which all ranks know in which dtype gradients travel, where this
                rank computes with another one for reasons of its own.
        """
        usual = usual or kernel
        plan = ForHeads.of(plan, kv_heads, apart, held)
        check(plan, rank)
        rounded = _rounded(plan, usual, shards) if usual.rounds else {}
        lowered = (
            replace(
                one,
                tiles=tuple(kernel.lower(parted(one.tiles, batch))),
                steps=tuple(
                    replace(step, rounded=rounded.get(step.offset, False)) for step in one.steps
                ),
            )
            for one in rounds(plan, rank, shards, usual.rounds)
        )
        return Program(plan, rank, kernel, tuple(lowered))


def parted(tiles: Sequence[Tile], batch: int) -> list[Tile]:
    """Tiles of very many repetitions in parts."""
    parts = []
    for tile in tiles:
        rows = max(tile.q.count, tile.kv.count)
        most = max(1, min(_REPETITIONS // batch, _ROWS // (batch * rows)))
        if tile.q.repeat <= most:
            parts.append(tile)
            continue
        for first in range(0, tile.q.repeat, most):
            which = range(first, min(first + most, tile.q.repeat))
            q, kv = (x.repetitions(which) for x in (tile.q, tile.kv))
            parts.append(replace(tile, q=q, kv=kv))
    return parts


def _rounded(plan: Plan, kernel: AttentionKernel, shards: float) -> dict[int, bool]:
    """For each offset whether gradients of what is fetched there may travel as the kernel rounded
    them: where on every rank each row's is one tile's, more bits would carry nothing."""
    rounded: dict[int, bool] = {}
    for peer in range(plan.world):
        for one in rounds(plan, peer, shards, kernel.rounds):
            tiles = kernel.lower(one.tiles)
            for step in one.steps:
                once = read_once(tiles, step.parts)
                rounded[step.offset] = rounded.get(step.offset, True) and once
    return rounded


def read_once(tiles: Sequence[Tile], parts: Sequence[Part]) -> bool:
    """Whether no row of ``parts`` is read by two tiles."""
    for part in parts:
        inside = []
        for tile in tiles:
            if tile.block != part.block:
                continue
            for run in _keys(tile):
                first, last = max(run.start, part.row), min(run.stop, part.row + len(part.rows))
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


def _keys(tile: Tile) -> list[range]:
    """The runs of its block that a tile reads."""
    if isinstance(tile.kv, Segments):
        return list(tile.kv.runs)
    start = tile.kv.start
    if isinstance(tile.mask, Diagonal):
        return [range(start + kv.start, start + kv.stop) for _, kv, _ in tile.mask.pieces]
    return [range(start, start + len(tile.kv))]


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)

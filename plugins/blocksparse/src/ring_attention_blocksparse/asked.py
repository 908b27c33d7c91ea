"""Which keys the queries of a rank ask for, and which of its queries ask for some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_attention_blocksparse.scene import Scene
from ring_core.layout import joined
from ring_core.plan import Rows, Segments
from ring_core.prediction.rates import planned
from ring_core.tiling import Run, runs_of

if TYPE_CHECKING:
    from ring_attention_blocksparse.planner import BlockPlan

_APART = 4
"""Queries between which more than one in so many of the shard's rows need nothing are two tiles."""


def inside(runs: Sequence[Run], scene: Scene) -> list[Run]:
    """What runs hold of the tokens up to the last document's end."""
    found: list[Run] = []
    stop = scene.stop
    for run in runs:
        if scene.order is not None:
            if stop < scene.length:
                within = scene.order.tokens() < stop
                found += _runs_within(run, within, 1)
            elif run.tokens:
                found.append(run)
            continue
        tokens = range(run.tokens.start, min(stop, run.tokens.stop), run.tokens.step)
        if tokens:
            found.append(Run(run.row, tokens))
    return found


def blocks_of(runs: Sequence[Run], size: int) -> Tensor:
    """The blocks that runs hold tokens of: int64, ascending."""
    found = [
        torch.arange(run.tokens[0] // size, run.tokens[-1] // size + 1, device="cpu")
        for run in runs
    ]
    return (
        torch.unique(torch.cat(found)) if found else torch.zeros(0, dtype=torch.int64, device="cpu")
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a rank's queries of a part ask for: their runs; pairs of a query block and a key block
    that some of it may see."""

    runs: Sequence[Run]
    query: Tensor
    block: Tensor


@lru_cache(maxsize=16)  # 16 bytes a pair of blocks
def _asked(plan: BlockPlan, part: int, heads: range, rank: int) -> _Asked:
    scene = plan.parts[part].scene
    runs = inside(runs_of(plan.queries, rank), scene)
    index = blocks_of(runs, scene.block_q)
    query, block = plan.needed(scene, heads, index)
    return _Asked(runs, index[query], block)


@lru_cache(maxsize=64)
def _needed_blocks(plan: BlockPlan, heads: range, rank: int) -> Tensor:
    """Which key blocks some query of a rank may see: bool [blocks]."""
    size = plan.parts[0].scene.block_kv if plan.parts else 1
    needed = torch.zeros(-(-plan.keys.length // size), dtype=torch.bool, device="cpu")
    for part in range(len(plan.parts)):
        needed[_asked(plan, part, heads, rank).block] = True
    return needed


@lru_cache(maxsize=4096)
def needed_rows(
    plan: BlockPlan, heads: range, rank: int, owner: int
) -> tuple[Rows, tuple[Run, ...]] | None:
    """Rows of the owner's keys that a rank needs for some heads, and what tokens they hold; each
    run's row counts in those rows as they will have arrived."""
    size = plan.parts[0].scene.block_kv if plan.parts else 1
    held, needed = runs_of(plan.keys, owner), _needed_blocks(plan, heads, rank)
    runs = [piece for run in held for piece in _runs_within(run, needed, size)]
    if not runs:
        return None
    first, last = runs[0].row, runs[-1].row + len(runs[-1].tokens)
    rows = sum(len(run.tokens) for run in runs)
    between = last - first - rows
    # Copied together, which takes time too, or with what lies between them.
    if rank == owner or between <= planned().packing * rows:
        kv = Rows(first, last - first)
        return kv, tuple(Run(run.row - first, run.tokens) for run in runs)
    kv = Segments.of(joined([range(run.row, run.row + len(run.tokens)) for run in runs]))
    placed, row = [], 0
    for run in runs:
        placed.append(Run(row, run.tokens))
        row += len(run.tokens)
    return kv, tuple(placed)


def _runs_within(run: Run, needed: Tensor, size: int) -> Iterator[Run]:
    """Of a run what lies in the needed blocks."""
    tokens = run.tokens
    if not tokens:
        return
    first, last = tokens[0] // size, tokens[-1] // size
    flags = torch.nn.functional.pad(needed[first : last + 1].int(), (1, 1))
    edges = flags.diff()
    starts, stops = (edges == 1).nonzero().squeeze(1), (edges == -1).nonzero().squeeze(1)
    for start, stop in zip((starts + first).tolist(), (stops + first).tolist(), strict=True):
        begin = max(0, -(-(start * size - tokens.start) // tokens.step))
        end = min(len(tokens), -(-(stop * size - tokens.start) // tokens.step))
        if begin < end:
            yield Run(run.row + begin, tokens[begin:end])


def clusters(
    plan: BlockPlan, part: int, heads: range, rank: int, keys: Tensor
) -> Iterator[list[Run]]:
    """The rank's queries that see some of the key blocks ``keys``, apart where far apart."""
    asked, scene = _asked(plan, part, heads, rank), plan.parts[part].scene
    if not len(asked.query) or not len(keys):
        return
    among = torch.zeros(scene.key_blocks, dtype=torch.bool, device="cpu")
    among[keys] = True
    seeing = torch.zeros(scene.query_blocks, dtype=torch.bool, device="cpu")
    seeing[asked.query[among[asked.block]]] = True
    cluster: list[Run] = []
    for run in asked.runs:
        for piece in _runs_within(run, seeing, scene.block_q):
            end = cluster[-1].row + len(cluster[-1].tokens) if cluster else 0
            if cluster and _APART * (piece.row - end) > plan.queries.size:
                yield cluster
                cluster = []
            cluster.append(piece)
    if cluster:
        yield cluster

"""Which pairs of a query and a key a plan computes, and how often: what a planner got wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.layout import Layout
from ring_core.plan import ForHeads, Plan, Tile
from ring_core.rounds import check, tiles_of

_SHOWN = 8
"""Wrong pairs that are named."""


def times_computed(plan: Plan, batch: int = 1, kv_heads: int = 1) -> Tensor:
    """How often all ranks' tiles compute each pair: int32 [batch, kv_heads, q_len, kv_len].

    No process is started, and no tensor of a call has a say: of a plan that ``chooses``, these are
    the pairs that are computed whatever is chosen.

    Raises:
        PlanError: a tile reads rows that its ranks do not hold.
    """
    plan = ForHeads.of(plan, kv_heads)
    shape = batch, kv_heads, plan.queries.length, plan.keys.length
    times = torch.zeros(shape, dtype=torch.int32)
    queries, keys = (
        [side.positions(rank) for rank in range(plan.world)] for side in (plan.queries, plan.keys)
    )
    for rank in range(plan.world):
        check(plan, rank)
        for owner in range(plan.world):
            for tile in tiles_of(plan, rank, owner):
                count_tile(times, tile, queries[rank], keys[owner])
    return times


def count_tile(times: Tensor, tile: Tile, queries: Tensor, keys: Tensor) -> None:
    """Add one for each pair that a tile computes.

    Args:
        times: int32 [batch, kv_heads, q_len, kv_len].
        queries, keys: tokens of the rows that the tile counts in, int64 [rows]; of the keys also
            [phases, rows], where they differ between the phases of its heads.
    """
    batch = tile.batch or range(times.shape[0])
    for phase in range(tile.heads.phases):
        one = tile.only(range(phase, phase + 1))
        seen = one.mask.visible(range(one.q.count), one.kv.count).int()
        if seen.ndim == 5:  # batch rows or heads see different keys
            seen = seen[:, :, 0]
        there = keys if keys.ndim == 1 else keys[phase]
        of_q, of_kv = queries[one.q.indices()], there[one.kv.indices()]
        heads = slice(one.heads.start, None, one.heads.step)
        for i, j in zip(of_q.view(one.q.repeat, -1), of_kv.view(one.kv.repeat, -1), strict=True):
            times[batch.start : batch.stop, heads, i[:, None], j] += seen


def check_pairs(plan: Plan, expected: Tensor) -> None:
    """Check that a plan computes each pair as often as it counts.

    Args:
        expected: how often, or whether: int or bool [batch, kv_heads, q_len, kv_len].

    Raises:
        AssertionError: names the first wrong pairs, the ranks that hold them, and how often they
            are computed.
        PlanError: a tile reads rows that its ranks do not hold.
    """
    batch, kv_heads, *_ = expected.shape
    times, right = times_computed(plan, batch, kv_heads), expected.int()
    wrong = (times != right).nonzero().tolist()
    if not wrong:
        return
    owners = [_owners(layout) for layout in (plan.queries, plan.keys)]
    lines = [
        f"{type(plan).__qualname__} over {plan.world} ranks computes {len(wrong)} of "
        f"{right.numel()} pairs wrongly:"
    ]
    for row, head, i, j in wrong[:_SHOWN]:
        rank, owner = (held[token] for held, token in zip(owners, (i, j), strict=True))
        lines.append(
            f"  query {i} (of rank {rank}) and key {j} (of rank {owner}), batch row {row}, KV head "
            f"{head}: counted {times[row, head, i, j]} times, not {right[row, head, i, j]}"
        )
    if len(wrong) > _SHOWN:
        lines.append(f"  and {len(wrong) - _SHOWN} more")
    raise AssertionError("\n".join(lines))


def _owners(layout: Layout) -> dict[int, int]:
    """The rank that holds each token."""
    held = ((rank, layout.positions(rank).tolist()) for rank in range(layout.world))
    return {token: rank for rank, tokens in held for token in tokens}

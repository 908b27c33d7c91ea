"""Blocks chosen by the tensors of a call: the best by mean-pooled queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ring_attention_blocksparse.mask import Choice, KnownChoice
from ring_attention_blocksparse.pairs import (
    Span,
    active,
    admitted_count,
    visible_block,
    visible_count,
)
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.planner import BlockPlan, Part
from ring_attention_blocksparse.scene import Scene, ragged
from ring_attention_blocksparse.tables import Pieces
from ring_core.exchange import Exchange
from ring_core.layout import Layout
from ring_core.rows import grouped
from ring_core.softmax import accumulation_dtype
from ring_core.tiling import runs_of

_ELEMENTS = 1 << 25
"""Numbers held at once."""
_CPU = torch.device("cpu")


def choose(
    plan: BlockPlan, q: Tensor, k: Tensor, exchange: Exchange, first: int = 0
) -> Choice | None:
    """The choice of every pattern that makes one, for this rank's queries; None if there is none.

    Means of keys are gathered from all ranks, a row for each block; those of queries only where
    blocks lie on several ranks. Where the communicator can move what was chosen and no more, the
    ranks then tell each other what they read: a byte for each block and head.

    Args:
        q: [B, S, Hq, D]. k: [B, S, Hkv, D]: this rank's shards.
        first: which of all KV heads the first one of k is.
    """
    patterns = [pattern for pattern in plan.patterns if pattern.chosen]
    if not patterns or not plan.parts:
        return None
    scene, dtype = plan.parts[0].scene, accumulation_dtype(q.dtype)
    stops = _stops(plan.parts, q.shape[0], q.device)
    # Of queries a rank needs its own blocks' alone.
    others = exchange if _is_shared(plan.queries, scene.block_q) else None
    queries = _pooled(
        plan.queries, scene.block_q, grouped(q, k.shape[2]), stops, exchange.rank, others
    ).to(dtype)
    keys = _pooled(plan.keys, scene.block_kv, k.unsqueeze(3), stops, exchange.rank, exchange).to(
        dtype
    )
    index = _held(plan.queries, scene.block_q, exchange.rank, q.device)
    blocks: dict[Pattern, Tensor] = {
        pattern: torch.full(
            (q.shape[0], k.shape[2], len(index), min(pattern.chosen, scene.key_blocks)),
            -1,
            dtype=torch.int64,
            device=q.device,
        )
        for pattern in patterns
    }
    for part in plan.parts:
        rows = part.batch if part.batch is not None else range(q.shape[0])
        batch = slice(rows.start, rows.stop)
        step = max(1, _ELEMENTS // (len(rows) * k.shape[2] * scene.key_blocks))
        for some in torch.split(torch.arange(len(index), device=q.device), step):
            scores = _scores(part.scene, index[some], queries[batch], keys[batch])
            for found in blocks.values():
                found[batch, :, some] = _best(scores, found.shape[-1])
    if exchange.communicator is None or not exchange.communicator.selects:
        return Choice(index, blocks, first)
    read = _read(plan, exchange.rank, index, blocks, first).to(torch.uint8).unsqueeze(1)
    told = exchange.gather([read], [1] * exchange.world)
    together = torch.cat([theirs for (theirs,) in told], 1).transpose(0, 1).bool()
    return KnownChoice(index, blocks, first, read=together, keys=plan.keys, size=scene.block_kv)


def _read(
    plan: BlockPlan, rank: int, index: Tensor, blocks: Mapping[Pattern, Tensor], first: int
) -> Tensor:
    """Which key blocks this rank's queries see something of: bool [B, K, key blocks]."""
    batch, kv_heads = next(iter(blocks.values())).shape[:2]
    heads, count = range(first, first + kv_heads), plan.parts[0].scene.key_blocks
    read = torch.zeros(batch, kv_heads, count + 1, dtype=torch.bool, device=index.device)
    for number, part in enumerate(plan.parts):
        rows = slice(None) if part.batch is None else slice(part.batch.start, part.batch.stop)
        read[rows, :, :count] = _read_anyway(plan, number, rank, heads, index.device)
    for pattern, chosen in blocks.items():
        mine = [head - first for head in heads if pattern.applies(head)]
        some = slice(None) if len(mine) == kv_heads else mine
        there = chosen[:, some].flatten(2)
        there = torch.where(there < 0, count, there)
        read[:, some] = read[:, some].scatter(2, there, True)
    return read[..., :count]


@lru_cache(maxsize=256)
def _read_anyway(
    plan: BlockPlan, part: int, rank: int, heads: range, device: torch.device
) -> Tensor:
    """Which key blocks a rank's queries see, whatever is chosen: bool [K, key blocks]."""
    scene = plan.parts[part].scene
    index = _held(plan.queries, scene.block_q, rank, _CPU)
    read = torch.zeros(len(heads), scene.key_blocks, dtype=torch.bool, device="cpu")
    for row, head in zip(read, heads, strict=True):
        if patterns := plan.of_head(head):
            row[active(scene, patterns, head).of(index)[1]] = True
    with torch.inference_mode(False):
        return read.to(device, copy=True)


def density_of(plan: BlockPlan, rank: int, heads: range, choice: Choice | None) -> float:
    """Block pairs that ``rank`` computes, as a share of those that the mask leaves its queries: the
    mean over heads and batch rows.

    Args:
        plan: for some number of KV heads. heads: those that the rank has. choice: of a call, if
            patterns make one.
    """
    shown = left = 0.0
    for part in plan.parts:
        scene = part.scene
        index = _held(plan.queries, scene.block_q, rank, _CPU)
        visible = float(admitted_count(scene)[index].sum())
        rows = 1 if part.batch is None else len(part.batch)
        if choice is not None and part.batch is None:
            rows = next(iter(choice.blocks.values())).shape[0]
        left += rows * visible * len(heads)
        first = 0 if part.batch is None else part.batch.start
        for head in heads:
            patterns = plan.of_head(head)
            if not patterns:
                continue
            query, block = active(scene, patterns, head).of(index)
            keys = query * scene.key_blocks + block
            chosen = [pattern for pattern in patterns if pattern.chosen]
            if choice is None or not chosen:
                shown += rows * len(keys)
                continue
            for b in range(first, first + rows):
                found = [choice.blocks[pattern][b, head - choice.first].cpu() for pattern in chosen]
                place = torch.arange(len(index), device="cpu")[:, None] * scene.key_blocks
                more = [(place + x)[x >= 0] for x in found]
                shown += len(torch.unique(torch.cat([keys, *more])))
    return shown / left if left else 0.0


def _pooled(
    layout: Layout, size: int, x: Tensor, stops: Tensor, rank: int, exchange: Exchange | None
) -> Tensor:
    """Means of blocks: float64 [B, blocks, K, D]; 0 where a batch row has no tokens.

    Args:
        x: [B, S, K, G, D], of which the mean over G is taken too. stops: [B], valid tokens.
        exchange: to get those of blocks that other ranks hold; None: they are left 0.
    """
    sums, count = _sums(layout, size, x, stops, rank), -(-layout.length // size)
    total = sums.new_zeros(sums.shape[0], count, *sums.shape[2:])
    held = [_held(layout, size, peer, x.device) for peer in range(layout.world)]
    if exchange is None:
        total.index_add_(1, held[rank], sums)
    else:
        found = exchange.gather([sums], [len(index) for index in held])
        for index, (theirs,) in zip(held, found, strict=True):
            total.index_add_(1, index, theirs)
    first = torch.arange(count, device=x.device) * size
    tokens, there = Span(first, first.new_full((count,), layout.length - 1), size).tokens(
        layout.order
    )
    held_by = (there & (tokens < stops[:, None, None])).sum(2).clamp_min(1) * x.shape[3]
    means: Tensor = total / held_by[:, :, None, None]
    return means


def _is_shared(layout: Layout, size: int) -> bool:
    """Whether tokens of some block lie on several ranks."""
    held = sum(len(_held(layout, size, rank, _CPU)) for rank in range(layout.world))
    return held > -(-layout.length // size)


def _sums(layout: Layout, size: int, x: Tensor, stops: Tensor, rank: int) -> Tensor:
    """Sums over this rank's tokens of each block that it holds some of: float64 [B, n, K, D]."""
    index = _held(layout, size, rank, x.device)
    pieces = _pieces(layout, size, rank, x.device)
    total = x.new_zeros(x.shape[0], len(index), x.shape[2], x.shape[4], dtype=torch.float64)
    target = torch.searchsorted(index, pieces.block)
    step = max(1, _ELEMENTS // (pieces.largest * x[:, 0].numel()))
    for some in torch.split(torch.arange(len(pieces), device=x.device), step):
        rows, there = pieces.rows(some)
        tokens, _ = pieces.span(some).tokens(layout.order)
        valid = there & (tokens < stops[:, None, None])
        chosen = x[:, rows].masked_fill(~valid[..., None, None, None], 0)  # padding may be NaN
        total.index_add_(1, target[some], chosen.sum((2, 4), dtype=torch.float64))
    return total


@lru_cache(maxsize=256)
def _held(layout: Layout, size: int, rank: int, device: torch.device) -> Tensor:
    """The blocks that a rank holds tokens of, ascending; kept on ``device`` for a while."""
    with torch.inference_mode(False):
        blocks: Tensor = torch.unique(_pieces(layout, size, rank, device).block)
        return blocks


@lru_cache(maxsize=256)
def _pieces(layout: Layout, size: int, rank: int, device: torch.device) -> Pieces:
    with torch.inference_mode(False):
        return Pieces.of(runs_of(layout, rank), size, device)


@lru_cache(maxsize=256)
def _stops(parts: tuple[Part, ...], batch: int, device: torch.device) -> Tensor:
    """How many tokens each batch row has: int64 [B]."""
    stops = [0] * batch
    for part in parts:
        for row in range(batch) if part.batch is None else part.batch:
            stops[row] = part.scene.stop
    with torch.inference_mode(False):
        return torch.tensor(stops, dtype=torch.int64, device=device)


def _scores(scene: Scene, index: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Scores [B, K, n, key blocks] of some query blocks in the dtype of the pooled tensors; of
    their own blocks inf, and -inf of those that the mask hides.

    Products are summed in float64, so that no order of summation decides between neighbours.
    """
    found = torch.einsum("bnkd,bjkd->bknj", queries[:, index].double(), keys.double())
    found = found.to(queries.dtype)
    q = scene.blocks(index)
    block = torch.arange(scene.key_blocks, device=index.device)
    own_first, own_last = scene.own(q)
    own = (own_first[:, None] <= block) & (block <= own_last[:, None])
    query, place = ragged(visible_count(scene, q))
    hidden = torch.ones_like(own)
    hidden[query, visible_block(scene, q, query, place)] = False
    return found.masked_fill(own, torch.inf).masked_fill(hidden, -torch.inf)


def _best(scores: Tensor, most: int) -> Tensor:
    """The best blocks [..., most], of equal ones the lower; -1 where too few are visible."""
    if scores.dtype == torch.float64:
        values, found = torch.sort(scores, dim=-1, descending=True, stable=True)
        values, found = values[..., :most], found[..., :most]
    else:
        # As whole numbers in the same order, with the index below: then no two are equal.
        bits = scores.contiguous().view(torch.int32).long()
        ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        index = torch.arange(scores.shape[-1], device=scores.device)
        _, found = torch.topk((ordered << 31) - index, most, dim=-1)
        values = scores.gather(-1, found)
    return torch.where(values == -torch.inf, -1, found)

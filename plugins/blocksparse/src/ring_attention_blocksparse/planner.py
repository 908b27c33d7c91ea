"""The planner of block-sparse attention: tiles only where blocks are active, and their keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import groupby, product

import torch
from ring_attention_standard.planner import band_of
from torch import Tensor

from ring_attention_blocksparse.asked import blocks_of, clusters, inside, needed_rows
from ring_attention_blocksparse.config import BlockSparseConfig
from ring_attention_blocksparse.mask import BlockMask
from ring_attention_blocksparse.pairs import active, admitted_count, visible_block, visible_count
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Scene, ragged
from ring_core.config import LayoutName
from ring_core.errors import InputError
from ring_core.layout import EVEN, LAYOUTS, Layout, balanced, contiguous, imbalance, zigzag
from ring_core.masks import Mask
from ring_core.order import Order
from ring_core.plan import ALL_HEADS, Heads, Plan, Rows, Tile
from ring_core.prediction.rates import planned
from ring_core.sequences import Sequences
from ring_core.tiling import Run, runs_of


@dataclass(frozen=True)
class Part:
    """Batch rows with the same documents (None: all), and what they see."""

    batch: range | None
    scene: Scene


@dataclass(frozen=True)
class BlockPlan(Plan):
    """Every active pair of blocks, under the patterns, the mask and the documents."""

    parts: tuple[Part, ...]
    patterns: tuple[Pattern, ...]
    kv_heads: int | None = None
    """Patterns name heads; None: as many as they name, and one that stands for the others where
    those see something too."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.queries, self.keys, self.parts, self.patterns, self.kv_heads))

    @property
    def masks(self) -> frozenset[type[Mask]]:
        return frozenset({BlockMask})

    def for_heads(self, kv_heads: int) -> BlockPlan:
        """The plan for so many KV heads.

        Raises:
            InputError: a pattern names others.
        """
        for pattern in self.patterns:
            if trouble := pattern.check_heads(kv_heads):
                raise InputError(f"pattern {pattern.kind!r}: {trouble}")
        return replace(self, kv_heads=kv_heads)

    @property
    def chooses(self) -> bool:
        return any(pattern.chosen for pattern in self.patterns)

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        return [tile for heads in self.classes() for tile in self._tiles_of(heads, rank, owner)]

    def work(self, rank: int, batch: int = 1) -> Fraction:
        """Block pairs that ``rank`` computes, summed over batch rows: the mean over heads."""
        total = 0.0
        for part in self.parts:
            rows = batch if part.batch is None else len(part.batch)
            total += rows * float(self._cost(part.scene, self.queries.rows[rank]))
        return Fraction(total)

    def density(self, batch: int = 1) -> float:
        """Block pairs that are computed as a share of those that the mask leaves, over all ranks.

        Where blocks are chosen by the tensors, what other patterns show counts as if the choice
        had left it out.
        """
        shown = left = 0.0
        for part in self.parts:
            rows = batch if part.batch is None else len(part.batch)
            shown += rows * float(self.degrees(part.scene).sum())
            left += rows * float(admitted_count(part.scene).sum())
        return shown / left if left else 0.0

    def fetched(self) -> float:
        """Keys that the rank which fetches most of them fetches: the mean over heads."""
        heads = self.kv_heads or self.named_heads()
        return max(map(self._fetched_by, range(self.world))) / heads

    def _fetched_by(self, rank: int) -> int:
        """(Row, KV head) pairs, as :func:`ring_core.rounds.elements_fetched` counts them, without
        a look at the queries that ask for them."""
        peers = [peer for peer in range(self.world) if peer != rank]
        return sum(
            len(theirs[0]) * len(heads)
            for heads in self.classes()
            for theirs in (needed_rows(self, heads, rank, peer) for peer in peers)
            if theirs is not None
        )

    def price(self) -> float:
        """What the busiest rank computes and the one that fetches most fetches, in pairs of tokens,
        for one batch row."""
        area = max((one.scene.block_q * one.scene.block_kv for one in self.parts), default=1)
        busiest = max(float(self.work(rank)) for rank in range(self.world))
        return busiest * area + self.fetched() * planned().pairs_a_key

    def facts(self) -> Mapping[str, str]:
        at_most = "at most " if self.chooses else ""
        found = {
            "density": f"{at_most}{self.density():.4f} of the block pairs that the mask leaves"
        }
        if self.parts:
            scene = self.parts[0].scene
            found["blocks"] = f"{scene.block_q} queries x {scene.block_kv} keys"
        if self.chooses:
            found["chosen blocks"] = (
                "known in a call; over communicator 'symmetric' they travel, else all visible keys"
            )
        return found

    def cells(self, rank: int, owner: int, cells: int, length: int) -> Tensor:
        """What any KV head of any batch row computes."""
        shown = torch.zeros(cells, cells, dtype=torch.bool, device="cpu")
        for part, heads in product(self.parts, self.classes()):
            scene = part.scene
            mine, theirs = (
                blocks_of(inside(runs_of(layout, peer), scene), size)
                for layout, peer, size in (
                    (self.queries, rank, scene.block_q),
                    (self.keys, owner, scene.block_kv),
                )
            )
            query, block = self.needed(scene, heads, mine)
            query, block = (x[torch.isin(block, theirs)] for x in (query, block))
            x, y = mine[query], block
            if max(scene.query_blocks, scene.key_blocks) > cells:
                shown[x * scene.block_q * cells // length, y * scene.block_kv * cells // length] = (
                    True
                )
            else:  # blocks are larger than cells
                seen = shown.new_zeros(scene.query_blocks, scene.key_blocks)
                seen[x, y] = True
                token = torch.arange(cells, device="cpu") * length // cells
                shown |= seen[token // scene.block_q][:, token // scene.block_kv]
        return shown

    # Heads that see alike

    def classes(self) -> list[range]:
        """Runs of KV heads that have the same patterns, and some."""
        heads = self.kv_heads or self.named_heads()
        alike = groupby(range(heads), key=self.of_head)
        runs = [list(members) for patterns, members in alike if patterns]
        return [range(run[0], run[-1] + 1) for run in runs]

    def of_head(self, head: int) -> tuple[Pattern, ...]:
        """The patterns that a KV head has."""
        return tuple(pattern for pattern in self.patterns if pattern.applies(head))

    def named_heads(self) -> int:
        """How many KV heads patterns speak of: so many as there must be, or those that they name,
        and one for all others where a pattern is for every head."""
        fixed = [p.kv_heads for p in self.patterns if p.kv_heads is not None]
        if fixed:
            return fixed[0]
        named = [max(p.heads) + 1 for p in self.patterns if p.heads is not None]
        return max(named, default=0) + any(p.heads is None for p in self.patterns)

    # What queries need

    def needed(self, scene: Scene, heads: range, index: Tensor) -> tuple[Tensor, Tensor]:
        """Key blocks that some query blocks may see: places in ``index``, and blocks."""
        patterns = self.of_head(heads[0])
        if any(pattern.chosen for pattern in patterns):
            q = scene.blocks(index)
            query, place = ragged(visible_count(scene, q))
            return query, visible_block(scene, q, query, place)
        each = heads if any(pattern.varies for pattern in patterns) else heads[:1]
        found = [active(scene, patterns, head).of(index) for head in each]
        if len(found) == 1:
            return found[0]
        query, block = (torch.cat(column) for column in zip(*found, strict=True))
        key = torch.unique(query * scene.key_blocks + block)
        return key // scene.key_blocks, key % scene.key_blocks

    def degrees(self, scene: Scene) -> Tensor:
        """[query blocks]: key blocks that each one computes with, float64: the mean over heads."""
        return _degrees(scene, tuple(self._weights()))

    def _weights(self) -> Iterator[tuple[tuple[Pattern, ...], range, float]]:
        heads = self.kv_heads or self.named_heads()
        for run in self.classes():
            yield self.of_head(run[0]), run, len(run) / heads

    def _cost(self, scene: Scene, runs: Sequence[range]) -> float:
        """What runs of queries cost, in whole pairs of blocks."""
        return _cost(scene, tuple(self._weights()), tuple(runs))

    # Tiles

    def _tiles_of(self, heads: range, rank: int, owner: int) -> Iterator[Tile]:
        whole = heads == range(self.kv_heads or self.named_heads())
        named = ALL_HEADS
        if not whole:
            kv_heads = self.kv_heads or self.named_heads()
            named = Heads(heads.start, kv_heads, len(heads))
        theirs = needed_rows(self, heads, rank, owner)
        if theirs is None:
            return
        kv, kv_runs = theirs
        for number, part in enumerate(self.parts):
            scene = part.scene
            seen_keys = inside(kv_runs, scene)
            blocks = blocks_of(seen_keys, scene.block_kv)
            for q_runs in clusters(self, number, heads, rank, blocks):
                first, last = q_runs[0].row, q_runs[-1].row + len(q_runs[-1].tokens)
                mask = BlockMask(
                    scene,
                    self.of_head(heads[0]),
                    heads,
                    tuple(Run(run.row - first, run.tokens) for run in q_runs),
                    tuple(seen_keys),
                )
                yield Tile(Rows(first, last - first), kv, mask, named, part.batch)


def plan_blocks(
    config: BlockSparseConfig,
    sequences: Sequences,
    world: int,
    patterns: tuple[Pattern, ...],
    order: Order | None = None,
    prefix: int = 0,
) -> BlockPlan:
    """A plan for ``world`` ranks.

    Args:
        order: in which the tokens are laid out before they are cut into shards and blocks.
        prefix: tokens before the cells of grids.

    Raises:
        InputError: cross-attention, for which patterns are not defined; or a pattern does not fit
            the sequence.
    """
    why = "block-sparse cross-attention is not defined; leave the patterns out"
    sequences.refuse("cross", why=why)
    # A block that is larger than the sequence is one like the sequence.
    block_q, block_kv = (min(size, sequences.q_len) for size in (config.block_q, config.block_kv))
    parts = tuple(
        Part(part.batch, replace(part.scene, order=order, prefix=prefix))
        for part in _parts(config, sequences, block_q, block_kv)
    )
    for part in parts:
        for pattern in patterns:
            if trouble := pattern.check(part.scene):
                raise InputError(f"pattern {pattern.kind!r}: {trouble}")
    unplaced = contiguous(sequences.q_len, world)
    plan = BlockPlan(unplaced, unplaced, parts, patterns)
    unit = math.lcm(block_q, block_kv)
    plans = []
    for layout in _layouts(config.layout, plan, sequences.q_len, world, unit):
        placed = replace(layout, order=order)
        plans.append(replace(plan, queries=placed, keys=placed))
    return plans[0] if len(plans) == 1 else min(plans, key=BlockPlan.price)


def _parts(
    config: BlockSparseConfig, sequences: Sequences, block_q: int, block_kv: int
) -> Iterator[Part]:
    batches = dict.fromkeys(document.batch for document in sequences.documents)
    for batch in batches:
        documents = tuple(one.q for one in sequences.documents if one.batch == batch)
        scene = Scene(sequences.q_len, documents, band_of(config), block_q, block_kv)
        yield Part(batch, scene)


def _layouts(name: LayoutName, plan: BlockPlan, length: int, world: int, unit: int) -> list[Layout]:
    """The layout of that name. ``auto``: contiguous shards of whole blocks, and unless those are
    about even the first that is, or the most even one."""

    def work(run: range) -> float:
        return sum(
            plan._cost(part.scene, [run]) * (1 if part.batch is None else len(part.batch))
            for part in plan.parts
        )

    if name != "auto":
        return [LAYOUTS[name](length, world)]
    # Ranks hold whole blocks as far as that keeps them busy alike.
    count = -(-length // unit)
    near = _scaled(contiguous(count, world), unit, length)
    if imbalance(near, work) <= EVEN:
        return [near]
    best: tuple[float, Layout] | None = None
    for layout in (
        _scaled(zigzag(count, world), unit, length),
        _scaled(
            balanced(count, world, lambda run: round(1024 * work(_tokens(run, unit, length)))),
            unit,
            length,
        ),
        contiguous(length, world),
        zigzag(length, world),
    ):
        found = imbalance(layout, work)
        if found <= EVEN:
            return [near, layout]
        if best is None or found < best[0] / EVEN:
            best = found, layout
    assert best is not None
    return [near, best[1]]


def _scaled(layout: Layout, unit: int, length: int) -> Layout:
    """A layout of blocks as one of their tokens."""
    return Layout(
        length,
        tuple(tuple(_tokens(run, unit, length) for run in runs) for runs in layout.rows),
    )


def _tokens(blocks: range, unit: int, length: int) -> range:
    return range(blocks.start * unit, min(length, blocks.stop * unit))


@lru_cache(maxsize=32)
def _degrees(scene: Scene, weights: tuple[tuple[tuple[Pattern, ...], range, float], ...]) -> Tensor:
    total = torch.zeros(scene.query_blocks, dtype=torch.float64, device="cpu")
    for patterns, heads, share in weights:
        each = heads if any(pattern.varies for pattern in patterns) else heads[:1]
        counts = [active(scene, patterns, head).count().double() for head in each]
        count = torch.stack(counts).mean(0)
        most = sum(pattern.chosen for pattern in patterns)
        if most:
            # Of what is chosen, the query block's own tokens are in the static pattern already.
            first, last = scene.own(scene.blocks(torch.arange(scene.query_blocks, device="cpu")))
            more = (most - (last - first + 1)).clamp_min(0)
            count = (count + more).minimum(admitted_count(scene).double())
        total += share * count
    return total


@lru_cache(maxsize=1024)
def _cost(
    scene: Scene,
    weights: tuple[tuple[tuple[Pattern, ...], range, float], ...],
    runs: tuple[range, ...],
) -> float:
    degrees = _degrees(scene, weights)
    size = scene.block_q
    total = 0.0
    for run in runs:
        first, last = run[0] // size, run[-1] // size
        touched = torch.arange(first, last + 1, device="cpu")
        held = ((touched + 1) * size).clamp_max(run[-1] + 1)
        held = held - (touched * size).clamp_min(run[0])
        total += float((degrees[first : last + 1] * held).sum()) / size / run.step
    return total

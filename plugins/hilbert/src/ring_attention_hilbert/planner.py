"""The planner of variant ``hilbert``: an order, and a plan of tokens that are laid out in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import cast

from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.planner import BlockPlan, plan_blocks
from ring_attention_standard.planner import BranchPlan, band_of, plan_branches

from ring_attention_hilbert.config import HilbertConfig
from ring_attention_hilbert.everything import Everything
from ring_attention_hilbert.orders import CURVES, Curve, FoldedOrder, GridOrder, row_by_row
from ring_core.errors import InputError
from ring_core.layout import Layout, joined
from ring_core.masks import Band
from ring_core.order import Order, Walk
from ring_core.plan import Plan
from ring_core.sequences import Sequences

logger = logging.getLogger("ring_attention_hilbert")


@dataclass(frozen=True)
class Weighed:
    """What an order would cost.

    Attributes:
        name: of the order. blocks: active pairs of blocks of the whole sequence, mean over heads.
        fetched: of all keys, the largest share that a rank fetches. imbalance: see
            :meth:`ring_core.plan.Plan.imbalance`. cost: the plan's price.
    """

    name: str
    blocks: float
    fetched: float
    imbalance: float
    cost: float


@dataclass(frozen=True)
class HilbertPlan(BlockPlan):
    """Block-sparse attention over an order, and the orders that were weighed."""

    order_name: str = "row"
    grid: tuple[int, ...] | None = None
    weighed: tuple[Weighed, ...] = ()
    as_they_come: bool = False
    """Callers hold their tokens in the sequence's own order; on one rank."""

    def __hash__(self) -> int:
        return self._hash

    @property
    def shards(self) -> tuple[Layout, Layout]:
        if not self.as_they_come:
            return super().shards
        return replace(self.queries, order=None), replace(self.keys, order=None)

    def facts(self) -> Mapping[str, str]:
        how = "of those below, the cheapest" if len(self.weighed) > 1 else "as asked for"
        return {"order": f"{self.order_name} ({how})", **super().facts()}

    def alternatives(self) -> Sequence[Mapping[str, str]]:
        least = min((one.cost for one in self.weighed), default=1.0)
        return [
            {
                "Order": one.name,
                "Active blocks": f"{one.blocks:,.0f}",
                "Remote keys": f"{one.fetched:.1%}",
                "Imbalance": f"{one.imbalance:.3f}",
                "Cost": f"{one.cost / least:.2f}" if least else "1.00",
            }
            for one in self.weighed
        ]

    @property
    def walk(self) -> Walk | None:
        if self.queries.order is None and self.grid is not None and self.parts:
            return row_by_row(self.grid, self.parts[0].scene.prefix)
        return super().walk


@dataclass(frozen=True)
class ArrangedPlan(BranchPlan):
    """Dense or dilated attention in an order, of which all of them need the same keys.

    Attributes:
        order: along which callers hold each rank's tokens, where tiles count a rank's rows as the
            sequence has them: a curve changes nothing about who needs whose keys.
    """

    order_name: str = "row"
    order: Order | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __hash__(self) -> int:
        return self._order_hash

    @cached_property
    def _order_hash(self) -> int:
        return hash((self.queries, self.keys, self.documents, self.branches, self.order))

    @cached_property
    def _arranged(self) -> Layout:
        assert self.order is not None
        return arranged(self.queries, self.order)

    @property
    def shards(self) -> tuple[Layout, Layout]:
        return super().shards if self.order is None else (self._arranged, self._arranged)

    def facts(self) -> Mapping[str, str]:
        what = "dilated" if any(branch.rate > 1 for branch in self.branches) else "dense"
        how = f"{what}: no order computes or fetches less than another"
        return {"order": f"{self.order_name} ({how})", **super().facts()}

    @property
    def walk(self) -> Walk | None:
        if self.shards[0].order is None and self.grid is not None:
            return row_by_row(self.grid, self.prefix)
        return super().walk


def _check_length(config: HilbertConfig, sequences: Sequences) -> None:
    if config.grid is None:
        return
    expected = config.prefix + prod(config.grid)
    if sequences.q_len != expected or (sequences.cross and sequences.kv_len != expected):
        given = f"{sequences.q_len}" + (f" and {sequences.kv_len}" if sequences.cross else "")
        before = f" and prefix={config.prefix}" if config.prefix else ""
        raise InputError(
            f"grid={config.grid}{before} are {expected} tokens, and the sequence has {given}"
        )


def plan_ordered(config: HilbertConfig, sequences: Sequences, world: int) -> Plan:
    """A plan for ``world`` ranks.

    Raises:
        InputError: the sequence does not fit the grid; cross-attention with patterns or on a curve.
    """
    _check_length(config, sequences)
    patterns = config.resolved()
    if patterns is None:
        return _plan_dense(config, sequences, world)
    if config.order != "auto":
        return _plan_sparse(config, sequences, world, patterns, config.order)
    plans = [_plan_sparse(config, sequences, world, patterns, name) for name in ("row", *CURVES)]
    weighed = tuple(one.weighed[0] for one in plans)
    if _is_of_blocks(patterns):  # the choice changes the result, so no world size may
        costs = [one.blocks for one in weighed]
    else:
        costs = [one.cost for one in weighed]
    best = costs.index(min(costs))
    logger.info(
        "order %r: the cheapest by active blocks, remote keys and balance", weighed[best].name
    )
    return replace(plans[best], weighed=weighed)


def plan_as_they_come(config: HilbertConfig, sequences: Sequences, world: int) -> Plan:
    """A plan of shards that hold the tokens as they come.

    Raises:
        InputError: blocks run along a curve, and its shards hold other tokens.
    """
    patterns = config.resolved()
    if patterns is None or not _is_of_blocks(patterns):
        row = config.model_copy(update={"order": "row"})
        return plan_ordered(row, sequences, world)
    plan = plan_ordered(config, sequences, world)
    assert isinstance(plan, HilbertPlan)
    if world > 1 and plan.queries.order is not None:
        raise InputError(
            f"a call without a plan in a group of {world} ranks, with patterns of whole blocks "
            f"along order={plan.order_name!r}: which tokens the shards hold is up to the curve; "
            "pass plan=attn.plan(seq_len), or create the attention with order='row'"
        )
    return replace(plan, as_they_come=True)


def _is_of_blocks(patterns: Sequence[Pattern]) -> bool:
    return any(pattern.is_of_blocks for pattern in patterns)


def order_of(config: HilbertConfig, name: str, length: int) -> Order | None:
    """The order of that name for a sequence; None for the sequence's own."""
    if name == "row":
        return None
    curve, block = cast(Curve, name), min(config.block_q, config.block_kv)
    if config.grid is not None:
        return GridOrder(curve, config.grid, config.prefix, block)
    return FoldedOrder(curve, length, min(config.segment_length or length, length), block)


def arranged(layout: Layout, order: Order) -> Layout:
    """The same tokens on each rank, along an order."""
    rows = []
    for rank in range(layout.world):
        positions = layout.positions(rank)
        places = order.places()[positions[positions >= 0]].sort().values
        breaks = (places.diff() != 1).nonzero().squeeze(1) + 1
        edges = [0, *breaks.tolist(), len(places)]
        runs = [range(int(places[a]), int(places[b - 1]) + 1) for a, b in pairwise(edges) if a < b]
        rows.append(joined(runs))
    return Layout(layout.length, tuple(rows), order)


def _plan_dense(config: HilbertConfig, sequences: Sequences, world: int) -> Plan:
    name = "row" if config.order == "auto" else config.order
    logger.info(
        "no patterns: dense, every query sees all that the mask lets through; order %r", name
    )
    order = order_of(config, name, sequences.q_len)
    if order is not None:
        why = "cross-attention on a curve is not defined; give order='row'"
        sequences.refuse("cross", why=why)
    whole = range(sequences.q_len)
    dilated = config.segment_lengths is not None
    open_to_all = band_of(config) == Band() and all(one.q == whole for one in sequences.documents)
    if order is not None and not dilated and not open_to_all:
        return _plan_sparse(config, sequences, world, (Everything(),), name)
    plan = plan_branches(config, sequences, world)
    fields = {one.name: getattr(plan, one.name) for one in dataclass_fields(plan)}
    found = ArrangedPlan(**fields, order_name=name, grid=config.grid, prefix=config.prefix)
    if order is None or dilated:
        return replace(found, order=order)
    layout = replace(plan.queries, order=order)  # without a mask places do as well as tokens
    return replace(found, queries=layout, keys=layout)


def _plan_sparse(
    config: HilbertConfig,
    sequences: Sequences,
    world: int,
    patterns: tuple[Pattern, ...],
    name: str,
) -> HilbertPlan:
    order = order_of(config, name, sequences.q_len)
    plan = plan_blocks(config, sequences, world, patterns, order, config.prefix)
    fields = {key: getattr(plan, key) for key in ("queries", "keys", "parts", "patterns")}
    found = HilbertPlan(**fields, order_name=name, grid=config.grid)
    return replace(found, weighed=(_weigh(found, name),))


def _weigh(plan: HilbertPlan, name: str) -> Weighed:
    scenes = [(part.scene, 1 if part.batch is None else len(part.batch)) for part in plan.parts]
    blocks = sum(rows * float(plan.degrees(scene).sum()) for scene, rows in scenes)
    return Weighed(name, blocks, plan.fetched() / plan.keys.length, plan.imbalance(), plan.price())

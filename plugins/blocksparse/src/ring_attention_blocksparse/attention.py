"""Variant ``blocksparse``."""

from __future__ import annotations

import logging
from typing import Any

from ring_attention_standard.planner import plan_branches
from torch import Tensor

from ring_attention_blocksparse.choosing import choose, density_of
from ring_attention_blocksparse.config import BlockSparseConfig
from ring_attention_blocksparse.mask import Choice
from ring_attention_blocksparse.planner import BlockPlan, plan_blocks
from ring_core.attention import BaseRingAttention
from ring_core.exchange import Exchange
from ring_core.plan import Plan
from ring_core.rank_plan import RankPlan
from ring_core.sequences import Sequences

logger = logging.getLogger("ring_attention_blocksparse")


class BlockSparseRingAttention(BaseRingAttention):
    """Attention to what patterns show, exact: only active blocks are computed, and only keys that
    some query needs travel. Without patterns it is dense, as variant ``standard`` is."""

    config_class = BlockSparseConfig
    config: BlockSparseConfig
    _latest: tuple[BlockPlan, int, int, range, Choice | None] | None = None

    @property
    def density(self) -> float:
        """Of the latest call on this rank: block pairs that were computed, as a share of those that
        the mask leaves this rank's queries. A plan's own ``density()`` is over all ranks, and
        known before a call.

        Where blocks are chosen by the tensors, this waits for a GPU.
        """
        if self._latest is None:
            return 1.0
        plan, kv_heads, rank, held, choice = self._latest
        return density_of(plan.for_heads(kv_heads), rank, held, choice)

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        if self.config.patterns is None:
            logger.info("no patterns: every query sees all that the mask lets through")
            return plan_branches(self.config, sequences, world)
        return plan_blocks(self.config, sequences, world, self.config.patterns)

    def choose(self, plan: RankPlan, q: Tensor, k: Tensor, exchange: Exchange) -> Choice | None:
        if not isinstance(plan.plan, BlockPlan):
            self._latest = None
            return None
        held = range(k.shape[2]) if plan.held is None else plan.held.kv
        choice = choose(plan.plan, q, k, exchange, held.start)
        kv_heads = held.stop if plan.held is None else plan.held.kv_heads
        self._latest = plan.plan, kv_heads, plan.rank, held, choice
        return choice

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_latest": None}

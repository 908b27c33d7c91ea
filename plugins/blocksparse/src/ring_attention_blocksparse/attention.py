"""Variant ``blocksparse``."""

from __future__ import annotations

import logging

from ring_attention_standard.planner import plan_branches
from torch import Tensor

from ring_attention_blocksparse.choosing import choose
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

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        if self.config.patterns is None:
            logger.info("no patterns: every query sees all that the mask lets through")
            return plan_branches(self.config, sequences, world)
        return plan_blocks(self.config, sequences, world)

    def choose(self, plan: RankPlan, q: Tensor, k: Tensor, exchange: Exchange) -> Choice | None:
        if not isinstance(plan.plan, BlockPlan):
            return None
        return choose(plan.plan, q, k, exchange)

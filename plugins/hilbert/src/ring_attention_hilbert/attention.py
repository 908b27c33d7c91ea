"""Variant ``hilbert``."""

from __future__ import annotations

from ring_attention_blocksparse.attention import BlockSparseRingAttention

from ring_attention_hilbert.config import HilbertConfig
from ring_attention_hilbert.planner import plan_as_they_come, plan_ordered
from ring_core.plan import Plan
from ring_core.sequences import Sequences


class HilbertRingAttention(BlockSparseRingAttention):
    """Block-sparse, dense or dilated attention over tokens laid out on a space-filling curve.

    ``plan.shard``, ``plan.unshard`` and ``plan.positions`` carry the order; masks speak of the
    original tokens, and the result does not depend on it. A call without a plan takes tokens as
    they come.
    """

    config_class = HilbertConfig
    config: HilbertConfig
    rearranges = True

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        return plan_ordered(self.config, sequences, world)

    def make_implied_plan(self, sequences: Sequences, world: int) -> Plan:
        return plan_as_they_come(self.config, sequences, world)

"""Variant ``prefix_lm``."""

from __future__ import annotations

from ring_core import BaseRingAttention
from ring_core.sequences import Sequences

from ring_attention_prefix_lm.config import PrefixLMConfig
from ring_attention_prefix_lm.plan import PrefixPlan, plan_prefix


class PrefixLMAttention(BaseRingAttention):
    """Exact attention in which the start of each document is seen by all of its tokens."""

    config_class = PrefixLMConfig
    config: PrefixLMConfig

    def make_plan(self, sequences: Sequences, world: int) -> PrefixPlan:
        return plan_prefix(self.config, sequences, world)

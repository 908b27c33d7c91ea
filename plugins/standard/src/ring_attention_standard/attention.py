"""Variant ``standard``."""

from __future__ import annotations

from ring_attention_standard.config import StandardConfig
from ring_attention_standard.planner import BranchPlan, plan_branches
from ring_core.attention import BaseRingAttention
from ring_core.sequences import Sequences


class StandardRingAttention(BaseRingAttention):
    """Exact ring attention: dense (arXiv 2310.01889), or dilated (LongNet, arXiv 2307.02486)."""

    config_class = StandardConfig

    def make_plan(self, sequences: Sequences, world: int) -> BranchPlan:
        return plan_branches(self.config, sequences, world)

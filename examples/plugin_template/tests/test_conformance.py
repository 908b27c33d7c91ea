"""Variant ``prefix_lm`` through the conformance kit."""

from __future__ import annotations

from itertools import pairwise

import torch
from ring_core.testing import Case, Conformance, visible_of
from torch import Tensor


class TestPrefixLM(Conformance):
    variant = "prefix_lm"
    fields = (
        {"prefix_length": 6},
        {"prefix_length": 0},
        {"prefix_length": 100},
        {"prefix_length": 9, "window": (7, 3)},
    )
    layouts = ("auto", "zigzag", "striped")
    in_every_layout = ("odd", "packed batch", "padded")
    without = ("cross",)

    def visible(self, case: Case) -> Tensor:
        """The common fields' mask, AND-ed with the definition of a prefix."""
        seen = torch.zeros(case.q_len, case.k_len, dtype=torch.bool)
        for start, stop in pairwise(case.cu_seqlens or (0, case.q_len)):
            i = torch.arange(stop - start)[:, None]
            j = torch.arange(stop - start)[None, :]
            seen[start:stop, start:stop] = (j <= i) | (j < case.fields["prefix_length"])
        return visible_of(case) & seen

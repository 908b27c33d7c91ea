"""What a plan of variant hilbert says of its order, and how pictures show it."""

from __future__ import annotations

import pytest
import torch
from ring_attention_hilbert.orders import FoldedOrder

from ring_core import registry
from ring_core.sequences import Sequences


@pytest.mark.parametrize("length", [1, 5, 64, 75, 130])
def test_folded_segments_are_shown_as_they_are_walked(length: int) -> None:
    """A frame for each segment; each token in a cell of its own, the next one beside it."""
    order = FoldedOrder("hilbert", length, 16, 4)
    walk = order.walk()
    assert torch.equal(walk.tokens, order.tokens())
    assert len(walk.cells.unique()) == length
    assert int(walk.cells.max()) < walk.grid[0] * walk.grid[1] * walk.grid[2]
    assert torch.equal(walk.cells // 16, walk.tokens // 16)
    whole = length // 16
    cells = walk.cells[: whole * 16].view(whole, 16)
    step = (cells % 4).diff().abs() + (cells % 16 // 4).diff().abs()
    assert (step == 1).all()


@pytest.mark.parametrize(
    ("fields", "said", "grid"),
    [
        ({"grid": (6, 7)}, "row (dense: no order", (6, 7)),
        ({"grid": (6, 7), "order": "hilbert"}, "hilbert (dense: no order", (6, 7)),
        ({"grid": (6, 7), "order": "hilbert", "causal": True}, "hilbert (as asked for)", (6, 7)),
        (
            {
                "segment_length": 16,
                "order": "hilbert",
                "segment_lengths": [16],
                "dilation_rates": [2],
            },
            "hilbert (dilated: no order",
            (3, 4, 4),
        ),
        ({"segment_length": 16}, "row (dense: no order", None),
    ],
)
def test_plans_without_patterns_name_and_show_their_order(fields, said, grid) -> None:
    plan = registry.create("hilbert", block_q=4, block_kv=8, **fields).make_plan(
        Sequences.build(42), 3
    )
    assert plan.facts()["order"].startswith(said)
    assert (None if plan.walk is None else plan.walk.grid) == grid
    if plan.walk is not None:
        assert torch.equal(plan.walk.tokens.sort().values, torch.arange(42))

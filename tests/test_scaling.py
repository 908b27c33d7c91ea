"""The one table of all numbers of ranks: what stands in it, and what is said where nothing does."""

from __future__ import annotations

import argparse

import pytest

import scaling
from ring_core.prediction.memory import Sizes
from ring_core.sequences import Sequences


def test_every_row_has_its_efficiency():
    """Of one length, and of a length that grows with the ranks."""
    rows = [
        scaling.row("window", 1, {"forward": 8.0, "both": 20.0}),
        scaling.row("window", 4, {"forward": 2.5, "both": 5.0}),
        {**scaling.row("long", 1, {"forward": 10.0, "both": 30.0}), "tokens": [100, 100]},
        {**scaling.row("long", 4, {"forward": 20.0, "both": 30.0}), "tokens": [800, 400]},
        scaling.row("mesh", 4, {"forward": 3.0, "both": 9.0}, [0.75, 0.5]),
    ]
    rows[1] |= {"predicted": [2.25, 4.75]}
    rows[4] |= {"unpredicted": "no rate of heads of 5"}
    scaling.with_efficiency(rows)
    assert [one.get("efficiency") for one in rows] == [
        None,
        [0.8, 1.0],
        None,
        [1.0, 1.0],
        [0.75, 0.5],
    ]
    lines = scaling.table(rows, [1, 4])
    assert "| window | 8.00 / 20.00 | 2.50 / 5.00 [0.800 / 1.000], 2.25 / 4.75 |" in lines
    assert "| mesh |  | 3.00 / 9.00 [0.750 / 0.500] |" in lines
    assert lines[-1] == "Not predicted: mesh (4): no rate of heads of 5"


@pytest.mark.parametrize("whole", [{"seq_len": 4096}, {"cu_seqlens": (0, 1000, 4096)}])
def test_predictions_or_why_there_are_none(whole):
    options = argparse.Namespace(rates="cpu")
    fields = {"variant": "standard", "causal": True}
    sequences = Sequences.build(**whole)
    known = scaling.predicted(fields, sequences, 2, Sizes(4, 2, 64, 64, 1, "float32"), options)
    forward, both = known["predicted"]
    assert 0 < forward < both
    unknown = scaling.predicted(fields, sequences, 2, Sizes(4, 2, 48, 48, 1, "float32"), options)
    assert "heads of 48" in unknown["unpredicted"]

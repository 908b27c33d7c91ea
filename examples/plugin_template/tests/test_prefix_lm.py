"""What the conformance kit does not know: the planner pair by pair, leaks, refusals, the log."""

from __future__ import annotations

import logging
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from ring_core import registry
from ring_core.errors import ConfigError, InputError
from ring_core.rounds import elements_fetched
from ring_core.sequences import Sequences
from ring_core.testing import RankPool, Worker, check_pairs

from ring_attention_prefix_lm import PrefixLMConfig
from ring_attention_prefix_lm.plan import plan_prefix

PREFIX = 5


def sees(i: int, j: int) -> bool:
    """The definition, for two tokens of one document counted from its start."""
    return j <= i or j < PREFIX


# The planner


@pytest.mark.parametrize("layout", ["auto", "contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_every_visible_pair_is_computed_once(world: int, layout: str) -> None:
    """In packed documents and in a padded batch: shorter than the prefix, empty, and longer."""
    ends = [0, 3, 3, 20, 37]
    packed = torch.zeros(1, 1, 37, 37, dtype=torch.int)
    for start, stop in pairwise(ends):
        for i, j in product(range(stop - start), repeat=2):
            packed[0, 0, start + i, start + j] = sees(i, j)
    lengths = [23, 0, 4, 4]
    padded = torch.zeros(4, 1, 23, 23, dtype=torch.int)
    for row, length in enumerate(lengths):
        for i, j in product(range(length), repeat=2):
            padded[row, 0, i, j] = sees(i, j)
    config = PrefixLMConfig(prefix_length=PREFIX, layout=layout)
    check_pairs(plan_prefix(config, Sequences.build(cu_seqlens=ends), world), packed)
    check_pairs(plan_prefix(config, Sequences.build(23, lengths=lengths), world), padded)


@pytest.mark.parametrize(
    ("prefix", "asked"),
    [
        (0, {"seq_len": 4096}),
        (500, {"seq_len": 4096}),
        (3000, {"seq_len": 4096}),
        (4096, {"seq_len": 4096}),
        (200, {"cu_seqlens": [0, 100, 2500, 2600, 8000]}),
        (200, {"seq_len": 1000, "lengths": [1000, 150, 700]}),
    ],
)
def test_ranks_are_equally_busy(prefix: int, asked: dict[str, Any]) -> None:
    """Within 10%; where all tokens see the same keys, in contiguous shards."""
    config = PrefixLMConfig(prefix_length=prefix)
    sequences = Sequences.build(**asked)
    plan = plan_prefix(config, sequences, 8)
    assert plan.imbalance(sequences.batch) < 1.1
    if prefix >= sequences.q_len:
        assert all(len(runs) == 1 for runs in plan.queries.rows)


# Leaks


def test_gradients_reach_what_is_seen_and_nothing_else() -> None:
    """Values that a query does not see have no part in its output, and all others have one."""
    length = 12
    attention = registry.create("prefix_lm", prefix_length=PREFIX)
    q, k, v = (torch.randn(1, length, 1, 4, dtype=torch.float64) for _ in range(3))
    out = attention(q, k, v.requires_grad_())
    for i in range(length):
        (slope,) = torch.autograd.grad(out[0, i].sum(), v, retain_graph=True)
        reached = (slope != 0).any(-1).flatten().tolist()
        assert reached == [sees(i, j) for j in range(length)]


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prefix_length"),
        ({"prefix_length": -1}, "greater than or equal to 0"),
        ({"prefix_lenght": 4}, "Did you mean 'prefix_length'"),
        ({"prefix_length": 4, "causal": True}, "causal=True means nothing here: .* leave it out"),
        ({"prefix_length": 4, "segment_lengths": [8], "dilation_rates": [2]}, "not defined"),
        ({"prefix_length": 4, "window": (-1, 0)}, "window"),
    ],
)
def test_fields_without_a_meaning_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.create("prefix_lm", **fields)


def test_cross_attention_is_refused() -> None:
    attention = registry.create("prefix_lm", prefix_length=4)
    with pytest.raises(InputError, match="not defined"):
        attention.plan(16, kv_len=20)
    with pytest.raises(InputError, match="not defined"):
        attention(torch.ones(1, 3, 1, 8), *2 * [torch.ones(1, 5, 1, 8)])


# The log


class Lines(logging.Handler):
    """Keeps the messages that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


def logged(worker: Worker, length: int, fields: dict[str, Any]) -> tuple[list[str], int]:
    """On each rank: what a forward logs, and the bytes that it fetches by the plan."""
    attention = registry.create("prefix_lm", group=worker.group, prefix_length=PREFIX, **fields)
    plan = attention.plan(length)
    heads, head_dim, value_dim = 2, 8, 4
    q = k = torch.ones(1, plan.local_len, heads, head_dim, dtype=torch.float64)
    v = torch.ones(1, plan.local_len, heads, value_dim, dtype=torch.float64)
    logger, kept = logging.getLogger("ring_attention_prefix_lm"), Lines()
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        attention(q, k, v, plan=plan)
    finally:
        logger.removeHandler(kept)
    elements = elements_fetched(plan.plan, worker.rank, heads)
    return kept.lines, elements * (head_dim + value_dim) * q.itemsize


def test_the_log_says_what_the_plan_says(cpu_pool: RankPool) -> None:
    for lines, size in cpu_pool.run(logged, 30, {"log_transfers": True}, world=3):
        assert lines[-1].endswith(f", {size} bytes in this call")


def test_layers_that_differ_in_the_log_share_a_plan() -> None:
    """What the config names ``unplanned`` changes no plan."""
    loud, quiet = (
        registry.create("prefix_lm", prefix_length=PREFIX, log_transfers=log)
        for log in (True, False)
    )
    q = torch.ones(1, 8, 1, 4)
    assert torch.equal(loud(q, q, q, plan=quiet.plan(8)), quiet(q, q, q))


def test_nothing_is_logged_unless_asked_for(cpu_pool: RankPool) -> None:
    assert all(lines == [] for lines, _ in cpu_pool.run(logged, 30, {}, world=2))

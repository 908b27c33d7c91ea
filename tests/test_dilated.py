"""Dilated attention (LongNet, arXiv 2307.02486) through the conformance kit, and by hand."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from typing import Any, ClassVar

import pytest
import torch
from ring_attention_standard.planner import plan_branches

from in_rounds import Joining, run_in_rounds
from ring_core import BaseRingAttention, reference, registry
from ring_core.errors import ConfigError, InputError
from ring_core.program import Program
from ring_core.rounds import elements_fetched, elements_sent, rounds
from ring_core.sequences import Sequences
from ring_core.testing import Case, Conformance, RankPool, Worker
from ring_core.testing.case import expected_of, run_case, visible_of
from ring_core.testing.tasks import build


class TestDilated(Conformance):
    variant = "standard"
    fields = (
        # Segments within shards and across them, rates that divide them.
        {"segment_lengths": [4, 16], "dilation_rates": [1, 2], "causal": True},
        # Rates that divide nothing, longer than the sequence; some rows are in no branch.
        {"segment_lengths": [7, 1000], "dilation_rates": [2, 3], "layout": "zigzag"},
        # The same rate twice: pairs that count twice, for the same heads.
        {"segment_lengths": [9, 24, 13], "dilation_rates": [2, 2, 5], "causal": True},
        {
            "segment_lengths": [16, 40],
            "dilation_rates": [1, 3],
            "window": (9, 4),
            "layout": "striped",
        },
    )
    sequences: ClassVar = {
        name: Conformance.sequences[name]
        for name in (
            "odd",
            "batch",
            "many queries per key",
            "no grouping",  # of 24 tokens: as long as a segment of the third config
            "packed",
            "packed batch",
            "padded",
        )
    } | {"more heads than phases": {"seq_len": 33, "heads": 10, "kv_heads": 5}}


# The reference itself


def test_the_mean_of_the_kept_values_by_hand():
    """Queries of 0 weigh all keys alike: out is a mean, lse the logarithm of a count."""
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    kept = {  # segments of 2, all of them; segments of 4 (the last is short), every second token
        0: [0, 1, 0, 2],
        1: [0, 1],
        2: [2, 3, 0, 2],
        3: [2, 3],
        4: [4, 5, 4],
        5: [4, 5],
    }
    q = torch.zeros(1, 6, 1, 1, dtype=torch.float64)
    v = torch.tensor(values, dtype=torch.float64).view(1, 6, 1, 1)
    times = reference.dilated(6, 1, [2, 4], [1, 2])
    attention = registry.create("standard", segment_lengths=[2, 4], dilation_rates=[1, 2])
    for out, lse in (
        reference.attention(q, q, v, times),
        attention(q, q, v, return_lse=True),
    ):
        for i, keys in kept.items():
            assert out[0, i, 0, 0].item() == pytest.approx(sum(keys) / len(keys), abs=1e-14)
            assert lse[0, 0, i].item() == pytest.approx(math.log(len(keys)), abs=1e-14)


def test_the_second_head_starts_a_token_later():
    """Two KV heads at rate 2: the first keeps 0 and 2, the second 1 and 3."""
    times = reference.dilated(4, 2, [4], [2])
    assert times[0].tolist() == [[1, 0, 1, 0], [0] * 4, [1, 0, 1, 0], [0] * 4]
    assert times[1].tolist() == [[0] * 4, [0, 1, 0, 1], [0] * 4, [0, 1, 0, 1]]


def branch_by_branch(q, k, v, segments, rates, causal):
    """LongNet's own way, one query at a time in plain Python: attention of each branch alone, and
    the branches' outputs weighed by the denominators of their softmaxes."""
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    out = []
    for i in range(length):
        for h in range(heads):
            group = h * kv_heads // heads
            outputs, denominators = [], []
            for w, r in zip(segments, rates, strict=True):
                first = i // w * w
                if (i - first) % r != group % r:
                    continue
                last = i + 1 if causal else min(first + w, length)
                keys = [j for j in range(first, last) if (j - first) % r == group % r]
                weights = torch.stack(
                    [(q[0, i, h] @ k[0, j, group] / math.sqrt(q.shape[3])).exp() for j in keys]
                )
                denominators.append(weights.sum())
                outputs.append(weights @ v[0, keys, group] / weights.sum())
            if not outputs:
                out.append(torch.zeros_like(v[0, 0, 0]))
                continue
            alpha = torch.stack(denominators) / sum(denominators)
            out.append(alpha @ torch.stack(outputs))
    return torch.stack(out).view(1, length, heads, v.shape[3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("segments", "rates"), [([4, 8], [1, 2]), ([5, 30], [2, 3]), ([3, 3], [1, 1]), ([20], [7])]
)
def test_branches_weighed_by_their_denominators(segments, rates, causal):
    """The definition (a key counts once for each branch) is LongNet's merge, and so are gradients:
    through the weights too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 13, h, 3, dtype=torch.float64) for h in (4, 2, 2))
    dout = torch.randn(1, 13, 4, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    by_hand = branch_by_branch(*leaves, segments, rates, causal)
    expected = [by_hand, *torch.autograd.grad(by_hand, leaves, dout, materialize_grads=True)]
    seen = reference.visible(13, 13, causal=causal)
    times = seen * reference.dilated(13, 2, segments, rates).repeat_interleave(2, dim=0)
    attention = registry.create(
        "standard", segment_lengths=segments, dilation_rates=rates, causal=causal
    )
    for out in (reference.attention(*leaves, times)[0], attention(*leaves)):
        found = [out, *torch.autograd.grad(out, leaves, dout, materialize_grads=True)]
        for one, right in zip(found, expected, strict=True):
            assert torch.allclose(one, right, atol=1e-12, rtol=0)


# What moves


def bytes_sent(worker: Worker, fields: dict, seq_len: int, kv_heads: int = 4) -> tuple[int, int]:
    """What a forward and backward sent, and what the plan says."""
    case = Case(fields=fields, seq_len=seq_len, heads=2 * kv_heads, kv_heads=kv_heads)
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(*leaves, plan=plan).backward(dout)
    sent = attention.communicator(plan).counters.bytes_sent
    keys = elements_sent(plan.plan, plan.rank, kv_heads)
    gradients = elements_fetched(plan.plan, plan.rank, kv_heads)
    return sent, (2 * keys + gradients) * (8 + 8) * 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["auto", "contiguous", "zigzag"])
@pytest.mark.parametrize("segment", [64, 128])
def test_a_branch_sends_its_share_of_dense(cpu_pool: RankPool, segment, layout, causal):
    """Bytes are the plan's, and at rate r at most 1/r of what the same segments send at rate 1."""
    sent = {}
    for rate in (1, 2, 4):
        fields = {
            "segment_lengths": [segment],
            "dilation_rates": [rate],
            "layout": layout,
            "causal": causal,
        }
        counted, planned = zip(*cpu_pool.run(bytes_sent, fields, 128, world=4), strict=True)
        assert counted == planned
        sent[rate] = sum(counted)
    assert sent[1] > 0
    assert sent[2] * 2 <= sent[1]
    assert sent[4] * 4 <= sent[1]


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("segment", [256, 512, 10**6])
def test_a_window_keeps_shards_together(segment: int, rate: int) -> None:
    """To deal rows out would send what no window asks for: more than dense attention does."""
    band = {"causal": True, "window": (64, 0)}
    branch = {"segment_lengths": [segment], "dilation_rates": [rate]}

    def sent(fields) -> int:
        plan = registry.create("standard", **fields).make_plan(_sequences(2048), 8)
        return sum(elements_sent(plan, rank, 4) for rank in range(8))

    assert sent({**band, **branch}) * rate <= sent(band)


def test_rates_may_be_longer_than_any_sequence() -> None:
    q, k, v, *_ = Case(seq_len=16).tensors()
    huge = registry.create("standard", segment_lengths=[2**62], dilation_rates=[2**62])
    large = registry.create("standard", segment_lengths=[64], dilation_rates=[64])
    assert torch.equal(huge(q, k, v), large(q, k, v))
    with pytest.raises(ConfigError, match=r"at most 2\*\*62"):
        registry.create("standard", segment_lengths=[2**63], dilation_rates=[1])


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_branches_of_one_rate_share_what_travels(cpu_pool: RankPool, kv_heads, dropout):
    """Segments of 45 end within a shard: their phases lie unlike those of the longer ones."""
    fields = {"segment_lengths": [64, 45], "dilation_rates": [2, 2], "layout": "contiguous"}
    found = cpu_pool.run(bytes_sent, {**fields, "dropout": dropout}, 64, kv_heads, world=2)
    assert all(counted == planned for counted, planned in found)
    plan = registry.create("standard", **fields).make_plan(_sequences(64), 2)
    for rank in range(2):
        assert elements_sent(plan, rank, kv_heads) == 16 * kv_heads


def test_segments_within_a_shard_need_no_communication(cpu_pool: RankPool):
    fields = {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "causal": True}
    assert cpu_pool.run(bytes_sent, fields, 128, world=4) == [(0, 0)] * 4
    plan = registry.create("standard", **fields).make_plan(_sequences(4 * 4096), 4)
    for rank in range(4):
        assert [one.index for one in rounds(plan, rank, 1)] == [0]
        assert [one.index for one in rounds(plan, rank, 3)] == [0]


def test_thousands_of_segments_are_a_few_tiles():
    """What 64 million tokens take on four ranks: one tile for each branch."""
    lengths, rates = [2048 << i for i in range(6)], [1 << i for i in range(6)]
    attention = registry.create("standard", segment_lengths=lengths, dilation_rates=rates)
    plan = attention.make_plan(_sequences(64 << 20), 4)
    assert plan.imbalance() == 1.0
    for rank in range(4):
        (own,) = rounds(plan, rank, 3)
        assert [len(tile.q) for tile in own.tiles] == [(16 << 20) // rate for rate in rates]
        assert [tile.heads.phases for tile in own.tiles] == rates


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("fields", [{"causal": True}, {"window": (2, 3), "layout": "contiguous"}])
def test_short_documents_in_a_few_calls(cpu_pool: RankPool, fields: Any, world: int) -> None:
    """What segments of many documents keep, gathered for one call for each branch and phase."""
    branches = {"segment_lengths": (8, 16, 64), "dilation_rates": (1, 2, 3), **fields}
    ends = (0, 1, 6, 19, 20, 27, 33, 47, 52, 58, 59, 70)
    for sizes in ({"kv_heads": 4}, {"kv_heads": 1, "batch": 2, "value_dim": 12}):
        case = Case(fields=branches, cu_seqlens=ends, **{"heads": 4, **sizes})
        shards = 1 if case.batch == 1 else 3
        result = cpu_pool.run(run_in_rounds, case, shards, "joining", world=world)[0]
        errors = result.errors(expected_of(case, visible_of(case)))
        assert all(error < 1e-10 for error in errors.values()), (sizes, errors)


def test_a_thousand_documents_are_a_few_calls() -> None:
    attention = registry.create(
        "standard", causal=True, segment_lengths=(64, 256), dilation_rates=(1, 4)
    )
    draw = random.Random(0)
    ends = [0, *accumulate(draw.randint(1, 60) for _ in range(1000))]
    plan = attention.make_plan(Sequences.build(cu_seqlens=ends), 1)
    (one,) = Program.build(plan, 0, Joining(), kv_heads=8).rounds
    assert len(plan.tiles(0, 0)) > 1000
    assert len(one.tiles) == 1 + 4


def test_segments_across_ranks_are_a_tile_for_each_owner():
    attention = registry.create("standard", segment_lengths=[1 << 20], dilation_rates=[8])
    plan = attention.make_plan(_sequences(1 << 20), 4)
    for rank in range(4):
        own, *others = rounds(plan, rank, 1)
        assert [len(one.tiles) for one in (own, *others)] == [1] * 4
        (together,) = rounds(plan, rank, 3)[1:]
        assert [(len(tile.q), len(tile.kv)) for tile in together.tiles] == [(1 << 15, 3 << 15)]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "fields",
    [
        {"segment_lengths": [1 << 20], "dilation_rates": [2]},
        {"segment_lengths": [512, 1 << 20], "dilation_rates": [1, 4]},
        {"segment_lengths": [1 << 14, 1 << 16], "dilation_rates": [1, 2]},
        {"segment_lengths": [30_000], "dilation_rates": [3]},
    ],
)
def test_causal_work_is_balanced(world, fields):
    attention = registry.create("standard", causal=True, **fields)
    for sequence in (_sequences(1 << 17), _sequences(100_003)):
        assert attention.make_plan(sequence, world).imbalance() <= 1.1


def _sequences(length):
    from ring_core.sequences import Sequences

    return Sequences.build(length)


# How it is asked for


class AnotherVariant(BaseRingAttention):
    """What a third party writes to have dilation: it asks for the standard planner's plan."""

    def make_plan(self, sequences, world):
        return plan_branches(self.config, sequences, world)


def test_another_variant_dilates_with_the_same_planner():
    fields = {"segment_lengths": [5, 16], "dilation_rates": [1, 3], "causal": True}
    q = torch.randn(1, 37, 2, 4, dtype=torch.float64)
    times = reference.visible(37, 37, causal=True) * reference.dilated(37, 2, [5, 16], [1, 3])
    out = AnotherVariant(**fields)(q, q, q)
    assert torch.allclose(out, reference.attention(q, q, q, times)[0], atol=1e-12, rtol=0)


def test_dilated_cross_attention_is_refused_by_name():
    attention = registry.create("standard", segment_lengths=[8], dilation_rates=[2])
    with pytest.raises(InputError, match=r"kv_len.*not defined; leave segment_lengths=\[8\]"):
        attention.plan(16, kv_len=20)


@pytest.mark.parametrize("preset", ["development", "production", "large_scale"])
def test_presets_run_on_four_ranks(cpu_pool: RankPool, preset):
    """At a length of several segments that divides nothing; float32 against one device."""
    chosen = registry.presets()[preset]
    attention = registry.create_from_preset(preset, causal=True)
    assert attention.config.causal
    assert attention.config.variant == chosen.variant
    case = Case(chosen.variant, {**chosen.fields, "causal": True}, seq_len=12_001, dtype="float32")
    alone = cpu_pool.run(run_case, case, world=1)[0]
    many = cpu_pool.run(run_case, case, world=4)[0]
    assert max(many.errors(alone).values()) < 1e-4

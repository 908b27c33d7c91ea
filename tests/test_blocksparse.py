"""Block-sparse attention through the conformance kit, against the definitions of its patterns."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from ring_attention_blocksparse.config import BlockSparseConfig

import by_definition
from in_rounds import one_sided, run_in_rounds
from ring_core import registry
from ring_core.rounds import elements_fetched, elements_sent
from ring_core.sequences import Sequences
from ring_core.testing import Case, Conformance, RankPool, Worker
from ring_core.testing.case import Result, expected_of, gathered, run_case
from ring_core.testing.tasks import build


def shown(case: Case) -> torch.Tensor:
    config = BlockSparseConfig(**case.fields)
    return by_definition.shown(case, config, config.patterns)


def small(*patterns: dict[str, Any], block_q: int = 4, block_kv: int = 4, **fields: Any) -> Any:
    return {"patterns": patterns, "block_q": block_q, "block_kv": block_kv, **fields}


LOCAL = {"kind": "local", "left": 6, "right": 2}
SINK = {"kind": "sink", "n": 3}
RANDOM = {"kind": "random", "blocks": 2, "seed": 7}


class TestBlockSparse(Conformance):
    variant = "blocksparse"
    fields = (
        small(LOCAL, causal=True),
        small(SINK, {**LOCAL, "heads": [0]}, RANDOM, causal=True, window=(19, None)),
        small({"kind": "topk", "blocks": 2}, {**RANDOM, "heads": [0]}, block_kv=8),
        small(
            {"kind": "global_tokens", "ids": [0, 13]},
            {"kind": "dilated", "window": 2, "rate": 5},
            block_q=8,
            layout="zigzag",
        ),
    )
    sequences: ClassVar = {
        name: Conformance.sequences[name]
        for name in (
            "odd",
            "shorter than the group",
            "one token",
            "batch",
            "many queries per key",
            "packed batch",
            "padded",
        )
    }
    half: ClassVar = {**Conformance.half, "seq_len": 256}

    def visible(self, case: Case) -> torch.Tensor:
        return shown(case)

    def hidden(self, case: Case) -> torch.Tensor:
        config = BlockSparseConfig(**case.fields)
        if not by_definition.chooses(config):
            return super().hidden(case)
        return by_definition.out_of_sight(case, config)


def test_tables_of_their_own(cpu_pool: RankPool) -> None:
    """Given blocks, the same for all heads and not, on ranks that divide nothing."""
    generator = torch.Generator().manual_seed(5)
    for shape in ((10, 10), (2, 10, 10)):
        table = (torch.rand(shape, generator=generator) < 0.3).tolist()
        case = Case("blocksparse", small({"kind": "blocks", "table": table}, SINK, causal=True))
        expected = expected_of(case, shown(case))
        for world in (2, 3):
            errors = cpu_pool.run(run_case, case, world=world)[0].errors(expected)
            assert all(error < 1e-10 for error in errors.values()), errors


# What moves


def moved(worker: Worker, case: Case) -> tuple[int, int, float]:
    """Bytes that a forward and backward sent, those that the plan says, and the rank's density."""
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(*leaves, plan=plan).backward(dout)
    keys = elements_sent(plan.plan, plan.rank, case.kv_heads)
    gradients = elements_fetched(plan.plan, plan.rank, case.kv_heads)
    sizes = case.batch * (case.head_dim + case.value_dim) * 8
    planned = (2 * keys + gradients) * sizes
    return attention.communicator(plan).counters.bytes_sent, planned, attention.density


def test_a_window_sends_its_halo_alone(cpu_pool: RankPool):
    local = {"kind": "local", "left": 40, "right": 0}
    fields = small(local, causal=True, layout="contiguous", block_q=16, block_kv=16)
    case = Case("blocksparse", fields, seq_len=512)
    found = cpu_pool.run(moved, case, world=4)
    assert all(counted == planned for counted, planned, _ in found)
    a_row = 2 * (8 + 8) * 8  # of two heads: keys and values
    # To the next rank: three blocks, in the forward and the backward; and their gradients back.
    halo = 48 * a_row
    assert [counted for counted, _, _ in found] == [2 * halo, 3 * halo, 3 * halo, halo]


@pytest.mark.parametrize("layout", ["auto", "zigzag", "striped"])
@pytest.mark.parametrize("heads", [None, [1]])
def test_bytes_are_the_plans(cpu_pool: RankPool, layout, heads):
    patterns = {"kind": "random", "blocks": 2, "heads": heads}, {"kind": "sink", "n": 3}
    case = Case("blocksparse", small(*patterns, causal=True, layout=layout), seq_len=150)
    found = cpu_pool.run(moved, case, world=4)
    assert all(counted == planned for counted, planned, _ in found)
    assert sum(counted for counted, _, _ in found) > 0


def test_blocks_of_their_own_send_nothing(cpu_pool: RankPool):
    table = torch.block_diag(*[torch.ones(4, 4)] * 4).bool()
    fields = small({"kind": "blocks", "table": table}, block_q=8, block_kv=8)
    found = cpu_pool.run(moved, Case("blocksparse", fields, seq_len=128), world=4)
    assert found == [(0, 0, 0.25)] * 4


def test_heads_fetch_what_they_need_themselves():
    fields = small(
        {"kind": "global_tokens", "ids": [1000], "heads": [0]},
        {"kind": "local", "left": 16, "right": 0, "heads": [1, 2]},
        block_q=16,
        block_kv=16,
        causal=True,
        layout="contiguous",
    )
    plan = registry.create("blocksparse", **fields).make_plan(Sequences.build(1024), 4)
    # Before the global token's block there is nothing to see for head 0; it is on the last rank.
    assert [elements_fetched(plan, rank, 3) for rank in range(4)] == [0, 32, 32, 768 + 32]


def test_the_choice_needs_pooled_keys_beside_the_ring(cpu_pool: RankPool):
    case = Case("blocksparse", small({"kind": "topk", "blocks": 3}, causal=True), seq_len=64)
    found = cpu_pool.run(moved, case, world=4)
    # Means of the keys of four blocks a rank, to three peers, in forward and backward.
    pooled = 4 * 2 * 8 * 8 * 3 * 2
    assert [counted - planned for counted, planned, _ in found] == [pooled] * 4


def moved_one_sided(worker: Worker, case: Case) -> tuple[int, int, int, Result]:
    """Bytes that a forward and backward sent and received, those of what its plan may need, and
    the results."""
    attention, plan, (q, k, v, dout, dlse) = build(worker, case)
    counters = one_sided(worker, attention, 3).counters
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, plan=plan, return_lse=True)
    torch.autograd.backward((out, lse), (dout, dlse))
    keys = elements_sent(plan.plan, plan.rank, case.kv_heads)
    gradients = elements_fetched(plan.plan, plan.rank, case.kv_heads)
    most = (2 * keys + gradients) * case.batch * (case.head_dim + case.value_dim) * 8
    whole = gathered(plan, out, lse, *(x.grad for x in leaves))
    return counters.bytes_sent, counters.bytes_received, most, whole


@pytest.mark.parametrize("sizes", [{"seq_len": 128}, {"cu_seqlens": (0, 3, 60, 60, 128)}])
def test_one_sided_only_chosen_blocks_travel(cpu_pool: RankPool, sizes) -> None:
    """A rank gets the blocks that some query of its sees, head by head, and sends back their
    gradients; beside that travel pooled keys, and what each rank reads."""
    chosen = (
        {"kind": "topk", "blocks": 2, "heads": [0]},
        {"kind": "topk", "blocks": 3, "heads": [1, 3]},
        {"kind": "sink", "n": 5, "heads": [1, 2]},
        {"kind": "local", "left": 3, "right": 9, "heads": [2]},
    )  # and head 4 has none
    fields = small(*chosen, block_q=8, block_kv=8, layout="contiguous")
    case = Case("blocksparse", fields, heads=10, kv_heads=5, batch=2, **sizes)
    world, blocks, seen = 4, 16, shown(case)
    found = cpu_pool.run(moved_one_sided, case, world=world)
    errors = found[0][3].errors(expected_of(case, seen))
    assert all(error < 1e-10 for error in errors.values()), errors
    by_head = seen.view(2, 5, 2, world, -1, blocks, 8).any(2).any(3).any(4)  # [B, K, rank, block]
    a_block = 8 * (case.head_dim + case.value_dim) * 8
    pooled = 4 * case.kv_heads * case.head_dim * 8 * 2
    told = 2 * case.kv_heads * blocks
    assert 0 < by_head.sum() < by_head.numel()
    for rank, (sent, received, most, _) in enumerate(found):
        mine = range(4 * rank, 4 * rank + 4)
        others = [peer for peer in range(world) if peer != rank]
        given = int(by_head[:, :, others][..., mine].sum())
        fetched = int(by_head[:, :, rank].sum() - by_head[:, :, rank, mine].sum())
        beside = 2 * 3 * (pooled + told)
        assert sent == (2 * given + fetched) * a_block + beside
        assert received == (2 * fetched + given) * a_block + beside
        assert sent - beside < most


@pytest.mark.parametrize("layout", ["zigzag", "striped", "auto"])
def test_one_sided_in_any_layout(cpu_pool: RankPool, layout: str) -> None:
    """Blocks that several ranks hold, batch rows of other lengths, and several rounds."""
    chosen = {"kind": "topk", "blocks": 2}, {"kind": "strided", "stride": 19, "heads": [1]}
    fields = small(*chosen, causal=True, layout=layout)
    case = Case("blocksparse", fields, seq_len=75, lengths=(75, 0, 31), batch=3)
    for shards in (1.5, 3):
        result = cpu_pool.run(run_in_rounds, case, shards, "usual", True, world=3)[0]
        errors = result.errors(expected_of(case, shown(case)))
        assert all(error < 1e-10 for error in errors.values()), errors


IN_ROUNDS = (2, 1, "rounding"), (2, 3, "usual"), (3, 1.5, "rounding"), (4, 3, "rounding")


@pytest.mark.parametrize(("world", "shards", "kernel"), IN_ROUNDS)
def test_rounds_of_several_steps_equal_the_reference(
    cpu_pool: RankPool, world: int, shards: float, kernel: str
) -> None:
    """Keys of several owners in one call; blocks of a peer that travel packed."""
    turn = IN_ROUNDS.index((world, shards, kernel))
    chosen = {"kind": "topk", "blocks": 2}
    scattered = {"kind": "strided", "stride": 29}
    every = (
        small(LOCAL, SINK, causal=True, layout="zigzag"),
        small(scattered, {**RANDOM, "blocks": 1, "heads": [1]}),
        small(scattered, layout="striped", block_q=8),
        small(chosen, causal=True),
    )
    for number, fields in enumerate(every):
        for other, sizes in enumerate(
            (
                {"seq_len": 32 * world + 3, "batch": 2, "value_dim": 12},
                {"cu_seqlens": (0, 1, 14, 14, 41, 63), "batch": 2},
                {"seq_len": 43, "lengths": (43, 0, 17, 1), "batch": 4},
            )
        ):
            if (number + other + turn) % 2:  # every one of both, not with every other
                continue
            case = Case("blocksparse", fields, **sizes)
            chooses = chosen in fields["patterns"]
            result = cpu_pool.run(run_in_rounds, case, shards, kernel, chooses, world=world)[0]
            errors = result.errors(expected_of(case, shown(case)))
            assert all(error < 1e-10 for error in errors.values()), (case, errors)

"""Planners: every visible pair exactly once, every send matched, load balanced, memory bounded."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ring_attention_standard import StandardConfig
from ring_attention_standard.kernels.cpu_flash import CpuFlash
from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.cudnn import Cudnn
from ring_attention_standard.kernels.flash4 import Flash4
from ring_attention_standard.planner import _work, plan_branches

from ring_core import reference
from ring_core.layout import contiguous, striped, zigzag
from ring_core.masks import Band, Diagonal, trim
from ring_core.plan import ForHeads, Segments
from ring_core.program import Program
from ring_core.rounds import elements_sent, rounds
from ring_core.sequences import Sequences
from ring_core.testing.pairs import count_tile, times_computed

LAYOUTS = ("auto", "contiguous", "zigzag", "striped")
sides = st.one_of(st.none(), st.integers(0, 80))
configs = st.builds(
    StandardConfig,
    causal=st.booleans(),
    window=st.one_of(st.none(), st.tuples(sides, sides)),
    layout=st.sampled_from(LAYOUTS),
)
branches = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 7)), min_size=1, max_size=3
).filter(len)
dilated = st.builds(
    lambda causal, window, layout, branches: StandardConfig(
        causal=causal,
        window=window,
        layout=layout,
        segment_lengths=[w for w, _ in branches],
        dilation_rates=[r for _, r in branches],
    ),
    st.booleans(),
    st.one_of(st.none(), st.none(), st.tuples(sides, sides)),
    st.sampled_from(LAYOUTS),
    branches,
)


@st.composite
def sequence_arguments(draw, kinds=("plain", "packed", "padded", "cross", "packed cross")):
    """Arguments of plan(): plain, packed, padded or cross, up to 150 tokens."""
    kind = draw(st.sampled_from(kinds))
    length = draw(st.integers(1, 150))
    if kind == "plain":
        return {"seq_len": length}
    if kind == "padded":
        return {
            "seq_len": length,
            "lengths": draw(st.lists(st.integers(0, length), min_size=1, max_size=4)),
        }
    if kind == "cross":
        return {"seq_len": length, "kv_len": draw(st.integers(1, 150))}
    documents = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
    arguments = {"cu_seqlens": _ends(documents)}
    if kind == "packed cross":
        keys = st.lists(
            st.integers(0, 40), min_size=len(documents), max_size=len(documents)
        ).filter(any)
        arguments["kv_cu_seqlens"] = _ends(draw(keys))
    return arguments


def _ends(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def _definition(config, sequences, arguments, kv_heads=1):
    """How often pairs count, by the reference: int32 [batch, kv_heads, q_len, kv_len]."""
    seen = reference.visible(
        sequences.q_len,
        sequences.kv_len,
        causal=config.causal,
        window=config.window,
        cu_seqlens=arguments.get("cu_seqlens"),
        kv_cu_seqlens=arguments.get("kv_cu_seqlens"),
    )
    lengths = arguments.get("lengths")
    seen = seen[None, None] if lengths is None else reference.within_lengths(seen, lengths)
    if config.segment_lengths is not None:
        seen = seen * reference.dilated(
            sequences.q_len,
            kv_heads,
            config.segment_lengths,
            config.dilation_rates,
            cu_seqlens=arguments.get("cu_seqlens"),
        )
    return seen.expand(-1, kv_heads, -1, -1).int()


def _nothing(sequences, kv_heads):
    """Of no pair: int32 [batch, kv_heads, q_len, kv_len]."""
    shape = sequences.batch, kv_heads, sequences.q_len, sequences.kv_len
    return torch.zeros(shape, dtype=torch.int32)


def _computed(plan, sequences, kv_heads=1):
    """How often the plan's tiles compute each pair: int32 [batch, kv_heads, q_len, kv_len]."""
    for rank, owner in product(range(plan.world), repeat=2):
        for tile in plan.tiles(rank, owner):
            seen = tile.mask.visible(range(tile.q.count), tile.kv.count)
            assert int(seen.sum()) * tile.q.repeat == tile.pairs
            assert seen.any(0).all(), "a key that nobody sees stands in the tile"
            assert seen.any(1).all(), "a query that sees nothing stands in the tile"
    return times_computed(plan, sequences.batch, kv_heads)


@given(configs, sequence_arguments(), st.integers(1, 40))
def test_every_visible_pair_is_computed_exactly_once(config, arguments, world):
    sequences = Sequences.build(**arguments)
    plan = plan_branches(config, sequences, world)
    assert torch.equal(_computed(plan, sequences), _definition(config, sequences, arguments))


NOT_CROSS = ("plain", "packed", "padded")


@given(dilated, sequence_arguments(NOT_CROSS), st.integers(1, 20), st.integers(1, 8))
def test_every_kept_pair_is_computed_as_often_as_branches_keep_it(
    config, arguments, world, kv_heads
):
    sequences = Sequences.build(**arguments)
    plan = plan_branches(config, sequences, world)
    expected = _definition(config, sequences, arguments, kv_heads)
    assert torch.equal(_computed(plan, sequences, kv_heads), expected)


@st.composite
def planned(draw, most):
    """A config with sequences that it can be planned for, and up to ``most`` ranks."""
    if draw(st.booleans()):
        return draw(configs), draw(sequence_arguments()), draw(st.integers(1, most))
    sequences = draw(sequence_arguments(NOT_CROSS))
    return draw(dilated), sequences, draw(st.integers(1, min(most, 12)))


@given(planned(40))
def test_every_send_has_its_receive_and_fits_in_one_shard(asked):
    config, arguments, world = asked
    plan = plan_branches(config, Sequences.build(**arguments), world)
    each = [{one.index: one for one in rounds(plan, rank, 1)} for rank in range(world)]
    for rank in range(world):
        for index, one in each[rank].items():
            assert len(one.steps) == (index != 0)
            for step in one.steps:
                assert bool(one.tiles) == bool(step.parts)
                if step.parts:
                    assert each[step.source][index].steps[0].requester == rank
                    assert each[step.source][index].steps[0].give == step.parts
                if step.give:
                    assert each[step.requester][index].steps[0].parts == step.give
                branches = len(config.segment_lengths or [1])
                rows = sum(len(part.rows) * plan.share(part.heads) for part in step.parts)
                assert rows <= branches * plan.keys.size


@given(planned(9), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_rounds_compute_each_pair_once_from_rows_that_were_fetched(asked, shards, waits):
    """Whatever shares a round: pairs by the global tokens that stand in its blocks."""
    config, arguments, world = asked
    sequences = Sequences.build(**arguments)
    plan = ForHeads.of(plan_branches(config, sequences, world), KV_HEADS)
    times = _nothing(sequences, KV_HEADS)
    for rank in range(world):
        own = plan.queries.positions(rank)
        mine = rounds(plan, rank, shards, waits)
        held = []
        for one in mine:
            blocks = [plan.keys.positions(rank)] if one.index == 0 else _blocks(plan, one)
            held.append(_held(one))
            for tile in one.tiles:
                count_tile(times, tile, own, blocks[tile.block])
            for step in one.steps:
                theirs = rounds(plan, step.requester, shards, waits)
                asked = [s for o in theirs for s in o.steps if s.offset == step.offset]
                assert [s.parts for s in asked] == [step.give] or not (asked or step.give)
        if shards > 1:
            first = rounds(plan, 0, shards, waits)
            assert [one.index for one in mine] == [one.index for one in first]
            most = max(a + b for a, b in zip(held, [*held[1:], 0], strict=True))
            branches = len(config.segment_lengths or [1])
            # two rounds at a time, of one shard for each branch at least; the rank's own may come
            assert most <= (max(shards, 2 * branches) + 1) * plan.keys.size
    assert torch.equal(times, _definition(config, sequences, arguments, KV_HEADS))


KV_HEADS = 3
"""Of plans that are made ready for a kernel."""


def _held(one):
    """Rows of all blocks of a round, as if of all heads."""
    return sum(block.rows * block.heads.count(KV_HEADS) / KV_HEADS for block in one.blocks)


@given(
    planned(5),
    st.sampled_from([1, 3]),
    st.sampled_from([CpuFlash(), CudaFlash(), Cudnn(), Flash4()]),
)
def test_what_kernels_make_of_tiles_computes_each_pair_once(asked, shards, kernel):
    """Cut and joined."""
    config, arguments, world = asked
    sequences = Sequences.build(**arguments)
    plan = plan_branches(config, sequences, world)
    times = _nothing(sequences, KV_HEADS)
    for rank in range(world):
        own = plan.queries.positions(rank)
        program = Program.build(plan, rank, kernel, shards, kv_heads=KV_HEADS)
        for one in program.rounds:
            blocks = _blocks(plan, one) if one.index else [plan.keys.positions(rank)]
            for tile in one.tiles:
                count_tile(times, tile, own, blocks[tile.block])
    assert torch.equal(times, _definition(config, sequences, arguments, KV_HEADS))


def test_packed_documents_are_few_calls():
    """Twelve documents on four ranks, with a kernel that takes sequences of different lengths."""
    sizes = (7, 2, 11, 4, 9, 1, 12, 5, 3, 10, 6, 8)
    ends = [64 * sum(sizes[:i]) for i in range(13)]
    plan = plan_branches(StandardConfig(causal=True), Sequences.build(cu_seqlens=ends), 4)
    for rank in range(4):
        assert sum(len(one.tiles) for one in rounds(plan, rank, 3)) > 8
        for kernel in (Flash4(), CudaFlash()):
            program = Program.build(plan, rank, kernel, 3)
            own, fetched = program.rounds
            assert len(own.tiles) == 1
            assert len(fetched.tiles) <= 3  # some rows see two runs of keys
            assert all(step.rounded for step in program.rounds[1].steps)


def test_what_is_hashed_once_is_hashed_anew_in_another_process():
    """Hashes of None are of one process."""
    runs = Segments.of([range(4), range(6, 7), range(9, 15, 2)])
    pieces = Diagonal(((range(3), range(4), Band(None, 1)), (range(3, 5), range(6, 7), Band())))
    for one in (runs, replace(runs, step=1), pieces):
        again = pickle.loads(pickle.dumps(one))
        assert again == one == deepcopy(one)
        assert hash(again) == hash(one) == hash(deepcopy(one))
        assert "_hash" not in repr(one), "ranks compare plans by their text"
        assert one.__reduce__()[1][-1] is (one.runs if one is not pieces else one.pieces)


def _blocks(plan, one):
    """Global tokens of a round's blocks, by phase, from where each part says that it stands."""
    blocks = [torch.full((block.heads.phases, block.rows), -1) for block in one.blocks]
    for step in one.steps:
        held = plan.keys.positions(step.source)
        for part in step.parts:
            for phase, block in enumerate(blocks[part.block]):
                rows = part.rows.of_phases(range(phase, phase + 1))
                target = block[part.row : part.row + len(part.rows)]
                assert (target == -1).all()
                target[:] = held[rows.indices()]
    assert all((block >= 0).all() for block in blocks)
    return blocks


@given(configs, sequence_arguments(), st.integers(1, 64))
def test_a_plan_is_a_small_value(config, arguments, world):
    """Equal, hashable, and the same text wherever it is made: ranks compare it by digest."""
    first, second = (plan_branches(config, Sequences.build(**arguments), world) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert repr(first) == repr(second)


@given(st.integers(1, 64), st.integers(1, 5000), st.sampled_from([contiguous, zigzag, striped]))
def test_a_layout_gives_every_token_to_one_rank(world, length, make):
    layout = make(length, world)
    held = torch.cat([layout.positions(rank) for rank in range(world)])
    assert torch.equal(held[held >= 0].sort().values, torch.arange(length))
    assert len(held) == layout.size * world
    assert layout.size <= -(-length // world) + 1


@given(st.integers(1, 40), st.integers(64, 10**6), st.sampled_from(["auto", "zigzag", "striped"]))
def test_long_causal_sequences_are_balanced(world, per_rank, layout):
    plan = plan_branches(
        StandardConfig(causal=True, layout=layout), Sequences.build(per_rank * world), world
    )
    assert plan.imbalance() <= 1.1


@given(
    st.integers(2, 16),
    st.lists(st.integers(1, 20000), min_size=1, max_size=12).filter(lambda d: sum(d) > 10000),
)
def test_packed_causal_documents_are_balanced(world, documents):
    """Equal runs dealt by work: never far worse than contiguous shards, and close to even."""
    sequences = Sequences.build(cu_seqlens=_ends(documents))
    balanced = plan_branches(StandardConfig(causal=True), sequences, world)
    naive = plan_branches(StandardConfig(causal=True, layout="contiguous"), sequences, world)
    assert balanced.imbalance() <= max(1.25, naive.imbalance())


@pytest.mark.parametrize("lengths", [[4096] + [300] * 30, [4096] * 3 + [2000] * 9, [1000, 4096]])
def test_padded_causal_batches_are_balanced(lengths):
    sequences = Sequences.build(max(lengths), lengths=lengths)
    plan = plan_branches(StandardConfig(causal=True), sequences, 8)
    assert plan.imbalance(sequences.batch) <= 1.05


@given(planned(8))
def test_layouts_are_chosen_by_what_plans_compute(asked):
    """The work of a rank's runs, as far as it is counted for the mean of all phases."""
    config, arguments, world = asked
    sequences = Sequences.build(**arguments)
    plan = plan_branches(config, sequences, world)
    if config.layout == "striped" or max(config.dilation_rates or [1]) > 1:
        return
    for rank in range(world):
        counted = sum(
            _work(run, sequences, plan.band, plan.branches) for run in plan.queries.rows[rank]
        )
        assert counted == plan.work(rank, sequences.batch)


def test_a_billion_tokens_are_planned_in_closed_form():
    length, world = 10**9, 64
    plan = plan_branches(StandardConfig(causal=True), Sequences.build(length), world)
    assert sum(plan.work(rank) for rank in range(world)) == length * (length + 1) // 2
    assert plan.imbalance() < 1.0001


@pytest.mark.parametrize("world", [2, 4, 8])
def test_zigzag_is_one_kernel_call_a_step(world):
    """Adjacent tiles are merged: the own chunks are one triangle, each hop one rectangle."""
    plan = plan_branches(
        StandardConfig(causal=True, layout="zigzag"), Sequences.build(64 * world), world
    )
    for rank in range(world):
        assert [len(one.tiles) for one in rounds(plan, rank, 1)] == [1] * world


def test_four_zigzag_ranks_make_at_most_three_calls():
    """The own triangle; all rows with what earlier ranks have; late rows with the later ones'."""
    plan = plan_branches(StandardConfig(causal=True, layout="zigzag"), Sequences.build(256), 4)
    calls = [[(len(t.q), len(t.kv)) for o in rounds(plan, r, 3) for t in o.tiles] for r in range(4)]
    assert calls == [
        [(64, 64), (32, 192)],
        [(64, 64), (64, 32), (32, 128)],
        [(64, 64), (64, 64), (32, 64)],
        [(64, 64), (64, 96)],
    ]


def test_where_all_see_all_a_quarter_of_the_queries_makes_one_call():
    plan = plan_branches(StandardConfig(), Sequences.build(256), 4)
    for rank in range(4):
        own, fetched = rounds(plan, rank, 3, waits=True)
        assert [(len(t.q), len(t.kv)) for t in own.tiles] == [(48, 64)]
        assert [(len(t.q), len(t.kv)) for t in fetched.tiles] == [(48, 192), (16, 256)]
        assert [step.source for step in fetched.steps] == [
            *((rank - t) % 4 for t in (1, 2, 3)),
            rank,
        ]


def test_zigzag_fetches_only_what_it_needs():
    """Later ranks need only the first chunk of an earlier one: 3/4 of all rows travel."""
    world, length = 4, 512
    plan = plan_branches(
        StandardConfig(causal=True, layout="zigzag"), Sequences.build(length), world
    )
    sent = sum(elements_sent(plan, rank, kv_heads=1) for rank in range(world))
    assert sent == 0.75 * length * (world - 1)


def test_a_window_fetches_only_its_halo():
    world, length, left = 8, 800, 30
    plan = plan_branches(
        StandardConfig(causal=True, window=(left, 0)), Sequences.build(length), world
    )
    assert [len(run) for run in plan.queries.rows] == [1] * world
    for rank in range(world):
        assert elements_sent(plan, rank, kv_heads=1) == (left if rank < world - 1 else 0)
        assert len(rounds(plan, rank, 1)) <= 3


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(-50, 50)),
    st.one_of(st.none(), st.integers(-50, 50)),
)
def test_trim_and_count_agree_with_the_definition(nq, nk, lo, hi):
    band = Band(lo, hi)
    seen = band.visible(range(nq), nk)
    assert band.count(nq, nk) == int(seen.sum())
    trimmed = trim(nq, nk, band)
    if trimmed is None:
        assert not seen.any()
        return
    q, k, inner = trimmed
    assert torch.equal(seen.any(1).nonzero().flatten(), torch.arange(q.start, q.stop))
    assert torch.equal(seen.any(0).nonzero().flatten(), torch.arange(k.start, k.stop))
    assert torch.equal(
        inner.visible(range(len(q)), len(k)), seen[q.start : q.stop, k.start : k.stop]
    )
    assert trim(len(q), len(k), inner) == (range(len(q)), range(len(k)), inner)

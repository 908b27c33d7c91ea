"""Patterns against their definitions: tables, density, plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_attention_blocksparse import BlockSparseRingAttention
from ring_attention_blocksparse import reference as by_definition
from ring_attention_blocksparse.mask import join
from ring_attention_blocksparse.pairs import active

from by_definition import defined
from ring_core import reference, registry
from ring_core.errors import ConfigError
from ring_core.plan import ForHeads
from ring_core.rounds import elements_fetched, elements_sent, rounds
from ring_core.sequences import Sequences

DOCS = Path(__file__).parent.parent / "docs" / "blocksparse.md"

# Every kind, in any mixture


def numbers(low, high):
    return st.integers(low, high)


@st.composite
def grids(draw):
    """A grid, and so a length."""
    return tuple(draw(st.lists(numbers(1, 7), min_size=1, max_size=3)))


@st.composite
def problems(draw):
    """Fields, a length, the ends of documents, KV heads."""
    kv_heads = draw(numbers(1, 3))
    grid = draw(grids())
    length = draw(st.sampled_from([1, 5, 37, 64, None]))
    block_q, block_kv = draw(st.sampled_from([(4, 4), (8, 4), (4, 8), (5, 3), (1, 16)]))
    if length is None:
        length = torch.Size(grid).numel()
    blocks = -(-length // block_q), -(-length // block_kv)
    kinds = [
        st.builds(
            lambda a, b: {"kind": "local", "left": a, "right": b}, numbers(0, 12), numbers(0, 9)
        ),
        st.builds(lambda n: {"kind": "sink", "n": n}, numbers(1, 9)),
        st.builds(
            lambda ids: {"kind": "global_tokens", "ids": ids},
            st.lists(numbers(0, 50), min_size=1, max_size=3),
        ),
        st.builds(lambda n: {"kind": "strided", "stride": n}, numbers(1, 30)),
        st.builds(
            lambda w, r: {"kind": "dilated", "window": w, "rate": r}, numbers(0, 4), numbers(1, 14)
        ),
        st.builds(
            lambda n, seed: {"kind": "random", "blocks": n, "seed": seed},
            numbers(1, 5),
            st.integers().filter(lambda seed: abs(seed) < 2**62),
        ),
        st.builds(lambda seed: {"kind": "blocks", "table": _table(seed, *blocks)}, numbers(0, 99)),
        st.builds(
            lambda seed: {
                "kind": "blocks",
                "table": [_table(seed + h, *blocks) for h in range(kv_heads)],
            },
            numbers(0, 99),
        ),
        st.builds(lambda n: {"kind": "topk", "blocks": n}, numbers(1, 4)),
    ]
    if length == torch.Size(grid).numel():
        kinds += [
            st.builds(
                lambda r: {"kind": "neighborhood", "grid": grid, "radius": r},
                st.one_of(numbers(0, 3), st.tuples(*[numbers(0, 3)] * len(grid))),
            ),
            st.builds(
                lambda shape, shift: {
                    "kind": "window_blocks",
                    "grid": grid,
                    "shape": shape,
                    "shift": shift,
                },
                st.tuples(*[numbers(1, 4)] * len(grid)),
                st.one_of(numbers(0, 3), st.tuples(*[numbers(0, 3)] * len(grid))),
            ),
        ]
    heads = st.one_of(
        st.none(), st.lists(numbers(0, kv_heads - 1), min_size=1, max_size=2, unique=True)
    )
    patterns = [
        {**pattern, "heads": draw(heads)}
        for pattern in draw(st.lists(st.one_of(kinds), min_size=1, max_size=3))
    ]
    ends = sorted({0, length, *draw(st.lists(numbers(1, length), max_size=3))})
    fields = {
        "patterns": patterns,
        "block_q": block_q,
        "block_kv": block_kv,
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, (7, None), (3, 11)])),
        "layout": draw(st.sampled_from(["auto", "auto", "contiguous", "zigzag", "striped"])),
    }
    return fields, length, ends, kv_heads


def _table(seed, rows, columns):
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3).tolist()


@given(problems())
@settings(max_examples=120)
def test_one_rank_attends_to_what_is_defined(problem):
    fields, length, ends, kv_heads = problem
    attention = BlockSparseRingAttention(**{**fields, "layout": "auto"})
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, length, heads, 4, dtype=torch.float64, generator=generator)
        for heads in (2 * kv_heads, kv_heads, kv_heads)
    )
    plan = attention.plan(cu_seqlens=ends)
    out, lse = attention(q, k, v, plan=plan, return_lse=True)
    shown, mask = defined(attention.config, length, ends, kv_heads, q[0], k[0])
    expected, expected_lse = reference.attention(q, k, v, shown.repeat_interleave(2, dim=0))
    assert torch.allclose(out, expected, atol=1e-12, rtol=0)
    assert torch.allclose(lse, expected_lse, atol=1e-12, rtol=0)
    blocks = attention.config.block_q, attention.config.block_kv
    assert attention.density == pytest.approx(by_definition.density(shown, mask, *blocks))
    bound = plan.plan.for_heads(kv_heads)
    known = {pattern.kind for pattern in attention.config.patterns}
    if len(ends) == 2 and known <= {"local", "sink", "strided", "dilated"}:
        padded = attention.plan(length + 9, lengths=[length]).plan.for_heads(kv_heads)
        assert padded.density() == pytest.approx(bound.density())  # what is behind is not counted
    if any(pattern.chosen for pattern in attention.config.patterns):
        assert bound.density() >= attention.density - 1e-12
    else:
        assert bound.density() == pytest.approx(attention.density)


def test_heads_that_patterns_name():
    """Before their number is known: those that are named, and all others as one where they see."""
    everything = {"kind": "local", "left": 10**6, "right": 10**6}

    def plan(*patterns):
        return registry.create("blocksparse", patterns=patterns).plan(512).plan

    diagonal = {"kind": "local", "left": 0, "right": 0}
    assert plan({**everything, "heads": [0]}).density() == 1
    both = plan({**everything, "heads": [0]}, {**diagonal, "heads": [1]})
    assert both.density() == both.for_heads(2).density() == (16 + 4) / 32
    assert both.for_heads(4).density() == (16 + 4) / 64
    assert plan({**everything, "heads": [0]}, diagonal).density() == (16 + 4) / 32
    assert both.cells(0, 0, 8, 512).all()  # what any head sees
    tables = [{"kind": "blocks", "table": [[[True]]] * heads} for heads in (2, 3)]
    with pytest.raises(ConfigError, match="patterns are for 2 and 3 KV heads"):
        plan(*tables)
    with pytest.raises(ConfigError, match=r"heads=\[5\], and there are 2 KV heads"):
        plan({**tables[0], "heads": [5]})


@given(problems(), st.integers(1, 8), st.sampled_from([1, 1.5, 3]))
@settings(max_examples=100)
def test_every_shown_pair_is_computed_once_by_the_rank_that_holds_it(problem, world, shards):
    fields, length, ends, kv_heads = problem
    fields["patterns"] = [one for one in fields["patterns"] if one["kind"] != "topk"]
    if not fields["patterns"]:
        fields["patterns"] = [{"kind": "strided", "stride": 3}]
    attention = BlockSparseRingAttention(**fields)
    plan = ForHeads.of(attention.make_plan(Sequences.build(cu_seqlens=ends), world), kv_heads)
    shown, _ = defined(attention.config, length, ends, kv_heads)
    times = torch.zeros(kv_heads, length, length, dtype=torch.int64)
    for rank in range(world):
        mine = plan.queries.positions(rank)
        assert elements_sent(plan, rank, kv_heads) <= kv_heads * length * (world - 1)
        for one in rounds(plan, rank, shards):
            for tile in join(one.tiles):
                check_cost(tile.mask)
                theirs = plan.keys.positions(rank)
                if one.index:
                    block = one.blocks[tile.block]
                    theirs = torch.cat(
                        [
                            plan.keys.positions(one.steps[place].source)[
                                one.steps[place].parts[part].rows.indices()
                            ]
                            for place, part in block.parts
                        ]
                    )
                heads = range(kv_heads)[tile.heads.start :][: tile.heads.count(kv_heads)]
                seen = tile.mask.visible(range(tile.q.count), tile.kv.count)[0, :, 0].long()
                i = mine[tile.q.indices()][:, None]
                j = theirs[tile.kv.indices()][None, :]
                for n, head in enumerate(heads):
                    part = seen[n if len(seen) > 1 else 0]
                    x, y = part.nonzero(as_tuple=True)
                    times[head].index_put_(
                        (i.expand_as(part)[x, y], j.expand_as(part)[x, y]),
                        torch.ones_like(x),
                        accumulate=True,
                    )
    assert torch.equal(times, shown.long())
    # Each send has its receive.
    sent = sum(elements_sent(plan, rank, kv_heads) for rank in range(world))
    fetched = [elements_fetched(plan, rank, kv_heads) for rank in range(world)]
    assert sent == sum(fetched)
    assert plan.whole.fetched() == max(fetched) / kv_heads
    for rank in range(world):
        for one in rounds(plan, rank, 1)[1:]:
            (step,) = one.steps
            there = [x for x in rounds(plan, step.requester, 1) if x.index == one.index]
            assert step.give == (there[0].steps[0].parts if there else ())


def check_cost(mask):
    """What a prediction counts without tables is what they hold, in whole blocks; a part of a block
    may see nothing of what the block sees."""
    tables, area = mask.tables(torch.device("cpu")), 0
    for head in mask.heads if tables.heads > 1 else mask.heads[:1]:
        known = active(mask.scene, mask.patterns, head)
        for i in range(mask.scene.query_blocks):
            rows = int(tables.q.size[tables.q.block == i].sum())
            for j in known.block[known.start[i] : known.start[i + 1]].tolist():
                area += rows * int(tables.kv.size[tables.kv.block == j].sum())
    name, counted = mask.cost(tables.q.total, tables.kv.total)
    assert counted == area // tables.heads
    assert counted >= tables.area() // tables.heads
    assert ("unmasked" in name) <= (not len(tables.bits))


def test_random_blocks_are_distinct_visible_and_of_all_places():
    attention = BlockSparseRingAttention(
        patterns=[{"kind": "random", "blocks": 3}], block_q=1, block_kv=1, causal=True
    )
    shown, _ = defined(attention.config, 200, [0, 200], 4)
    count = shown.sum(-1)
    assert torch.equal(count, torch.arange(1, 201).clamp_max(3).expand(4, -1))
    assert not torch.equal(shown[0], shown[1])
    early = shown[:, 100:, :50].sum() / shown[:, 100:].sum()
    assert 0.27 < early < 0.41  # a third, were they drawn evenly: log(2) / 2


# At length


def planned(length, world=4, **fields):
    attention = BlockSparseRingAttention(**fields)
    return attention.make_plan(Sequences.build(length), world)


def test_a_million_tokens_take_tables_of_the_active_blocks_alone():
    fields = {"patterns": [{"kind": "local", "left": 2048, "right": 0}], "causal": True}
    pairs = []
    for length in (1 << 18, 1 << 19):
        plan = planned(length, **fields)
        assert plan.imbalance() < 1.05
        found = 0
        for one in rounds(ForHeads.of(plan, 8), 1, 1):
            for tile in one.tiles:
                tables = tile.mask.tables(torch.device("cpu"))
                found += len(tables.by_query.other)
                assert len(tables.bits) <= 2  # the window's two edges, however many blocks
        pairs.append(found)
    assert pairs == [512 * 17, 1024 * 17]  # a block, and 2048 tokens before it


@pytest.mark.parametrize(
    "patterns",
    [
        [{"kind": "local", "left": 4096, "right": 0}],
        [{"kind": "sink", "n": 64}, {"kind": "local", "left": 4096, "right": 0}],
        [{"kind": "strided", "stride": 1024}, {"kind": "local", "left": 256, "right": 0}],
        [{"kind": "random", "blocks": 16}],
        [
            {"kind": "global_tokens", "ids": [0, 1, 50_000]},
            {"kind": "local", "left": 2048, "right": 0},
        ],
    ],
)
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("length", [1 << 17, 100_003])
def test_causal_work_is_balanced(patterns, world, length):
    assert planned(length, world, patterns=patterns, causal=True).imbalance() <= 1.1


def test_the_ring_stops_behind_the_last_needed_hop():
    plan = planned(1 << 16, 8, patterns=[{"kind": "local", "left": 300, "right": 0}], causal=True)
    plan = ForHeads.of(plan, 2)
    for rank in range(8):
        assert [one.index for one in rounds(plan, rank, 1)] == [0, 1]
        assert elements_fetched(plan, rank, 2) == (2 * 384 if rank else 0)  # three blocks


def test_few_blocks_of_a_peer_travel_packed_and_neighbours_as_they_lie():
    table = torch.eye(64, dtype=torch.bool)
    table[0, [33, 41, 60]] = True
    table[1, [18, 19, 20, 22, 23, 24, 25]] = True
    fields = {"patterns": [{"kind": "blocks", "table": table}], "block_q": 16, "block_kv": 16}
    plan = ForHeads.of(planned(1024, 4, layout="contiguous", **fields), 1)
    parts = {
        step.source: [part.rows for part in step.parts]
        for one in rounds(plan, 0, 1)[1:]
        for step in one.steps
    }
    assert {source: [len(rows) for rows in found] for source, found in parts.items()} == {
        1: [128],  # one block between them is not needed, and not worth a copy
        2: [32],
        3: [16],
    }
    assert parts[2][0].indices() == [*range(16, 32), *range(144, 160)]


def test_tiles_that_share_keys_are_not_joined():
    """Two far-apart runs of queries see one owner's block, and all see another owner's."""
    table = torch.eye(48, dtype=torch.bool)
    table[32:, 0] = True
    table[32:41, 16] = table[46:, 16] = True
    fields = {"patterns": [{"kind": "blocks", "table": table}], "block_q": 4, "block_kv": 4}
    plan = ForHeads.of(planned(192, 3, layout="contiguous", **fields), 1)
    for shards in (1, 3):
        found = [tile for one in rounds(plan, 2, shards) for tile in join(one.tiles)]
        assert sum(tile.mask.count(tile.q.count, tile.kv.count) for tile in found) == 16 * (
            int(table[32:].sum())
        )

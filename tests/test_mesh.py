"""What a mesh is made of: heads dealt out, rows put together, and the degree that is predicted."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ring_attention_distributed.cost import with_exchange
from ring_attention_distributed.heads import Split, degrees
from ring_attention_distributed.mesh import Mesh, Places, ring_plan

from ring_core import registry
from ring_core.errors import InputError
from ring_core.plan import ForHeads, HeldHeads
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import read
from ring_core.prediction.timeline import Where
from ring_core.sequences import Sequences
from ring_core.testing import RankPool, Worker

BLOCKS = {
    "variant": "blocksparse",
    "patterns": (
        {"kind": "local", "left": 6, "right": 2, "heads": [0]},
        {"kind": "random", "blocks": 1, "seed": 3},
        {"kind": "sink", "n": 2, "heads": [1]},
    ),
    "block_q": 4,
    "block_kv": 8,
}


# Heads


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 16))
def test_heads_are_dealt_out_once_and_evenly(kv_heads, group, degree):
    heads = kv_heads * group
    if Split.refuse(heads, kv_heads, degree):
        assert degree not in list(degrees(heads, kv_heads, degree))
        return
    split = Split.of(heads, kv_heads, degree)
    assert [h for run in split.q for h in run] == list(range(heads))
    for place in range(degree):
        held = split.held(place)
        each, rest = divmod(len(split.q[place]), len(held.kv))
        assert rest == 0
        served = [held.kv.start + n // each for n in range(len(split.q[place]))]
        assert served == [h // group for h in split.q[place]]
        assert held.first_query == split.q[place].start
    if degree <= kv_heads:
        assert max(map(len, split.kv)) - min(map(len, split.kv)) <= 1
    else:
        assert len({len(run) for run in split.q}) == 1
        assert split.shares


@given(
    st.sampled_from(["dense", "dilated", "blocks"]),
    st.integers(1, 4),
    st.integers(2, 6),
    st.data(),
)
def test_what_some_heads_compute_is_theirs_of_the_whole(kind, world, kv_heads, data):
    start = data.draw(st.integers(0, kv_heads - 1))
    held = range(start, data.draw(st.integers(start + 1, kv_heads)))
    fields = {
        "dense": {"causal": True},
        "dilated": {"segment_lengths": (8, 24), "dilation_rates": (2, 5)},
        "blocks": BLOCKS,
    }[kind]
    plan = registry.create(fields).make_plan(Sequences.build(31), world)
    some = ForHeads.of(plan, len(held), held=HeldHeads(held, kv_heads, 0))
    assert torch.equal(
        computed(some, len(held)),
        computed(ForHeads.of(plan, kv_heads), kv_heads)[held.start : held.stop],
    )


def computed(plan: ForHeads, kv_heads: int) -> torch.Tensor:
    """How often each pair is computed: [kv_heads, S, S]."""
    times = torch.zeros(kv_heads, plan.queries.length, plan.queries.length, dtype=torch.int32)
    for rank in range(plan.world):
        own = plan.queries.positions(rank)
        for owner in range(plan.world):
            theirs = plan.keys.positions(owner)
            for tile in plan.tiles(rank, owner):
                for phase in range(tile.heads.phases):
                    one = tile.only(range(phase, phase + 1))
                    seen = one.mask.visible(range(one.q.count), one.kv.count).int()
                    queries = own[one.q.indices()].view(one.q.repeat, -1)
                    keys = theirs[one.kv.indices()].view(one.kv.repeat, -1)
                    mine = one.heads.indices(kv_heads)
                    seen = seen if seen.ndim == 2 else seen[0, :, 0]
                    for i, j in zip(queries, keys, strict=True):
                        for n, head in enumerate(mine):
                            mask = seen if seen.ndim == 2 else seen[n if len(seen) > 1 else 0]
                            times[head, i[:, None], j] += mask
    return times


@given(
    st.sampled_from(["contiguous", "zigzag", "striped", "auto"]),
    st.integers(1, 50),
    st.sampled_from([(4, 2), (4, 4), (6, 3), (8, 2)]),
)
def test_a_ring_holds_what_its_ranks_brought(layout, length, mesh):
    world, degree = mesh
    plan = registry.create("standard", causal=True, layout=layout).make_plan(
        Sequences.build(length), world
    )
    ring = ring_plan(plan, degree)
    for rank in range(world):
        one = Mesh(world, degree, rank)
        together = ring.queries.positions(one.ring)
        shards = [plan.queries.positions(peer) for peer in one.peers]
        found = Places.of(shards, together)
        x = together.clamp_min(0)[None, :, None, None].double() + 1
        apart = found.end_to_end(x)[0, :, 0, 0].view(degree, -1)
        for place, positions in enumerate(shards):
            real = positions >= 0
            assert torch.equal(apart[place][real], positions[real].double() + 1)
            assert not apart[place][~real].any()
    if degree == world:
        assert ring.queries.rows == ((range(length),),)


# Which degree


def test_the_predicted_degree_is_the_quickest():
    """Few heads and long shards: rings; many heads and short shards: heads."""
    attention = registry.create("standard", causal=True, kernel="flash4")
    short, long = (attention.make_plan(Sequences.build(4 * n), 4) for n in (512, 65536))
    rates, sizes = read("h200"), Sizes(32, 8, 128, 128, 1, "bfloat16")

    def predicted(of, degree, per_host=4, sizes=sizes):
        where = Where(per_host, between=4e10)
        return with_exchange(of, sizes, rates, where, attention.candidates, degree)

    assert min((predicted(long, n).total, n) for n in (1, 2, 4))[1] == 1
    assert predicted(long, 1).forward.transfers < 0.1 * predicted(long, 1).forward.kernels
    far, near = predicted(short, 4, per_host=2), predicted(short, 4)
    assert far.forward.exchange > near.forward.exchange, "exchanges between hosts are slower"
    uneven = [predicted(long, n, sizes=Sizes(28, 7, 128, 128, 1, "bfloat16")) for n in (4, 1)]
    busiest = uneven[0].forward.kernels / uneven[1].forward.kernels
    assert busiest == pytest.approx(8 / 7, rel=0.1)


def asked(worker: Worker, ulysses: Any) -> str:
    attention = registry.create("distributed", ulysses=ulysses, group=worker.group)
    plan = attention.plan(12)
    q, k = torch.ones(1, 3, 6, 8), torch.ones(1, 3, 3, 8)
    attention(q, k, k, plan=plan)
    return "done"


@pytest.mark.parametrize(
    ("ulysses", "says"),
    [(3, "does not divide the 4 ranks"), (4, "4 ranks cannot share 3 KV heads evenly")],
)
def test_a_degree_that_is_not_possible_is_told_on_every_rank(cpu_pool: RankPool, ulysses, says):
    for error in cpu_pool.run(asked, ulysses, world=4, errors=True, fresh=True):
        assert isinstance(error, InputError)
        assert says in str(error)
        assert "Possible here: 1, 2" in str(error)


def logged(worker: Worker) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("ring_attention_distributed")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    asked(worker, "auto")
    logger.removeHandler(handler)
    return records


def test_auto_says_what_it_predicted(cpu_pool: RankPool):
    assert any("predicted" in line for line in cpu_pool.run(logged, world=4)[0])

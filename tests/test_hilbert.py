"""Attention along curves: equal to the definitions whatever the order, on grids and on folds."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ring_attention_blocksparse.grids import Neighborhood
from ring_attention_blocksparse.pairs import active
from ring_attention_blocksparse.patterns import GlobalTokens
from ring_attention_blocksparse.scene import Scene
from ring_attention_hilbert import curves
from ring_attention_hilbert.config import HilbertConfig
from ring_attention_hilbert.orders import GridOrder
from ring_attention_hilbert.planner import order_of
from torch import Tensor

import by_definition
from ring_core import registry
from ring_core.errors import ConfigError, InputError
from ring_core.masks import Band
from ring_core.rounds import elements_fetched
from ring_core.sequences import Sequences
from ring_core.testing import Case, Conformance, RankPool, Worker
from ring_core.testing.case import Result, expected_of, run_case

ORDERS = ("hilbert", "morton", "tile", "row")
SMALL = {"block_q": 4, "block_kv": 8}
NEAR = {"kind": "neighborhood", "radius": 1}


# Curves


def steps(cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """How far each cell is from the one before, along each axis."""
    return torch.stack(
        [
            (cells // math.prod(grid[axis + 1 :]) % size).diff().abs()
            for axis, size in enumerate(grid)
        ]
    )


@given(st.lists(st.integers(1, 19), min_size=2, max_size=3), st.sampled_from([1, 7, 64, 128]))
def test_every_curve_goes_through_every_cell_once(sizes, block):
    grid = tuple(sizes)
    for cells in (curves.hilbert(grid), curves.morton(grid), curves.tile(grid, block)):
        assert torch.equal(cells.sort().values, torch.arange(math.prod(grid)))


@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.booleans())
def test_the_hilbert_curve_goes_from_neighbour_to_neighbour(sizes, doubled):
    """Of odd sides some to one across a corner."""
    grid = tuple(2 * size for size in sizes) if doubled else tuple(sizes)
    moved = steps(curves.hilbert(grid), grid)
    assert (moved.amax(0) == 1).all()
    if doubled:
        assert (moved.sum(0) == 1).all()


def test_many_cells_are_walked_as_few_are():
    """Boxes that are alike are walked once."""
    for grid in ((130, 257), (31, 40, 37)):
        whole = curves.hilbert(grid)
        curves._ALIKE, many = 1 << 30, curves._ALIKE
        try:
            assert torch.equal(curves.hilbert(grid), whole)
        finally:
            curves._ALIKE = many


def test_morton_and_tiles_by_hand():
    assert curves.morton((2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert curves.morton((3, 3)).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert curves.tile((2, 4), 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert curves.tile((3, 3), 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


COUNTS = [
    ((256, 256), 7, 64, (37840, 8836, 8836)),
    ((128, 128), 7, 64, (7456, 2116, 2116)),
    ((16, 32, 32), 3, 64, (7400, 4840, 4840)),
    ((32, 64, 64), 7, 128, (113632, 55352, 61328)),
]


@pytest.mark.parametrize(("grid", "radius", "block", "counts"), COUNTS)
def test_active_blocks(grid, radius, block, counts):
    """In row-major, Morton and Hilbert order."""
    length, found = math.prod(grid), []
    for order in (None, *(GridOrder(curve, grid, 0, block) for curve in ("morton", "hilbert"))):
        scene = Scene(length, (range(length),), Band(), block, block, order)
        found.append(len(active(scene, (Neighborhood(grid=grid, radius=radius),), 0).block))
    assert tuple(found) == counts


# Results


def shown(case: Case) -> Tensor:
    config = HilbertConfig(**case.fields)
    order = order_of(config, config.order, case.q_len)
    return by_definition.shown(case, config, config.resolved(), order, config.prefix)


class TestHilbert(Conformance):
    variant = "hilbert"
    fields = (
        {"segment_length": 16, "order": "hilbert", "causal": True, **SMALL},
        {
            "order": "morton",
            "patterns": (
                {"kind": "local", "left": 6, "right": 2},
                {"kind": "random", "blocks": 1},
                {"kind": "topk", "blocks": 2, "heads": [0]},
            ),
            **SMALL,
        },
        {
            "segment_length": 8,
            "order": "hilbert",
            "segment_lengths": (8, 32),
            "dilation_rates": (1, 2),
            "causal": True,
            "layout": "zigzag",
        },
    )
    sequences: ClassVar = {
        name: Conformance.sequences[name] for name in ("odd", "one token", "packed batch", "padded")
    }
    half: ClassVar = {**Conformance.half, "seq_len": 256}
    test_without_a_plan = None  # shards are then of another order; see below

    def visible(self, case: Case) -> Tensor:
        return shown(case)

    def hidden(self, case: Case) -> Tensor:
        config = HilbertConfig(**case.fields)
        if not by_definition.chooses(config):
            return super().hidden(case)
        order = order_of(config, config.order, case.q_len)
        return by_definition.out_of_sight(case, config, order)


GRIDS = {
    "picture": {"grid": (6, 7), "patterns": (NEAR,)},
    "windows and a prefix": {
        "grid": (5, 7),
        "prefix": 3,
        "patterns": (
            {"kind": "window_blocks", "shape": (3, 2), "shift": 1, "heads": [1]},
            {**NEAR, "heads": [0]},
        ),
    },
    "causal video": {
        "grid": (3, 4, 5),
        "patterns": ({"kind": "neighborhood", "radius": (1, 1, 2)},),
        "causal": True,
    },
    "video, causal in time": {
        "grid": (4, 3, 5),
        "patterns": (
            {"kind": "neighborhood", "radius": (2, 1, 1), "causal_axes": (0,), "heads": [0]},
            {"kind": "neighborhood", "radius": 9, "causal_axes": (0,), "heads": [1]},
        ),
    },
    "other kinds": {
        "grid": (6, 7),
        "patterns": (
            {"kind": "local", "left": 2, "right": 1},
            {"kind": "sink", "n": 2},
            {"kind": "global_tokens", "ids": (30,)},
            {"kind": "strided", "stride": 13},
        ),
        "window": (20, None),
    },
    "dense": {"grid": (6, 7)},
    "dense and causal": {"grid": (6, 7), "causal": True},
    "dilated": {"grid": (6, 7), "segment_lengths": (8, 32), "dilation_rates": (1, 2)},
    "folded": {"segment_length": 16, "patterns": ({"kind": "local", "left": 9, "right": 0},)},
}


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("name", GRIDS)
def test_no_order_changes_the_result(cpu_pool: RankPool, name: str, world: int) -> None:
    fields = {**GRIDS[name], **SMALL}
    grid = fields.get("grid")
    length = math.prod(grid) + fields.get("prefix", 0) if grid else 43
    # In the largest world, where all eight ranks plan on few cores, each takes one order of four,
    # and in the one before it the three others.
    last = ORDERS[list(GRIDS).index(name) % 4]
    for order in {1: ORDERS, 3: [one for one in ORDERS if one != last], 8: [last]}[world]:
        case = Case("hilbert", {**fields, "order": order}, seq_len=length)
        expected = expected_of(case, shown(case))
        errors = cpu_pool.run(run_case, case, world=world)[0].errors(expected)
        assert all(error < 1e-10 for error in errors.values()), (order, errors)


@pytest.mark.parametrize("order", ["hilbert", "tile"])
@pytest.mark.parametrize(
    "sizes", [{"seq_len": 42, "lengths": (42, 11, 0), "batch": 3}, {"cu_seqlens": (0, 5, 30, 42)}]
)
def test_documents_and_padding_on_a_grid(cpu_pool: RankPool, sizes: Any, order: str) -> None:
    for name in ("picture", "dense and causal", "dilated"):
        fields = {**GRIDS[name], **SMALL, "order": order}
        case = Case("hilbert", fields, **sizes)
        result = cpu_pool.run(run_case, case, world=4)[0]
        errors = result.errors(expected_of(case, shown(case)))
        assert all(error < 1e-10 for error in errors.values()), (name, errors)


def of_neighbours(case: Case, grid: tuple[int, ...], radius: int, causal: bool) -> Result:
    """Attention from the definition, where a table of all pairs is too large: each query gathers
    its neighbours."""
    q, k, v, dout, dlse = (x.double() for x in case.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cells = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, len(grid))
    around = torch.tensor([*product(range(-radius, radius + 1), repeat=len(grid))])
    sizes = torch.tensor(grid)
    there = cells[:, None] + around
    inside = ((there >= 0) & (there < sizes)).all(-1)
    strides = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
    keys = (there.clamp_min(0).minimum(sizes - 1) * strides).sum(-1)
    if causal:
        inside &= keys <= torch.arange(len(cells))[:, None]
    group = case.heads // case.kv_heads
    outs, lses = [], []
    for head in range(case.heads):
        mine, theirs = q[0, :, head], k[0, :, head // group][keys]
        scores = torch.einsum("nd,nmd->nm", mine, theirs) / math.sqrt(case.head_dim)
        scores = scores.masked_fill(~inside, -torch.inf)
        lses.append(scores.logsumexp(1))
        outs.append(torch.einsum("nm,nmd->nd", scores.softmax(1), v[0, :, head // group][keys]))
    out, lse = torch.stack(outs, 1)[None], torch.stack(lses)[None]
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    return Result(out.detach(), lse.detach(), *gradients)


@pytest.mark.parametrize(
    ("grid", "radius", "world", "order", "causal"),
    [
        ((1, 90), 7, 2, "hilbert", False),
        ((37, 61), 3, 4, "hilbert", False),
        ((37, 61), 0, 3, "morton", False),
        ((29, 37), 1, 8, "auto", False),
        ((64, 64), 7, 4, "hilbert", False),
        ((64, 64), 3, 8, "tile", False),
        ((7, 9, 11), 1, 8, "hilbert", True),
        ((7, 9, 11), 3, 3, "morton", True),
        ((7, 9, 11), 7, 1, "tile", False),
        ((16, 32, 32), 1, 4, "hilbert", True),
    ],
)
def test_neighbourhoods(cpu_pool: RankPool, grid, radius, world, order, causal):
    fields = {
        "grid": grid,
        "patterns": ({"kind": "neighborhood", "radius": radius},),
        "order": order,
        "causal": causal,
        "block_q": 64,
        "block_kv": 64,
    }
    case = Case("hilbert", fields, seq_len=math.prod(grid), heads=2, kv_heads=1, head_dim=4)
    case = Case(**{**case.__dict__, "value_dim": 4})
    result = cpu_pool.run(run_case, case, world=world)[0]
    errors = result.errors(of_neighbours(case, grid, radius, causal))
    assert all(error < 1e-10 for error in errors.values()), errors


def test_the_curve_cuts_what_travels():
    """16 by 32 by 32 cells on 8 ranks: half the keys of the worst rank, as on paper."""
    fetched = {}
    for order in ("row", "hilbert"):
        attention = registry.create(
            "hilbert",
            grid=(16, 32, 32),
            patterns=[{"kind": "neighborhood", "radius": 3}],
            order=order,
            block_q=64,
            block_kv=64,
        )
        plan = attention.make_plan(Sequences.build(16 * 32 * 32), 8)
        fetched[order] = max(elements_fetched(plan, rank, 1) for rank in range(8)) / 16384
    assert fetched["hilbert"] < 0.55 * fetched["row"]


# What users see


def test_positions_are_the_tokens_and_blocks_of_a_curve_are_squares():
    attention = registry.create("hilbert", grid=(8, 8), prefix=2, order="hilbert", **SMALL)
    plan = attention.plan(66)
    positions = plan.positions
    assert positions[:2].tolist() == [0, 1]
    cells = positions[2:] - 2
    assert torch.equal(cells, curves.hilbert((8, 8)))
    quarter = cells[:16]
    assert sorted(quarter.tolist()) == [8 * y + x for y in range(4) for x in range(4)]
    x = torch.arange(66.0)[None]
    assert torch.equal(plan.shard(x)[0], positions.float())
    assert torch.equal(plan.unshard(plan.shard(x)), x)


def test_segments_are_folded_one_by_one():
    attention = registry.create("hilbert", segment_length=16, order="hilbert", **SMALL)
    positions = attention.plan(42).positions
    curve = curves.hilbert((4, 4))
    assert torch.equal(positions[:16], curve)
    assert torch.equal(positions[16:32], 16 + curve)
    tail = curves.hilbert((3, 4))
    assert torch.equal(positions[32:], 32 + tail[tail < 10])


@pytest.mark.parametrize("name", ["picture", "dense", "drawn"])
def test_a_call_without_a_plan_takes_tokens_as_they_come(name):
    q, k, v = (torch.randn(1, 42, 2, 8, dtype=torch.float64) for _ in range(3))
    drawn = {"grid": (6, 7), "patterns": [{"kind": "random", "blocks": 2}]}
    fields = {**(drawn if name == "drawn" else GRIDS[name]), **SMALL}
    curved = registry.create("hilbert", order="hilbert", **fields)
    plan = curved.plan(42)
    along = plan.unshard(curved(*(plan.shard(x) for x in (q, k, v)), plan=plan))
    assert (curved(q, k, v) - along).abs().max() < 1e-12


def without_a_plan(worker: Worker, fields: dict[str, Any]) -> float | str:
    """The difference to a call with a plan; or the error."""
    attention = registry.create("hilbert", group=worker.group, layout="contiguous", **fields)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 42, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    size = 42 // worker.world
    mine = slice(size * worker.rank, size * (worker.rank + 1))
    try:
        found = attention(*(x[:, mine] for x in whole))
    except InputError as error:
        return str(error)
    plan = attention.plan(42)
    along = plan.unshard(attention(*(plan.shard(x) for x in whole), plan=plan))
    return float((found - along[:, mine]).abs().max())


def test_shards_without_a_plan(cpu_pool: RankPool):
    fields = {**GRIDS["picture"], **SMALL, "order": "hilbert"}
    assert max(cpu_pool.run(without_a_plan, fields, world=3)) < 1e-12
    fields["patterns"] = [{"kind": "random", "blocks": 2}]
    assert max(cpu_pool.run(without_a_plan, {**fields, "order": "row"}, world=3)) < 1e-12
    for message in cpu_pool.run(without_a_plan, fields, world=3):
        assert "patterns of whole blocks along order='hilbert'" in message


def test_plans_whatever_the_default_device():
    fields = {"grid": (6, 7), "patterns": [NEAR], **SMALL}
    x = torch.randn(1, 42, 2, 8)
    for order in ORDERS:
        attention = registry.create("hilbert", order=order, **fields)
        with torch.device("meta"):
            plan = attention.plan(42)
            assert torch.equal(plan.unshard(plan.shard(x)), x)
            assert plan.plan.walk.cells.device.type == "cpu"


def test_blocks_of_a_prefix_are_known_to_be_whole():
    """And not looked at token by token: a long prefix costs little."""
    scene = Scene(
        64 + 1024, (range(1088),), Band(), 16, 16, GridOrder("hilbert", (32, 32), 64, 16), 64
    )
    tokens = GlobalTokens(ids=tuple(range(64)))
    reach = tokens.reach(scene, scene.blocks(torch.arange(68)), 0)
    assert reach.whole.all()
    assert len(torch.unique(reach.query * 68 + reach.block)) == 2 * 4 * 68 - 16


def test_auto_never_lets_the_world_change_what_is_drawn():
    """Where the cheapest order is another one in each world."""
    patterns = [{"kind": "random", "blocks": 1}, {**NEAR, "radius": 2}]
    fields = {"grid": (12, 20), "block_q": 8, "block_kv": 8}
    attention = registry.create("hilbert", patterns=patterns, **fields)
    plans = [attention.make_plan(Sequences.build(240), world) for world in (1, 2, 3, 8)]
    cheapest = {min(plan.weighed, key=lambda one: one.cost).name for plan in plans}
    assert len(cheapest) > 2
    assert len({plan.order_name for plan in plans}) == 1


def test_auto_takes_the_cheapest_and_says_so(caplog):
    def chosen(world: int = 8, **fields: Any) -> str:
        attention = registry.create("hilbert", block_q=64, block_kv=64, **fields)
        length = math.prod(fields["grid"]) if "grid" in fields else 4096
        return attention.make_plan(Sequences.build(length), world).order_name

    assert chosen(grid=(128, 128), patterns=[{"kind": "neighborhood", "radius": 7}]) != "row"
    assert chosen(patterns=[{"kind": "local", "left": 128, "right": 128}]) == "row"
    with caplog.at_level("INFO"):
        attention = registry.create("hilbert")
        attention.plan(50)
    assert "dense" in caplog.text
    assert torch.equal(attention.plan(50).positions, torch.arange(50))


def test_the_preset_runs():
    attention = registry.create_from_preset("hilbert_optimized", causal=True, order="hilbert")
    assert attention.config.segment_length == 2048
    standard = registry.create(
        "standard", segment_lengths=(2048, 4096, 8192), dilation_rates=(1, 2, 4), causal=True
    )
    q, k, v = (torch.randn(1, 5000, 4, 8) for _ in range(3))
    plan = attention.plan(5000)
    assert not torch.equal(plan.positions, torch.arange(5000))
    along = plan.unshard(attention(*(plan.shard(x) for x in (q, k, v)), plan=plan))
    assert (along - standard(q, k, v)).abs().max() < 1e-5


def preset(worker: Worker) -> Tensor:
    attention = registry.create_from_preset("hilbert_optimized", causal=True, group=worker.group)
    plan = attention.plan(5001)
    q, k, v, *_ = (plan.shard(x) for x in Case(seq_len=5001).tensors()[:3])
    return plan.unshard(attention(q, k, v, plan=plan))


def test_the_preset_runs_on_four_ranks(cpu_pool: RankPool) -> None:
    (alone,) = cpu_pool.run(preset, world=1)
    assert (cpu_pool.run(preset, world=4)[0] - alone).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (4, 4), "segment_length": 8}, "a grid, or segments"),
        ({"prefix": 3}, "prefix=3 without a grid"),
        ({"patterns": [NEAR]}, "needs a grid"),
        ({"grid": (4,)}, "at least 2"),
        ({"grid": (2, 2, 2, 2)}, "at most 3"),
        ({"grid": {4, 5}}, "a set has no order"),
        ({"grid": (4, 0)}, "greater than or equal to 1"),
        ({"grid": (4, 4), "patterns": [{**NEAR, "radius": (1, 2, 3)}]}, "give radius for each"),
        ({"grid": (4, 4), "patterns": [{**NEAR, "causal_axes": (2,)}]}, "counted from 0 to 1"),
        ({"order": "peano"}, "'hilbert', 'morton', 'tile'"),
        ({"patterns": [NEAR], "grid": (4, 4), "segment_lengths": (8,), "dilation_rates": (1,)},
         "not defined"),
    ],
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        registry.create("hilbert", **fields)


def test_bad_sequences():
    attention = registry.create("hilbert", grid=(4, 5), prefix=2, order="hilbert")
    with pytest.raises(InputError, match="and prefix=2 are 22 tokens, and the sequence has 20"):
        attention.plan(20)
    with pytest.raises(InputError, match="cross-attention on a curve"):
        registry.create("hilbert", order="hilbert").plan(20, kv_len=30)
    inner = {**NEAR, "grid": (4, 4)}
    attention = registry.create("hilbert", grid=(4, 5), prefix=2, patterns=[inner])
    with pytest.raises(InputError, match="has 16 cells, and the sequence has 20 tokens behind"):
        attention.plan(22)

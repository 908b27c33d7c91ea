"""Variant ``distributed``: any inner variant on any mesh equals the reference."""

from __future__ import annotations

import os
import pickle
from typing import Any, ClassVar

import pytest
import torch
from ring_attention_blocksparse.config import BlockSparseConfig
from ring_attention_distributed.alike import check_alike
from ring_attention_distributed.config import DistributedConfig
from ring_attention_distributed.heads import Split
from ring_attention_hilbert.config import HilbertConfig
from ring_attention_hilbert.planner import order_of

import by_definition
from ring_core import reference, registry
from ring_core.errors import (
    ConfigError,
    DisagreementError,
    NonFiniteError,
    UnknownVariantError,
)
from ring_core.plan import ForHeads
from ring_core.rounds import rounds
from ring_core.testing import Case, Conformance, RankPool, Worker
from ring_core.testing.case import expected_of, run_case, visible_of
from ring_core.testing.conformance import skip_too_large
from ring_core.testing.tasks import build

BLOCKS = {
    "variant": "blocksparse",
    "patterns": (
        {"kind": "local", "left": 6, "right": 2, "heads": [0]},
        {"kind": "random", "blocks": 1, "seed": 3},
        {"kind": "topk", "blocks": 2},
    ),
    "block_q": 4,
    "block_kv": 8,
}
GRID = {
    "variant": "hilbert",
    "grid": (6, 7),
    "patterns": ({"kind": "neighborhood", "radius": 1}, {"kind": "sink", "n": 2, "heads": [0]}),
    "order": "hilbert",
    "block_q": 4,
    "block_kv": 4,
}
FOLDED = {
    "variant": "hilbert",
    "segment_length": 16,
    "patterns": ({"kind": "local", "left": 9, "right": 4}, {"kind": "strided", "stride": 7}),
    "order": "hilbert",
    "block_q": 4,
    "block_kv": 8,
}
DILATED = {"segment_lengths": (8, 32), "dilation_rates": (1, 3)}


class TestDistributed(Conformance):
    """The degree is what is predicted to be fastest; for tensors this small that is a high one."""

    variant = "distributed"
    fields = (
        {"causal": True},
        {"window": (3, 9), **DILATED},
    )
    layouts = ("auto", "contiguous", "zigzag", "striped")
    in_every_layout = ("odd",)
    sequences: ClassVar = {
        name: sizes for name, sizes in Conformance.sequences.items() if "kv_len" not in sizes
    }
    del sequences["packed cross"]


class TestOverBlocks(Conformance):
    variant = "distributed"
    fields = ({"causal": True, "inner": BLOCKS},)
    sequences: ClassVar = {
        name: Conformance.sequences[name] for name in ("odd", "many queries per key", "padded")
    }
    half: ClassVar = {**Conformance.half, "seq_len": 256}

    def visible(self, case: Case) -> torch.Tensor:
        return visible(case)

    def hidden(self, case: Case) -> torch.Tensor:
        return by_definition.out_of_sight(case, BlockSparseConfig(**BLOCKS))


class TestOverCurves(Conformance):
    variant = "distributed"
    fields = ({"causal": True, "inner": FOLDED},)
    sequences: ClassVar = {name: Conformance.sequences[name] for name in ("odd", "one token")}
    half: ClassVar = {**Conformance.half, "seq_len": 256}
    test_without_a_plan = None  # shards are then of another order; see test_hilbert.py

    def visible(self, case: Case) -> torch.Tensor:
        return visible(case)


def visible(case: Case) -> torch.Tensor:
    """What queries see under the inner variant."""
    inner = case.fields.get("inner")
    if not isinstance(inner, dict):
        return visible_of(case)
    if inner["variant"] == "blocksparse":
        config = BlockSparseConfig(**inner)
        return by_definition.shown(case, config, config.patterns)
    config = HilbertConfig(**inner)
    order = order_of(config, config.order, case.q_len)
    return by_definition.shown(case, config, config.resolved(), order)


# Meshes

MESHES = [(1, 4), (2, 2), (4, 1), (4, 2), (2, 4), (8, 1), (3, 1), (1, 3), (3, 2)]
"""Ranks that exchange heads, times ranks of a ring. In such an order that in the two rings of a
degree the numbers of heads, which take turns, are not the same."""
INNERS: dict[str, dict[str, Any]] = {
    "packed": {"fields": {"causal": True}, "cu_seqlens": (0, 1, 14, 14, 41, 43)},
    "cross": {"fields": {"window": (9, 4)}, "seq_len": 13, "kv_len": 40},
    "dilated": {"fields": {"causal": True, **DILATED}, "seq_len": 41},
    "blocks": {"fields": {"causal": True, "inner": BLOCKS}, "seq_len": 37, "batch": 2},
    "grid": {"fields": {"inner": GRID}, "seq_len": 42},
    "curve": {
        "fields": {"inner": {"variant": "hilbert", "order": "hilbert"}, **DILATED},
        "seq_len": 32,
    },
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
def test_meshes(rank_pool: RankPool, inner: str, ulysses: int, ring: int) -> None:
    """28 query and 7 KV heads, or 8 and 1: uneven shares, or heads that several ranks hold."""
    skip_too_large(rank_pool, ulysses * ring)
    kind = INNERS[inner]
    sizes = {name: value for name, value in kind.items() if name != "fields"}
    possible = [heads for heads in ((28, 7), (8, 1)) if not Split.refuse(*heads, ulysses)]
    turn = list(INNERS).index(inner) + MESHES.index((ulysses, ring))
    heads, kv_heads = possible[turn % len(possible)]
    fields = {**kind["fields"], "ulysses": ulysses}
    case = Case("distributed", fields, heads=heads, kv_heads=kv_heads, value_dim=6, **sizes)
    result = rank_pool.run(run_case, case, world=ulysses * ring)[0]
    errors = result.errors(expected_of(case, visible(case)))
    assert all(error < 1e-10 for error in errors.values()), errors


LEVELS = [(4, 2, 1), (8, 4, 1), (8, 2, 1), (8, 4, 2), (6, 3, 1), (6, 2, 1)]
"""Ranks, those of a host, and the degree. Each inner attention takes every second one."""


@pytest.mark.parametrize(
    ("world", "per_host", "ulysses", "inner"),
    [(*level, inner) for turn, inner in enumerate(INNERS) for level in LEVELS[turn % 2 :: 2]],
)
def test_rings_in_two_levels(
    rank_pool: RankPool, world: int, per_host: int, ulysses: int, inner: str
) -> None:
    skip_too_large(rank_pool, world)
    kind = INNERS[inner]
    sizes = {name: value for name, value in kind.items() if name != "fields"}
    fields = {**kind["fields"], "ulysses": ulysses, "ranks_per_host": per_host}
    case = Case("distributed", fields, heads=8, kv_heads=4, value_dim=6, **sizes)
    result = rank_pool.run(run_case, case, world=world)[0]
    errors = result.errors(expected_of(case, visible(case)))
    assert all(error < 1e-10 for error in errors.values()), errors


def on_uneven_hosts(worker: Worker, case: Case, hosts: tuple[int, ...]) -> Any:
    """The case where a launcher says how many ranks this rank's host has."""
    host = next(i for i in range(len(hosts)) if worker.rank < sum(hosts[: i + 1]))
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts[host])
    try:
        return run_case(worker, case)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


@pytest.mark.parametrize("hosts", [(4, 2), (3, 2, 1)])
def test_hosts_with_unequally_many_ranks(cpu_pool: RankPool, hosts: tuple[int, ...]) -> None:
    """No two levels fit them, so that the ring has one."""
    case = Case("distributed", {"causal": True, "ulysses": 1, "timeout": 20.0})
    result = cpu_pool.run(on_uneven_hosts, case, hosts, world=sum(hosts), fresh=True)[0]
    errors = result.errors(expected_of(case, visible(case)))
    assert all(error < 1e-10 for error in errors.values()), errors


def between_hosts(worker: Worker, case: Case, per_host: int) -> tuple[int, int]:
    """Bytes of keys that a rank sends to other hosts in a forward, and in a ring of one level."""
    attention, plan, (q, k, v, *_) = build(worker, case)
    attention(q, k, v, plan=plan)
    (arrangement,) = attention._arrangements._values.values()
    outer = attention.runtime.communicator(arrangement.ring.relay, q.device)
    one_level = elements_to(plan, per_host, case.kv_heads) * (case.head_dim + case.value_dim) * 8
    return outer.counters.bytes_sent, one_level


def elements_to(plan: Any, per_host: int, kv_heads: int) -> int:
    """(Row, head) pairs that ranks of other hosts fetch of this one in a ring of all."""
    whole, sent = ForHeads.of(plan.plan, kv_heads), 0
    for one in rounds(whole, plan.rank, 1)[1:]:
        for step in one.steps:
            if step.requester // per_host != plan.rank // per_host:
                sent += sum(len(part.rows) * part.heads.count(kv_heads) for part in step.give)
    return sent


def test_keys_cross_between_hosts_once(cpu_pool: RankPool) -> None:
    fields = {"ulysses": 1, "ranks_per_host": 4}
    case = Case("distributed", fields, seq_len=64)
    for sent, one_level in cpu_pool.run(between_hosts, case, 4, world=8):
        assert 4 * sent == one_level
    window = {**fields, "causal": True, "window": (3, None), "layout": "contiguous"}
    case = Case("distributed", window, seq_len=64)
    found = cpu_pool.run(between_hosts, case, 4, world=8)
    assert [sent > 0 for sent, _ in found] == [False, False, False, True, *[False] * 4]
    assert found[3][0] == found[3][1], "only the rows that are needed"


def dropped(worker: Worker, case: Case) -> tuple[int, list[torch.Tensor]]:
    """The seed of a call, its whole output and gradients."""
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan=plan)
    out.backward(dout)
    gradients = [plan.unshard(x.grad, kv=i > 0) for i, x in enumerate(leaves)]
    return seed, [plan.unshard(out.detach()), *gradients]


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1)])
def test_dropout_is_the_references_on_every_mesh(cpu_pool: RankPool, heads, kv_heads) -> None:
    for ulysses in (1, 2, 4):
        if Split.refuse(heads, kv_heads, ulysses):
            continue
        fields = {"causal": True, "dropout": 0.3, "ulysses": ulysses}
        case = Case("distributed", fields, heads=heads, kv_heads=kv_heads)
        seed, found = cpu_pool.run(dropped, case, world=4)[0]
        q, k, v, dout, _ = case.tensors()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, _ = reference.attention(*leaves, visible_of(case), dropout=0.3, seed=seed)
        right = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        for one, wanted in zip(found, right, strict=True):
            assert torch.allclose(one, wanted, atol=1e-10), ulysses


def only_some(worker: Worker, case: Case) -> tuple[float, ...]:
    """Calls of half of the ranks, then of all, then of the other half: groups of their own."""
    import torch.distributed as dist

    half = [dist.new_group(ranks) for ranks in ([0, 1, 2, 3], [4, 5, 6, 7])][worker.rank // 4]
    found = []
    for group in (half, worker.group, half):
        attention = registry.create(case.variant, group=group, **case.fields)
        plan = attention.plan(**case.plan_arguments)
        q, k, v, *_ = case.tensors()
        out = attention(plan.shard(q), plan.shard(k), plan.shard(v), plan=plan)
        right, _ = reference.attention(q, k, v, visible_of(case))
        found.append(float((plan.unshard(out) - right).abs().max()))
    return tuple(found)


def test_ranks_may_have_made_unequally_many_groups(cpu_pool: RankPool) -> None:
    """torch names groups that not all ranks make by how many a rank has made."""
    cpu_pool.run(
        dropped, Case("distributed", {"ulysses": 2}, heads=4, kv_heads=4), ranks=[0, 1, 4, 6]
    )
    case = Case("distributed", {"causal": True, "ulysses": 2}, heads=4, kv_heads=4)
    for errors in cpu_pool.run(only_some, case, fresh=True):
        assert max(errors) < 1e-10


def regrouped(worker: Worker) -> list[float]:
    """Calls of groups of the caller's, some of which are destroyed in between."""
    import torch.distributed as dist

    found = []
    for count in (3, 2, 1):
        groups = [dist.new_group(list(range(8))) for _ in range(count)]
        attention = registry.create("distributed", ulysses=2, retries=1, group=groups[-1])
        plan = attention.plan(24)
        q = torch.randn(1, 24, 4, 8, generator=torch.Generator().manual_seed(1))
        right, _ = reference.attention(q, q, q, reference.visible(24, 24))
        mine = plan.shard(q)
        found.append(
            float((plan.unshard(attention(mine, mine, mine, plan=plan)) - right).abs().max())
        )
        pickle.loads(pickle.dumps(plan))
        for group in groups:
            dist.destroy_process_group(group)
    return found


def test_callers_may_destroy_groups(cpu_pool: RankPool) -> None:
    for errors in cpu_pool.run(regrouped, world=8):
        assert max(errors) < 1e-5


def test_auto_takes_this_variant_where_a_group_spans_hosts(monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    assert registry.create("auto", ulysses=1).config.variant == "distributed"


def test_one_rank_is_checked_too():
    x = torch.ones(1, 4, 2, 4, requires_grad=True)
    attention = registry.create("distributed", check_finite=True)
    attention(x, x, x).sum().backward()
    k = x.detach().clone()
    k[0, 2, 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"k holds 1 numbers.*token 2, head 1"):
        attention(x, k, x)


# Weights


def compared(worker: Worker, drifted: int | None) -> str:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    if worker.rank == drifted:
        with torch.no_grad():
            model[0].bias[2] += 0.125
    check_alike(model, worker.group)
    return "alike"


def test_weights_that_drifted_apart_are_named(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(compared, None, world=3) == ["alike"] * 3
    found = cpu_pool.run(compared, 1, world=3, errors=True)
    assert len({str(one) for one in found}) == 1
    assert all(isinstance(one, DisagreementError) for one in found)
    assert "1 of 7 parameters and buffers differ" in str(found[0])
    assert "0.bias (ranks [0, 2] against [1])" in str(found[0])
    check_alike(torch.nn.Linear(2, 2))  # one process


# The config


def test_common_fields_belong_outside_and_reach_the_inner_one():
    attention = registry.create("distributed", causal=True, window=(7, None), inner=BLOCKS)
    assert attention.inner.config == BlockSparseConfig(causal=True, window=(7, None), **BLOCKS)
    lifted = registry.create("distributed", inner={"variant": "standard", "causal": True})
    assert lifted.config.causal
    assert lifted.inner.config.causal
    assert lifted.config == DistributedConfig(causal=True)
    assert registry.create("distributed").inner.config.variant == "standard"
    again = registry.create(attention.config, causal=False)
    assert not again.inner.config.causal


def test_the_config_round_trips():
    for inner in ("standard", BLOCKS, GRID):
        config = DistributedConfig(inner=inner, softmax_scale=0.5, ulysses=2)
        assert DistributedConfig.model_validate_json(config.model_dump_json()) == config
        assert DistributedConfig.from_yaml(config.to_yaml()) == config
        assert hash(config) == hash(DistributedConfig(inner=inner, softmax_scale=0.5, ulysses=2))
    assert DistributedConfig().model_dump(mode="json")["inner"] == "standard"
    assert "inner" in DistributedConfig.model_json_schema()["properties"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"causal": True, "inner": {"variant": "standard", "causal": False}}, "give it once"),
        ({"inner": "distributed"}, "cannot be wrapped in itself"),
        ({"inner": "standrad"}, "Did you mean 'standard'"),
        ({"inner": {"variant": "blocksparse", "patern": []}}, "Did you mean 'patterns'"),
        ({"inner": BLOCKS, **DILATED}, "segment_lengths"),
        ({"inner": 3}, "expected the name of a variant"),
        ({"backoff": 3.0}, "nothing is tried again without retries"),
        ({"retries": True}, "valid integer"),
        ({"ulysses": 0}, "greater than or equal to 1"),
        ({"ulysses": "many"}, "'auto'"),
    ],
)
def test_bad_fields_are_told(fields, says):
    with pytest.raises((ConfigError, UnknownVariantError), match=says):
        registry.create("distributed", **fields)

"""One-sided transfers between GPUs: what the conformance kit does not come to."""

from __future__ import annotations

import pytest
import torch

from ring_core import registry
from ring_core.testing import RankPool, Worker

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM = 4, 2, 64
FIELDS = {"causal": True, "communicator": "symmetric"}


def tensors(tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, tokens, heads, DIM, generator=generator).to("cuda", torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def both(attention, plan, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Out and gradients of this rank."""
    leaves = [x.detach().requires_grad_() for x in shards[:3]]
    out = attention(*leaves, plan=plan)
    return [out.detach(), *torch.autograd.grad(out, leaves, shards[3])]


def difference(worker: Worker, tokens: int, seed: int, **fields) -> float:
    """Largest relative difference from the same attention on this GPU alone."""
    attention = registry.create("standard", group=worker.group, **FIELDS, **fields)
    plan = attention.plan(tokens)
    whole = tensors(tokens, seed)
    found = both(attention, plan, [plan.shard(x) for x in whole])
    alone = registry.create("standard", causal=True, group=_only_me(worker), **fields)
    right = both(alone, alone.plan(tokens), whole)
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(found, [plan.shard(x) for x in right], strict=True)
    )


_alone: dict[int, torch.distributed.ProcessGroup] = {}


def _only_me(worker: Worker):
    """A group of this process alone."""
    me = torch.distributed.get_rank()
    if me not in _alone:
        _alone[me] = torch.distributed.new_group([me], use_local_synchronization=True)
    return _alone[me]


def growing(worker: Worker) -> float:
    return max(difference(worker, tokens, tokens) for tokens in (256, 2048, 700, 4096))


def test_memory_grows_with_the_calls(gpu_pool: RankPool) -> None:
    assert max(gpu_pool.run(growing, timeout=60)) < 0.01


def many_rounds(worker: Worker) -> float:
    from ring_attention_standard.symmetric_memory import SymmetricMemory

    before, SymmetricMemory.shards = SymmetricMemory.shards, 1.5
    try:
        return max(difference(worker, 1024, seed) for seed in range(5))
    finally:
        SymmetricMemory.shards = before


def test_rounds_take_turns_with_the_slots(gpu_pool: RankPool) -> None:
    """Each peer's keys in a round of their own: gradients arrive while others are added."""
    assert max(gpu_pool.run(many_rounds, timeout=60)) < 0.01


def test_groups_of_other_ranks_before_and_after(gpu_pool: RankPool) -> None:
    """torch's rendezvous counts by process; ranks that met before must not wait for the others."""
    last = gpu_pool.size - 1
    for ranks in ([0, last], list(range(gpu_pool.size)), [last, 0], [0, last]):
        if len(ranks) > 1 and len(set(ranks)) == len(ranks):
            assert max(gpu_pool.run(growing, ranks=sorted(ranks), fresh=True, timeout=60)) < 0.01


def captured(worker: Worker, causal: bool, documents: tuple[int, ...] | None) -> float:
    """Forward and backward in a CUDA graph, replayed with other numbers, against eager calls."""
    fields = {**FIELDS, "causal": causal}
    attention = registry.create("standard", group=worker.group, **fields)
    plan = attention.plan(1024 if documents is None else None, cu_seqlens=documents)
    inputs = [plan.shard(x).clone() for x in tensors(1024, 0)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            both(attention, plan, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = both(attention, plan, inputs)
    worst = 0.0
    for seed in (1, 2, 3):
        fresh = [plan.shard(x) for x in tensors(1024, seed)]
        for target, source in zip(inputs, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        replayed = [x.clone() for x in outputs]
        for a, b in zip(replayed, both(attention, plan, fresh), strict=True):
            worst = max(worst, float((a.float() - b.float()).norm() / b.float().norm()))
    return worst


@pytest.mark.parametrize(
    ("causal", "documents"), [(True, None), (False, None), (True, (0, 100, 101, 500, 1024))]
)
def test_a_cuda_graph_holds_forward_and_backward(
    gpu_pool: RankPool, causal: bool, documents: tuple[int, ...] | None
) -> None:
    assert max(gpu_pool.run(captured, causal, documents, timeout=60)) < 0.01


def chosen(worker: Worker) -> tuple[float, int, int]:
    """Largest relative difference from one GPU alone of a call that chooses blocks; bytes that it
    sent, and those of all that it might have read."""
    from ring_core.rounds import elements_fetched, elements_sent

    fields = {"causal": True, "patterns": ({"kind": "topk", "blocks": 2},)}
    attention = registry.create("blocksparse", group=worker.group, **{**FIELDS, **fields})
    alone = registry.create("blocksparse", group=_only_me(worker), **fields)
    plan = attention.plan(4096)
    whole = tensors(4096, 0)
    found = both(attention, plan, [plan.shard(x) for x in whole])
    right = both(alone, alone.plan(4096), whole)
    keys, gradients = (
        count(plan.plan, plan.rank, KV_HEADS) for count in (elements_sent, elements_fetched)
    )
    return (
        max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found, [plan.shard(x) for x in right], strict=True)
        ),
        attention.communicator(plan, "cuda").counters.bytes_sent,
        (2 * keys + gradients) * 2 * DIM * 2,
    )


def test_blocks_that_tensors_chose_travel_alone(gpu_pool: RankPool) -> None:
    found = gpu_pool.run(chosen, timeout=60)
    assert max(difference for difference, _, _ in found) < 0.01
    assert 0 < sum(sent for _, sent, _ in found) < 0.8 * sum(most for _, _, most in found)


def test_ranks_that_cannot_reach_each_other_use_messages() -> None:
    from ring_attention_standard.symmetric_memory import SymmetricMemory

    assert SymmetricMemory.refuse(None, torch.device("cpu")) == "between CUDA GPUs only"

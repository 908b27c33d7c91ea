"""Calls: inputs that do not fit, groups and meshes, dropout, and what a copy keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ring_core import reference, registry
from ring_core.errors import DifferentiationError, InputError, RingTimeoutError
from ring_core.testing import Case, RankPool, Worker
from ring_core.testing.tasks import build


def _q(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "text"),
    [
        (_q(8, 2, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), r"q \(8, 2, 4\).*expected \[batch, rows"),
        (_q(1, 8, 3, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), "3 query heads are no multiple of 2"),
        (_q(1, 8, 2, 4), _q(1, 8, 2, 5), _q(1, 8, 2, 4), "q and k must have the same head_dim"),
        (
            _q(1, 8, 2, 4),
            _q(1, 8, 2, 4),
            _q(1, 9, 2, 4),
            "k and v must have the same rows and heads",
        ),
        (_q(2, 8, 2, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), "batch sizes differ"),
        (
            _q(1, 8, 2, 4).half(),
            _q(1, 8, 2, 4),
            _q(1, 8, 2, 4),
            "q is torch.float16, k torch.float32",
        ),
        (*3 * [_q(1, 8, 2, 4).long()], "torch.int64: expected one of torch.float64"),
        (*3 * [_q(1, 9, 2, 4)], r"q \(1, 9, 2, 4\) has 9 rows.*use plan.shard\(q_full, dim=1\)"),
        (_q(1, 8, 2, 4), *2 * [_q(1, 7, 2, 4)], "k .* has 7 rows"),
        (*3 * [_q(0, 8, 2, 4)], "every size must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_named(q, k, v, text) -> None:
    attention = registry.create("standard")
    with pytest.raises(InputError, match=text):
        attention(q, k, v, plan=attention.plan(8))


def test_a_plan_must_be_a_plan_and_fit_the_batch() -> None:
    attention = registry.create("standard")
    q = _q(2, 8, 2, 4)
    with pytest.raises(InputError, match=r"plan is a int; get one from attn.plan"):
        attention(q, q, q, plan=8)
    with pytest.raises(InputError, match="lengths for a batch of 3"):
        attention(q, q, q, plan=attention.plan(8, lengths=[8, 8, 1]))


def without_plan_or_layout(worker: Worker) -> str:
    attention = registry.create("standard", group=worker.group)
    q = torch.ones(1, 4, 1, 4)
    try:
        attention(q, q, q)
    except InputError as error:
        return str(error)
    return "no error"


def test_a_call_without_a_plan_needs_a_layout(cpu_pool: RankPool) -> None:
    answers = cpu_pool.run(without_plan_or_layout, world=2, fresh=True)
    assert all(
        "pass plan=attn.plan(seq_len), or create the attention with layout=" in a for a in answers
    )


def mesh_and_copies(worker: Worker) -> bool:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))
    attention = registry.create("standard", causal=True, group=mesh["cp"])
    plan = attention.plan(19)
    assert (plan.world, plan.rank) == (4, worker.rank % 4)
    with pytest.raises(InputError, match=r"2-D DeviceMesh \(2, 4\); name one dimension"):
        registry.create("standard", group=mesh)
    q = Case(seq_len=19, kv_heads=4).tensors()[0]
    expected = reference.attention(q, q, q, reference.visible(19, 19, causal=True))[0]
    for one in (attention, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        plan = one.plan(19)
        out = plan.unshard(one(*3 * [plan.shard(q)], plan=plan))
        assert torch.allclose(out, expected, atol=1e-10)
    return True


def test_meshes_and_copies_that_keep_their_group(cpu_pool: RankPool) -> None:
    assert all(cpu_pool.run(mesh_and_copies))


def test_a_pickled_group_that_is_gone_is_named() -> None:
    attention = registry.create("standard")
    state = attention.__getstate__() | {"_group": "no such group"}
    with pytest.raises(InputError, match="pickled with process group 'no such group'"):
        attention.__setstate__(state)


def dropped(worker: Worker, case: Case) -> list[torch.Tensor]:
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    torch.manual_seed(5)  # alike on every rank, as the field's description asks
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan=plan)
    out.backward(dout)
    return [
        plan.unshard(out.detach()),
        *(plan.unshard(x.grad, kv=i > 0) for i, x in enumerate(leaves)),
    ]


@pytest.mark.parametrize(
    "sizes", [{"seq_len": 23}, {"cu_seqlens": (0, 9, 30)}, {"seq_len": 9, "kv_len": 20}]
)
def test_dropout_is_the_references_at_every_world_size(cpu_pool: RankPool, sizes) -> None:
    """Forward and backward use one mask, a function of global indices and the call's seed."""
    case = Case(fields={"causal": True, "dropout": 0.3}, batch=2, value_dim=5, **sizes)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    q, k, v, dout, _ = case.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = sizes.get("cu_seqlens")
    seen = reference.visible(case.q_len, case.k_len, causal=True, cu_seqlens=cu_seqlens)
    right = reference.attention(*leaves, seen, dropout=0.3, seed=seed)[0]
    expected = [right.detach(), *torch.autograd.grad(right, leaves, dout)]
    for world in (1, 2, 3, 8):
        for found, wanted in zip(
            cpu_pool.run(dropped, case, world=world)[0], expected, strict=True
        ):
            assert torch.allclose(found, wanted, atol=1e-10), world


def test_dropout_is_off_in_eval_and_repeats_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    attention = registry.create("standard", dropout=0.5)
    q = _q(1, 32, 2, 8, dtype=torch.float64).requires_grad_()
    torch.manual_seed(1)
    plain = torch.autograd.grad(attention(q, q, q).square().sum(), q)[0]
    torch.manual_seed(1)
    out = checkpoint(attention, q, q, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], plain)
    assert not torch.equal(attention(q, q, q), attention(q, q, q))
    attention.eval()
    exact = reference.attention(q, q, q, torch.ones(32, 32, dtype=torch.bool))[0]
    assert torch.allclose(attention(q, q, q), exact, atol=1e-12)


def test_twice_differentiating_is_refused() -> None:
    q = _q(1, 4, 1, 4).requires_grad_()
    out = registry.create("standard")(q, q, q)
    with pytest.raises(DifferentiationError, match=r"differentiable once: .* without create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def late_peer(worker: Worker) -> None:
    """The second call is known to all, so rank 0's absence shows in the transfer itself."""
    import time

    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    q = torch.ones(1, 4, 1, 4)
    attention(q, q, q)
    if worker.rank == 0:
        time.sleep(5)
    attention(q, q, q)


def test_a_late_peer_is_named_alike_on_every_rank(cpu_pool: RankPool) -> None:
    outcomes = cpu_pool.run(late_peer, world=3, errors=True, fresh=True, timeout=60)
    assert all(isinstance(outcome, RingTimeoutError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    assert "timeout=2 s" in str(outcomes[0])
    assert "fetching keys" in str(outcomes[0])

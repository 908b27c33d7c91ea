"""What the conformance tests run on each rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ring_core import registry
from ring_core.attention import BaseRingAttention
from ring_core.rank_plan import RankPlan
from ring_core.store import store_of
from ring_core.testing.case import Case, Result, gathered, run_case
from ring_core.testing.pool import Worker

Shards = tuple[Tensor, ...]


def build(worker: Worker, case: Case) -> tuple[BaseRingAttention, RankPlan, Shards]:
    """The attention, its plan, and this rank's q, k, v, dout, dlse."""
    attention = registry.create(case.variant, group=worker.group, **case.fields)
    plan = attention.plan(**case.plan_arguments)
    q, k, v, dout, dlse = (x.to(worker.device) for x in case.tensors())
    shards = (
        plan.shard(q),
        plan.shard(k, kv=True),
        plan.shard(v, kv=True),
        plan.shard(dout),
        plan.shard(dlse, dim=2),
    )
    return attention, plan, shards


def replace_the_hidden(worker: Worker, case: Case, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Whole out and lse of the case, and with other keys where ``hidden`` [B, Sk] says so."""
    attention, plan, (q, k, v, _, _) = build(worker, case)
    rows = plan.shard(hidden, kv=True).to(k.device)[..., None, None]
    others = [torch.where(rows, 1e3 * torch.randn_like(x), x) for x in (k, v)]
    results = []
    for keys, values in ((k, v), others):
        out, lse = attention(q, keys, values, plan=plan, return_lse=True)
        results.append((plan.unshard(out).cpu(), plan.unshard(lse, dim=2).cpu()))
    return results


def special_calls(worker: Worker, how: str, case: Case) -> Result:
    """One call made in an unusual way; see the names in ``Conformance.test_called_as``."""
    attention, plan, (q, k, v, dout, dlse) = build(worker, case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if how == "strided":
        leaves = [_strided(x).requires_grad_() for x in (q, k, v)]
    if how == "frozen_kv":
        leaves[1].requires_grad_(False)
        leaves[2].requires_grad_(False)
    if how == "frozen_q":
        leaves[0].requires_grad_(False)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = attention(*tensors, plan=plan, return_lse=True)
        return out

    if how in ("no_grad", "inference"):
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            out, lse = call(*leaves)
            assert not out.requires_grad
        # Buffers that inference left in the pool must serve training too.
        torch.autograd.backward(call(*leaves), (dout, dlse))
        return gathered(plan, out.clone(), lse.clone(), None, None, None)
    if how == "checkpoint":
        out, lse = checkpoint(call, *leaves, use_reentrant=False)
    elif how == "checkpoint_reentrant":
        out, lse = checkpoint(call, *leaves, use_reentrant=True)
    elif how == "compile":
        out, lse = torch.compile(
            lambda *x: tuple(y * 1.0 for y in call(*(z + 0 for z in x))),
            backend="aot_eager",
            fullgraph=True,
        )(*leaves)
    elif how == "autocast":
        with torch.autocast(worker.device.type, dtype=torch.bfloat16):
            out, lse = call(*leaves)
    else:
        out, lse = call(*leaves)
    if how == "out_only":
        torch.autograd.backward(out, dout)
    elif how == "lse_only":
        torch.autograd.backward(lse, dlse)
    elif how == "twice":
        torch.autograd.backward((out, lse), (dout, dlse), retain_graph=True)
        first = [x.grad.clone() for x in leaves if x.grad is not None]
        for x in leaves:
            x.grad = None
        torch.autograd.backward((out, lse), (dout, dlse))
        assert all(
            torch.equal(a, x.grad) for a, x in zip(first, leaves, strict=True) if x.grad is not None
        )
    else:
        torch.autograd.backward((out, lse), (dout, dlse))
    return gathered(plan, out, lse, *(x.grad for x in leaves))


def _strided(x: Tensor) -> Tensor:
    """Equal values whose memory is [B, D, H, S], every other element unused."""
    memory = torch.full(
        (*x.transpose(1, 3).shape[:-1], 2 * x.shape[1]), torch.nan, dtype=x.dtype, device=x.device
    )
    view = memory[..., ::2].transpose(1, 3)
    return view.copy_(x)


def fill_padding_with_nan(worker: Worker, case: Case) -> tuple[Result, Result]:
    """The case as it is, and with NaN in every row that holds no token."""
    results = []
    for dirt in (0.0, torch.nan):
        attention, plan, (q, k, v, dout, dlse) = build(worker, case)
        lengths = torch.tensor(case.lengths or [case.q_len] * case.batch)[:, None]
        leaves = []
        for x, positions in ((q, plan.positions), (k, plan.kv_positions), (v, plan.kv_positions)):
            empty = (positions[None] < 0) | (positions[None] >= lengths)
            leaves.append(x.masked_fill(empty[..., None, None].to(x.device), dirt).requires_grad_())
        out, lse = attention(*leaves, plan=plan, return_lse=True)
        torch.autograd.backward((out, lse), (dout, dlse))
        results.append(gathered(plan, out, lse, *(x.grad for x in leaves)))
        assert not any(x.grad.isnan().any() for x in leaves if x.grad is not None)
    return results[0], results[1]


def repeat_bitwise(worker: Worker, case: Case) -> bool:
    """Whether five runs give the same bits on rank 0."""
    first, *others = [run_case(worker, case) for _ in range(5)]
    return first is None or all(
        torch.equal(getattr(first, name), getattr(other, name))
        for other in others
        for name in ("out", "lse", "dq", "dk", "dv")
    )


def gradcheck(worker: Worker, case: Case) -> bool:
    """torch.autograd.gradcheck of whole inputs to whole outputs, in step on every rank."""
    attention = registry.create(case.variant, group=worker.group, **case.fields)
    plan = attention.plan(**case.plan_arguments)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shards = plan.shard(q), plan.shard(k, kv=True), plan.shard(v, kv=True)
        out, lse = attention(*shards, plan=plan, return_lse=True)
        # An empty row's lse is -inf and has no derivative.
        return plan.unshard(out), plan.unshard(lse.masked_fill(lse == -torch.inf, 0), dim=2)

    inputs = [x.to(worker.device).requires_grad_() for x in case.tensors()[:3]]
    # Along directions of its own, the same on every rank, in place of number by number.
    return bool(torch.autograd.gradcheck(whole, inputs, nondet_tol=0.0, fast_mode=True))


def call_without_plan(worker: Worker, case: Case) -> bool:
    """Whether a call on equal shards gives what the call with the plan gives."""
    attention, plan, (q, k, v, _, _) = build(worker, case)
    return torch.equal(attention(q, k, v), attention(q, k, v, plan=plan))


def disagree(worker: Worker, case: Case, what: str) -> Any:
    """Rank 0 calls unlike the others, or (``missing``) not at all before the others give up."""
    odd = worker.rank == 0
    fields = {**case.fields, "timeout": 0.5 if what == "missing" else 20.0}
    if what == "config" and odd:
        fields["softmax_scale"] = 0.123
    attention = registry.create(case.variant, group=worker.group, **fields)
    seq_len = 4 * worker.world if not (what == "length" and odd) else 5 * worker.world
    plan = attention.plan(seq_len)
    heads = 4 if what == "heads" and odd else 2
    dtype = torch.float32 if what == "dtype" and odd else torch.float64
    rows = plan.local_len + (what == "bad_shape" and odd)
    q = torch.ones(1, rows, heads, 8, dtype=dtype, device=worker.device)
    store = store_of(worker.group)
    if what == "missing" and odd:
        store.wait([f"gave up: {rank}" for rank in range(1, worker.world)], timedelta(seconds=30))
    try:
        return attention(q, q, q, plan=plan).sum().item()
    finally:
        store.set(f"gave up: {worker.rank}", "")

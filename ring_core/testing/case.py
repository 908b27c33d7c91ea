"""One call of a variant on given sizes: run on the ranks of a pool, and by the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from ring_core import registry
from ring_core.rank_plan import RankPlan
from ring_core.sequences import Sequences
from ring_core.testing.pool import Worker


@dataclass(frozen=True)
class Case:
    """A variant's fields, a sequence, and tensors drawn from a seed, the same on every rank."""

    variant: str = "standard"
    fields: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int | None = 37
    kv_len: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    kv_cu_seqlens: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float64"
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.variant]
        parts += [f"{name}={value}" for name, value in self.fields.items()]
        parts += [
            f"{name}={getattr(self, name)}"
            for name in (
                "seq_len",
                "kv_len",
                "cu_seqlens",
                "kv_cu_seqlens",
                "lengths",
                "batch",
                "heads",
                "kv_heads",
                "head_dim",
                "value_dim",
                "dtype",
            )
            if getattr(self, name) != getattr(_DEFAULT, name)
        ]
        return "-".join(parts).replace(" ", "").replace("'", "")

    @property
    def plan_arguments(self) -> dict[str, Any]:
        """What :meth:`BaseRingAttention.plan` takes for this case."""
        names = ("kv_len", "cu_seqlens", "kv_cu_seqlens", "lengths")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given if self.cu_seqlens is not None else {"seq_len": self.seq_len, **given}

    @property
    def sequences(self) -> Sequences:
        """What a planner is given for this case."""
        return Sequences.build(**self.plan_arguments)

    @property
    def q_len(self) -> int:
        """Query tokens."""
        length = self.cu_seqlens[-1] if self.cu_seqlens is not None else self.seq_len
        assert length is not None
        return length

    @property
    def k_len(self) -> int:
        """Key tokens."""
        if self.kv_cu_seqlens is not None:
            return self.kv_cu_seqlens[-1]
        return self.kv_len if self.kv_len is not None else self.q_len

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Whole q, k, v, and gradients of out and lse, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return (
            draw(self.batch, self.q_len, self.heads, self.head_dim),
            draw(self.batch, self.k_len, self.kv_heads, self.head_dim),
            draw(self.batch, self.k_len, self.kv_heads, self.value_dim),
            draw(self.batch, self.q_len, self.heads, self.value_dim),
            draw(self.batch, self.heads, self.q_len),
        )


_DEFAULT = Case()


@dataclass
class Result:
    """Whole tensors in original order: out [B, Sq, H, Dv], lse [B, H, Sq], and gradients."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def errors(self, expected: Result) -> dict[str, float]:
        """Largest absolute difference of each tensor; -inf in lse must stand in the same places."""
        lse, right = self.lse.double(), expected.lse.double()
        if not torch.equal(torch.isneginf(lse), torch.isneginf(right)):
            return {"lse": float("inf")}
        finite = ~torch.isneginf(right)
        differences = {
            name: getattr(self, name).double() - getattr(expected, name).double()
            for name in ("out", "dq", "dk", "dv")
        }
        differences["lse"] = (lse - right)[finite]
        return {
            name: float(d.abs().max())
            if d.numel() and not d.isnan().any()
            else (float("nan") if d.isnan().any() else 0.0)
            for name, d in differences.items()
        }

    def relative(self, expected: Result) -> dict[str, float]:
        """Error of out and gradients in the Frobenius norm, relative to what is expected."""
        return {
            name: float((getattr(self, name).double() - right).norm() / right.norm())
            for name in ("out", "dq", "dk", "dv")
            for right in [getattr(expected, name).double()]
        }


def run_case(worker: Worker, case: Case) -> Result | None:
    """Shard, attend, go backward, unshard; whole tensors from rank 0. A task for a pool."""
    attention = registry.create(case.variant, group=worker.group, **case.fields)
    plan = attention.plan(**case.plan_arguments)
    q, k, v, dout, dlse = (x.to(worker.device) for x in case.tensors())
    shards = [
        plan.shard(x, dim=1, kv=kv).detach().requires_grad_()
        for x, kv in ((q, False), (k, True), (v, True))
    ]
    out, lse = attention(*shards, plan=plan, return_lse=True)
    gradients = torch.autograd.grad(
        (out, lse), shards, (plan.shard(dout), plan.shard(dlse, dim=2)), materialize_grads=True
    )
    whole = gathered(plan, out, lse, *gradients)
    return whole if worker.rank == 0 else None


def gathered(plan: RankPlan, out: Tensor, lse: Tensor, *gradients: Tensor | None) -> Result:
    """Whole tensors; a missing gradient is NaN. Those of one layout travel together."""
    dq, dk, dv = gradients
    mine = [out.detach(), lse.detach().transpose(1, 2)[..., None], dq]
    queries, keys = plan.plan.shards
    if queries == keys:
        whole = _unsharded(plan, [*mine, dk, dv], kv=False)
    else:
        whole = [*_unsharded(plan, mine, kv=False), *_unsharded(plan, [dk, dv], kv=True)]
    out, lse, dq, dk, dv = whole
    return Result(out, lse[..., 0].transpose(1, 2), dq, dk, dv)


def _unsharded(plan: RankPlan, shards: Sequence[Tensor | None], kv: bool) -> list[Tensor]:
    there = [x for x in shards if x is not None]
    if there:
        wide = reduce(torch.promote_types, (x.dtype for x in there))
        rows = torch.cat([x.to(wide).flatten(2) for x in there], -1)
        columns = [prod(x.shape[2:]) for x in there]
        whole = iter(torch.split(plan.unshard(rows, kv=kv).cpu(), columns, -1))
    return [
        torch.full((1,), torch.nan)
        if x is None
        else torch.unflatten(next(whole).to(x.dtype), 2, x.shape[2:])
        for x in shards
    ]


def visible_of(case: Case) -> Tensor:
    """Which keys each query sees by the common fields, or how often they count where the case is
    dilated: a shape that broadcasts to [B, H, Sq, Sk]."""
    from ring_core import reference

    seen = reference.visible(
        case.q_len,
        case.k_len,
        causal=case.fields.get("causal", False),
        window=case.fields.get("window"),
        cu_seqlens=case.cu_seqlens,
        kv_cu_seqlens=case.kv_cu_seqlens,
    )
    if case.lengths is not None:
        seen = reference.within_lengths(seen, case.lengths)
    segments = case.fields.get("segment_lengths")
    if segments is None:
        return seen
    times = reference.dilated(
        case.q_len,
        case.kv_heads,
        segments,
        case.fields["dilation_rates"],
        cu_seqlens=case.cu_seqlens,
    )
    return seen * times.repeat_interleave(case.heads // case.kv_heads, dim=0)


def expected_of(case: Case, seen: Tensor) -> Result:
    """What the reference says of the case, under the mask ``seen`` (see reference.attention)."""
    from ring_core import reference

    q, k, v, dout, dlse = (x.double() for x in case.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = reference.attention(q, k, v, seen, scale=case.fields.get("softmax_scale"))
    # An empty row's lse is -inf whatever the inputs are: it has no gradient.
    gradients = torch.autograd.grad(
        (out, lse),
        (q, k, v),
        (dout, dlse.masked_fill(torch.isneginf(lse), 0)),
        materialize_grads=True,
    )
    return Result(out.detach(), lse.detach(), *gradients)

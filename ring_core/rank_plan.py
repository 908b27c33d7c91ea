"""A plan as one rank sees it: its rows, and how to get them from the whole and back."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import groups
from ring_core.agreement import Signature, agreement_of
from ring_core.compiling import untraced
from ring_core.errors import InputError
from ring_core.layout import Layout
from ring_core.masks import Mask
from ring_core.operator import number_of
from ring_core.plan import ForHeads, HeldHeads, Plan
from ring_core.rounds import check
from ring_core.sequences import Sequences


class RankPlan:
    """What ``attn.plan(...)`` gives: a :class:`Plan` bound to this rank of a group.

    Attributes:
        plan: the plan itself, the same on every rank.
        sequences: what was asked for.
        rank, world: this process's place in the group.
        number: stands for the plan in operators of this process.
        made_by: what the plan depends on beside the sequence; attentions refuse others' plans.
        rearranged: where tiles count rows in another order than callers hold them, for each row of
            the tiles' queries and keys the caller's, and for each of the caller's queries the
            tiles': int64, on the CPU. Else None.
        held: which heads the tensors hold; None: all.

    Args:
        within: whether it is for a part of a call, whose rows stand as tiles count them.
        timeout: seconds to wait for ranks that have not come to :meth:`unshard`.
    """

    def __init__(
        self,
        plan: Plan,
        sequences: Sequences,
        group: Any | None,
        made_by: Hashable = None,
        held: HeldHeads | None = None,
        within: bool = False,
        timeout: float = 300.0,
    ) -> None:
        self.plan = plan
        self.held = held
        self.made_by = made_by
        self.timeout = timeout
        self._signatures: dict[tuple[Any, ...], Signature] = {}
        self.sequences = sequences
        self.group = group
        self.rank, self.world = groups.rank_and_world(group)
        self.rearranged = None if within else self._rearranged()
        self._checked: set[int] = set()
        self.number = number_of(self, keep=True)

    def __repr__(self) -> str:
        return (
            f"RankPlan(rank {self.rank} of {self.world}: {self.local_len} of "
            f"{self.sequences.q_len} tokens, imbalance {self.imbalance:.3f})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None if self.group is None else self.group.group_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.group = None if state["group"] is None else groups.by_name(state["group"])
        self.number = number_of(self, keep=True)

    def check(self, kv_heads: int) -> None:
        """Check this rank's tiles for tensors of so many KV heads; once.

        Raises:
            PlanError: one has rows that its rank or the keys' owner does not hold.
        """
        if kv_heads not in self._checked:
            check(ForHeads.of(self.plan, kv_heads), self.rank)
            self._checked.add(kv_heads)

    @property
    def local_len(self) -> int:
        """Rows of this rank's query shard, padding included."""
        return self.plan.queries.size

    @property
    def kv_local_len(self) -> int:
        """Rows of this rank's key shard, padding included."""
        return self.plan.keys.size

    @property
    def positions(self) -> Tensor:
        """int64 [S_local] on the CPU: each local query row's global token index, -1 for padding."""
        return self._positions.clone()  # the caller's own, whatever becomes of it

    @property
    def kv_positions(self) -> Tensor:
        """int64 [Skv_local] on the CPU: each local key row's global token index, -1 for padding."""
        return self._kv_positions.clone()

    @cached_property
    def _positions(self) -> Tensor:
        return self._layout(False).positions(self.rank)

    @cached_property
    def _kv_positions(self) -> Tensor:
        return self._layout(True).positions(self.rank)

    @cached_property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean."""
        return self.plan.imbalance(self.sequences.batch)

    @cached_property
    def digest(self) -> str:
        """Of the plan: equal on ranks that have the same one."""
        return hashlib.sha256(repr(self.plan).encode()).hexdigest()[:16]

    @cached_property
    def is_ragged(self) -> bool:
        """Whether documents, or batch rows, are of several lengths."""
        return len({(len(one.q), len(one.kv)) for one in self.sequences.documents}) > 1

    @cached_property
    def masks(self) -> frozenset[type[Mask]]:
        """The kinds of mask that the plan's tiles have, on any rank."""
        return self.plan.masks

    @untraced
    def shard(self, x: Tensor, dim: int = 1, kv: bool = False, fill: float = 0) -> Tensor:
        """This rank's rows of the whole tensor ``x``, which every rank holds alike.

        Any rank of tensor and any dtype. Differentiable: the backward gathers the ranks' slices
        into the whole gradient (a collective of the group), as DTensor's redistribution does.

        Args:
            dim: the sequence dimension. kv: take the key side's layout. fill: put into padding.

        Raises:
            InputError: ``x`` is not as long as the plan's sequence.
        """
        layout = self._layout(kv)
        _check_length(x, dim, layout.length, "the whole sequence", self)
        sharded: Tensor = _Shard.apply(x, dim % x.ndim, self, kv, fill)  # type: ignore[no-untyped-call]
        return sharded

    @untraced
    def unshard(self, x: Tensor, dim: int = 1, kv: bool = False) -> Tensor:
        """The whole tensor in its original order from every rank's shard ``x``; padding is dropped.

        A collective of the group. Differentiable: the result is replicated, so the backward takes
        this rank's slice of the gradient.

        Raises:
            InputError: ``x`` is not as long as this plan's shards.
            DisagreementError: the ranks' tensors differ otherwise than in their numbers, or a rank
                is missing (first call of a kind).
        """
        try:
            _check_length(x, dim, self._layout(kv).size, "a shard", self)
        except InputError as error:
            if self._shares:  # the other ranks must not wait for this one
                agreement = agreement_of(self.group)
                agreement.refuse(agreement.next_call(), str(error))
            raise
        whole: Tensor = _Unshard.apply(x, dim % x.ndim, self, kv)  # type: ignore[no-untyped-call]
        return whole

    def _layout(self, kv: bool) -> Layout:
        queries, keys = self.plan.shards
        return keys if kv else queries

    def _rearranged(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.plan.shards == (self.plan.queries, self.plan.keys):
            return None
        queries, keys = self.plan.queries.positions(self.rank), self.plan.keys.positions(self.rank)
        return (
            _found(queries, self._positions),
            _found(keys, self._kv_positions),
            _found(self._positions, queries),
        )

    def _rows(self, x: Tensor, dim: int, kv: bool, fill: float) -> Tensor:
        positions = self._kv_positions if kv else self._positions
        rows = _take(x, dim, positions.clamp_min(0))
        if positions[-1] < 0:  # padding stands at the end
            padding = int((positions < 0).sum())
            rows.narrow(dim, len(positions) - padding, padding).fill_(fill)
        return rows

    def _whole(self, x: Tensor, dim: int, kv: bool) -> Tensor:
        if not self._shares:
            gathered = x
        else:
            self._agree(x, dim, kv)
            # As bytes, so that every dtype travels over every backend.
            mine = x.contiguous()
            shards = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather([_bytes(shard) for shard in shards], _bytes(mine), group=self.group)
            gathered = torch.cat(shards, dim)
        return _take(gathered, dim, self._origin(kv))

    @property
    def _shares(self) -> bool:
        """Whether other ranks hold rows too."""
        return self.group is not None and self.world > 1

    def _agree(self, x: Tensor, dim: int, kv: bool) -> None:
        """A collective that one rank comes to with another shape would hang, or mix up numbers."""
        key = x.shape, x.dtype, x.device.type, dim, kv
        if key not in self._signatures:
            fields = {
                "operation": "gathering shards",
                "shape": str(tuple(x.shape)),
                "dtype": str(x.dtype),
                "device": x.device.type,
                "dim": str(dim),
                "kv": str(kv),
                "plan": self.digest,
            }
            self._signatures[key] = Signature(fields)
        agreement = agreement_of(self.group)
        agreement.check(agreement.next_call(), self._signatures[key], self.timeout)

    def _origin(self, kv: bool) -> Tensor:
        """For each token, its row among all ranks' shards end to end."""
        layout = self._layout(kv)
        positions = torch.cat([layout.positions(rank) for rank in range(self.world)])
        origin = torch.empty(layout.length, dtype=torch.int64, device="cpu")
        held = positions >= 0
        origin[positions[held]] = torch.nonzero(held).flatten()
        return origin


def _take(x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Rows of ``x`` by index; torch indexes no wide unsigned integers, so as signed ones."""
    signed = _SIGNED.get(x.dtype)
    view = x if signed is None else x.view(signed)
    taken = view.index_select(dim, rows.to(x.device))
    return taken if signed is None else taken.view(x.dtype)


_SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def _found(wanted: Tensor, among: Tensor) -> Tensor:
    """Where each wanted position stands; padding, at the end of both, stays where it is."""
    rows = torch.arange(len(wanted), device="cpu")
    held = wanted >= 0
    order = torch.argsort(among[held])
    rows[held] = order[torch.searchsorted(among[held][order], wanted[held])]
    return rows


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _check_length(x: Tensor, dim: int, expected: int, what: str, plan: RankPlan) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor, got {type(x).__name__}")
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != expected:
        raise InputError(
            f"tensor of shape {tuple(x.shape)}: dimension {dim} should be {what}, {expected} rows "
            f"long, for {plan!r}"
        )


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, plan: RankPlan, kv: bool, fill: float) -> Tensor:
        ctx.dim, ctx.plan, ctx.kv = dim, plan, kv
        return plan._rows(x, dim, kv, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Unshard.apply(grad, ctx.dim, ctx.plan, ctx.kv), None, None, None, None  # type: ignore[no-untyped-call]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, plan: RankPlan, kv: bool) -> Tensor:
        ctx.dim, ctx.plan, ctx.kv = dim, plan, kv
        return plan._whole(x, dim, kv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Shard.apply(grad, ctx.dim, ctx.plan, ctx.kv, 0), None, None, None  # type: ignore[no-untyped-call]

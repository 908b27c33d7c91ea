"""A call on a mesh: heads are exchanged before and after a ring attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ring_attention_distributed.exchange import HeadExchange
from ring_attention_distributed.heads import Split
from ring_attention_distributed.levels import Levels
from ring_attention_distributed.mesh import Mesh, Places
from ring_core.calls import Call
from ring_core.given import Given
from ring_core.rank_plan import RankPlan
from ring_core.softmax import accumulation_dtype


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What a call's heads and plan make of a mesh.

    Attributes:
        ring: the plan of this rank's ring, for the heads that this rank holds; in two levels where
            it spans several hosts.
        queries, keys: where the shards' rows stand in the ring's.
    """

    mesh: Mesh
    split: Split
    ring: RankPlan | Levels
    queries: Places
    keys: Places


class MeshCall(Call):
    """Heads are exchanged in the backward once more: saving both would take twice the memory.

    Args:
        arrangement: makes what the plan and the heads make of a mesh, once the ranks have agreed.
    """

    def __init__(self, *call: Any, arrangement: Callable[[], Arrangement], **rest: Any) -> None:
        super().__init__(*call, **rest)
        self._make = arrangement
        self._whole_queries: Tensor | None = None

    @cached_property
    def arrangement(self) -> Arrangement:
        """How rows and heads are dealt out."""
        return self._make()

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.arrangement.mesh.degree == 1:
            return self._around(q, k, v)
        exchange, split, rows = (
            self._exchange(q, "forward"),
            self.arrangement.split,
            self.arrangement.queries,
        )
        (queries,), (keys, values) = self._in(exchange, [q], k, v)
        self._whole_queries = q
        out, lse = self._around(queries, keys, values)
        self._whole_queries = None
        out, lse = exchange.to_rows([out, _beside(lse)], split.q, split.q_heads, rows)
        return out, _behind(lse)

    def differentiated(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        arrangement, split = self.arrangement, self.arrangement.split
        if arrangement.mesh.degree == 1:
            return self._back(given)
        q, k, v, dlse = given.q, given.k, given.v, given.dlse
        exchange = self._exchange(q, "backward")
        of_queries = [q, given.dout, given.out, _beside(given.lse)]
        if dlse is not None:
            of_queries.append(_beside(dlse))
        found, (keys, values) = self._in(exchange, of_queries, k, v)
        self._whole_queries = q
        inside = Given(
            dout=found[1],
            dlse=_behind(found[4]) if dlse is not None else None,
            q=found[0],
            k=keys,
            v=values,
            out=found[2],
            lse=_behind(found[3]),
        )
        # Parts of one gradient that are rounded before they are added would cost accuracy.
        dq, dk, dv = self._back(inside, accumulation_dtype(k.dtype) if split.shares else None)
        self._whole_queries = None
        (dq,) = exchange.to_rows([dq], split.q, split.q_heads, arrangement.queries)
        if not self.need_kv:
            return dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
        dk, dv = exchange.to_rows([dk, dv], split.kv, split.kv_heads, arrangement.keys)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _around(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention around the ring."""
        ring = self.arrangement.ring
        if isinstance(ring, Levels):
            return ring.attend(self, q, k, v)
        return self.attend(ring, q, k, v)

    def _back(
        self, given: Given, kv_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients around the ring."""
        ring = self.arrangement.ring
        if isinstance(ring, Levels):
            return ring.differentiate(self, given, kv_dtype)
        return self.differentiate(ring, given, kv_dtype)

    def chosen(self, plan: RankPlan, q: Tensor, k: Tensor, tag: int) -> Any:
        arrangement = self.arrangement
        if arrangement.split.shares and plan.plan.chooses and self._whole_queries is not None:
            # What is chosen depends on all query heads of a KV head.
            exchange = HeadExchange(arrangement.mesh, self._communicator(q), tag)
            (q,) = exchange.to_heads(
                [self._whole_queries], arrangement.split.groups(), arrangement.queries
            )
        return super().chosen(plan, q, k, tag)

    def _in(
        self, exchange: HeadExchange, of_queries: list[Tensor], k: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        arrangement, split = self.arrangement, self.arrangement.split
        return (
            exchange.to_heads(of_queries, split.q, arrangement.queries),
            exchange.to_heads([k, v], split.kv, arrangement.keys),
        )

    def _exchange(self, q: Tensor, direction: str) -> HeadExchange:
        return HeadExchange(self.arrangement.mesh, self._communicator(q), self.tag(direction))

    def _communicator(self, q: Tensor) -> Any:
        communicator = self.runtime.communicator(self.plan, q.device)
        assert communicator is not None
        return communicator


def _beside(lse: Tensor) -> Tensor:
    """[B, H, S] as [B, S, H, 1]."""
    return lse.transpose(1, 2).unsqueeze(-1)


def _behind(lse: Tensor) -> Tensor:
    """[B, S, H, 1] as [B, H, S]."""
    return lse.squeeze(-1).transpose(1, 2)

"""One call: its number, its checks with the other ranks, and the engine under autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ring_core import engine
from ring_core.agreement import Signature, tag
from ring_core.engine import Settings
from ring_core.errors import DifferentiationError
from ring_core.program import Program
from ring_core.rank_plan import RankPlan
from ring_core.runtime import Runtime, agreement_of


class Call:
    """One call of an attention on this rank.

    Args:
        number: of the call among all that the ranks of the group make; 0 with one rank.
    """

    def __init__(
        self,
        runtime: Runtime,
        plan: RankPlan,
        number: int,
        training: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        config = runtime.config
        dropout = config.dropout if training else 0.0
        self.runtime, self.plan, self.number = runtime, plan, number
        self.group = plan.group if plan.world > 1 else None
        self.signature: Signature | None = None
        if self.group is not None:
            self.signature = runtime.signature(q, k, v, plan, dropout)
            agreement_of(self.group).check(number, self.signature, config.timeout)
        self.communicator = runtime.communicator(plan, q.device)
        self.settings = Settings(
            scale=config.scale(q.shape[-1]),
            overlap=config.overlap,
            deterministic=config.deterministic,
            dropout=dropout,
            # Drawn from torch's CPU generator, so that checkpointing replays it.
            seed=int(torch.randint(2**62, ()).item()) if dropout else 0,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        with engine.quiet(q.device), _FailingAlike(self):
            program = self._program(q, v.shape[-1])
            return engine.forward(program, q, k, v, self.communicator, self._tagged("forward"))

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: tuple[Tensor, ...], need_kv: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        q, k, v, out, lse = saved
        with engine.quiet(q.device), _FailingAlike(self):
            return engine.backward(
                self._program(q, v.shape[-1] + (dlse is not None)),
                dout,
                q,
                k,
                v,
                out,
                lse,
                self.communicator,
                self._tagged("backward"),
                dlse=dlse,
                need_kv=need_kv,
            )

    def _program(self, q: Tensor, value_dim: int) -> Program:
        return self.runtime.program(self.plan, q, value_dim, bool(self.settings.dropout))

    def _tagged(self, direction: str) -> Settings:
        if self.signature is None:
            return self.settings
        return replace(self.settings, tag=tag(self.number, direction, self.signature))


class _FailingAlike:
    """Turn a late peer into the one error that every rank of the group raises."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        call = self.call
        if not isinstance(error, Exception) or call.group is None or call.signature is None:
            return
        try:
            agreed = agreement_of(call.group).explain(call.number, call.signature, error)
        except RuntimeError:  # the store went down with the rank that served it
            return
        if agreed is not None:
            raise agreed from error


class Ring(torch.autograd.Function):
    """The engine under autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = call.forward(q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True: these gradients would carry no graph
            raise DifferentiationError(
                "ring attention is differentiable once: call backward or autograd.grad without "
                "create_graph=True, or compute this layer with dense attention"
            )
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        need_q, need_k, need_v, _ = ctx.needs_input_grad
        dq, dk, dv = ctx.call.backward(dout, dlse, (q, k, v, out, lse), need_k or need_v)
        return (
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            None,
        )

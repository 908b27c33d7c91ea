"""One call: its number, its checks with the other ranks, and the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ring_core import engine
from ring_core.agreement import Signature, tag
from ring_core.engine import Settings
from ring_core.exchange import Exchange
from ring_core.program import Program
from ring_core.protocols import Communicator
from ring_core.rank_plan import RankPlan
from ring_core.runtime import Runtime, agreement_of


class Call:
    """One call of an attention on this rank, forward or backward.

    Args:
        choose: what the attention chooses for a call by its tensors.
        number: of the call among all that the ranks of the group make; 0 with one rank.
        wants: of which of q, k and v gradients are wanted.
        seed: of the weights that are dropped.
    """

    def __init__(
        self,
        runtime: Runtime,
        choose: Callable[[RankPlan, Tensor, Tensor, Exchange], Any],
        plan: RankPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        number: int,
        training: bool,
        wants: tuple[bool, bool, bool],
        seed: int,
    ) -> None:
        config = runtime.config
        dropout = config.dropout if training else 0.0
        self.runtime, self.plan, self.number, self.seed = runtime, plan, number, seed
        self.choose = choose
        self.group = plan.group if plan.world > 1 else None
        self.wants = wants
        self.signature: Signature | None = None
        if self.group is not None:
            self.signature = runtime.signature(q, k, v, plan, dropout, wants)
        self.settings = Settings(
            scale=config.scale(q.shape[-1]),
            overlap=config.overlap,
            deterministic=config.deterministic,
            dropout=dropout,
            seed=seed,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        if self.group is not None and self.signature is not None:
            timeout = self.runtime.config.timeout
            agreement_of(self.group).check(self.number, self.signature, timeout)
        program = self._program(q, v)
        settings, communicator = self._tagged("forward"), self._communicator(q)
        with engine.quiet(q.device), _FailingAlike(self):
            choice = self._choice(q, k, settings)
            return engine.forward(program, q, k, v, communicator, settings, choice=choice)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        q, k, v, out, lse = saved
        program = self._program(q, v, columns=int(dlse is not None))
        settings, communicator = self._tagged("backward"), self._communicator(q)
        with engine.quiet(q.device), _FailingAlike(self):
            choice = self._choice(q, k, settings)
            return engine.backward(
                program,
                dout,
                q,
                k,
                v,
                out,
                lse,
                communicator,
                settings,
                dlse=dlse,
                need_kv=self.wants[1] or self.wants[2],
                choice=choice,
            )

    def _communicator(self, q: Tensor) -> Communicator | None:
        return self.runtime.communicator(self.plan, q.device)

    def _choice(self, q: Tensor, k: Tensor, settings: Settings) -> Any:
        """The same in forward and backward: chosen again from the same tensors."""
        plan = self.plan
        exchange = Exchange(plan.rank, plan.world, self._communicator(q), settings.tag)
        return self.choose(plan, q, k, exchange)

    def _program(self, q: Tensor, v: Tensor, columns: int = 0) -> Program:
        return self.runtime.program(self.plan, q, v, bool(self.settings.dropout), columns)

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

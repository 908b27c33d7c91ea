"""One call: its number, its checks with the other ranks, and the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ring_core import engine
from ring_core.agreement import Signature, agreement_of, tag
from ring_core.engine import Settings
from ring_core.exchange import Exchange
from ring_core.given import Given
from ring_core.program import Program
from ring_core.protocols import Communicator, Selection
from ring_core.rank_plan import RankPlan
from ring_core.runtime import Runtime


class AnyCall(Protocol):
    """What the operator runs: a :class:`Call`, or what stands around one."""

    number: int
    seed: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        ...

    def backward(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        ...


class Call:
    """One call of an attention on this rank, forward or backward.

    A variant that does more than attend, such as exchanging heads before, subclasses it and
    overrides :meth:`attended` and :meth:`differentiated`.

    Args:
        choose: what the attention chooses for a call by its tensors.
        number: of the call among all that the ranks of the group make; 0 with one rank.
        wants: of which of q, k and v gradients are wanted.
        seed: of the weights that are dropped.
        also: what ranks compare beside what every call has, by name.
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
        also: tuple[tuple[str, str], ...] = (),
    ) -> None:
        config = runtime.config
        dropout = config.dropout if training else 0.0
        self.runtime, self.plan, self.number, self.seed = runtime, plan, number, seed
        self.choose = choose
        self.group = plan.group if plan.world > 1 else None
        self.wants = wants
        self.signature: Signature | None = None
        if self.group is not None:
            self.signature = runtime.signature(q, k, v, plan, dropout, wants, also)
        self.settings = Settings(
            scale=config.scale(q.shape[-1]),
            overlap=config.overlap,
            deterministic=config.deterministic,
            dropout=dropout,
            seed=seed,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        self.agree()
        with engine.quiet(q.device), _FailingAlike(self):
            return self.attended(q, k, v)

    def backward(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        with engine.quiet(given.q.device), _FailingAlike(self):
            return self.differentiated(given)

    def agree(self) -> None:
        """Wait until every rank of the group came to this call with an equal signature.

        Raises:
            DisagreementError: some rank did not.
        """
        if self.group is not None and self.signature is not None:
            timeout = self.runtime.config.timeout
            agreement_of(self.group).check(self.number, self.signature, timeout)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, between ranks that agreed to it."""
        return self.attend(self.plan, q, k, v)

    def differentiated(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`backward`, between ranks that agreed to it."""
        return self.differentiate(self.plan, given)

    def attend(self, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The engine's forward by ``plan``, whose group may be a part of the call's."""
        program = self.program(plan, q, v)
        settings = self.tagged("forward", plan)
        choice = self.chosen(plan, q, k, settings.tag)
        communicator = self._moving(plan, q.device, choice)
        return engine.forward(program, q, k, v, communicator, settings, choice=choice)

    def differentiate(
        self, plan: RankPlan, given: Given, kv_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The engine's backward by ``plan``, whose group may be a part of the call's."""
        q, k, v = given.q, given.k, given.v
        program = self.program(plan, q, v, columns=int(given.dlse is not None))
        settings = self.tagged("backward", plan)
        choice = self.chosen(plan, q, k, settings.tag)
        return engine.backward(
            program,
            given.dout,
            q,
            k,
            v,
            given.out,
            given.lse,
            self._moving(plan, q.device, choice),
            settings,
            dlse=given.dlse,
            need_kv=self.need_kv,
            kv_dtype=kv_dtype,
            choice=choice,
        )

    def _moving(self, plan: RankPlan, device: torch.device, choice: Any) -> Communicator | None:
        """What moves the plan's rows, or of them those that were chosen."""
        communicator = self.runtime.communicator(plan, device)
        if communicator is None or not communicator.selects or not isinstance(choice, Selection):
            return communicator
        return communicator.among(choice)

    @property
    def need_kv(self) -> bool:
        """Whether gradients of keys and values go home: alike on all ranks."""
        return self.wants[1] or self.wants[2]

    def tag(self, direction: str) -> int:
        """Of this call's messages in that direction."""
        return 0 if self.signature is None else tag(self.number, direction, self.signature)

    def chosen(self, plan: RankPlan, q: Tensor, k: Tensor, tag: int) -> Any:
        """The same in forward and backward: chosen again from the same tensors."""
        communicator = self.runtime.communicator(plan, q.device)
        return self.choose(plan, q, k, Exchange(plan.rank, plan.world, communicator, tag))

    def program(self, plan: RankPlan, q: Tensor, v: Tensor, columns: int = 0) -> Program:
        """What the engine runs for a plan, where ``out`` has ``columns`` more than the values."""
        return self.runtime.program(plan, q, v, bool(self.settings.dropout), columns)

    def tagged(self, direction: str, plan: RankPlan) -> Settings:
        """The call's settings for one direction, with the heads that the plan's tensors have."""
        first = 0 if plan.held is None else plan.held.first_query
        return replace(self.settings, tag=self.tag(direction), first_head=first)


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

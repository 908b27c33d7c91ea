"""A forward or a backward that ends alike on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_attention_distributed.finite import not_finite
from ring_core import engine
from ring_core.agreement import agreement_of
from ring_core.attempts import Attempts
from ring_core.calls import Call
from ring_core.errors import NonFiniteError, RingError
from ring_core.given import Given
from ring_core.rank_plan import RankPlan

T = TypeVar("T", bound=tuple[Tensor, ...])


@dataclass(frozen=True, eq=False)
class _Run(Generic[T]):
    """A forward or a backward.

    Attributes:
        by: runs it by a call. inputs: what is checked before its results, by name. names: of its
            first results.
    """

    direction: str
    by: Callable[[Call], T]
    inputs: Mapping[str, Tensor]
    names: Sequence[str]

    def not_finite(self, plan: RankPlan, result: T) -> str | None:
        """See :func:`ring_attention_distributed.finite.not_finite`."""
        results = dict(zip(self.names, result, strict=False))
        return not_finite(plan, {**self.inputs, **results})


class _Attempts(Attempts[T]):
    """Attempts at a forward or a backward.

    Args:
        call: of the group. finite: whether to check what comes out.
        forget: what holds on to a process group that failed.
    """

    logger: ClassVar[logging.Logger] = logging.getLogger("ring_attention_distributed")

    def __init__(
        self,
        run: _Run[T],
        call: Call,
        *,
        finite: bool,
        forget: Callable[[], None],
        **limits: Any,
    ) -> None:
        super().__init__(
            call.plan.group,
            f"{run.direction} of call {call.number}",
            timeout=call.runtime.config.timeout,
            **limits,
        )
        self._run, self._call, self._finite, self._forget = run, call, finite, forget

    def check(self, result: T) -> str | None:
        return self._run.not_finite(self._call.plan, result) if self._finite else None

    def failed(self) -> None:
        self._forget()

    def lost(self, error: RingError) -> RingError:
        return agreement_of(self._call.plan.group).end(self._call.number, error)


class SteadyCall:
    """A call whose forward and backward are tried until they end alike on all ranks; see
    :class:`ring_core.attempts.Attempts`.

    Args:
        call: of the group, for its number and for what ranks compare.
        on: makes the call that attends, by a plan over the process group to use.
        device: of the tensors.
        attempts: retries, backoff, and what else :class:`_Attempts` takes.

    Attributes:
        retried: attempts after the first, so far.
    """

    def __init__(
        self, call: Call, on: Callable[[RankPlan], Call], *, device: torch.device, **attempts: Any
    ) -> None:
        self._call, self._on, self._device, self._attempts = call, on, device, attempts
        self.number, self.seed = call.number, call.seed
        self.retried = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        self._call.agree()
        inputs = {"q": q, "k": k, "v": v}
        run: _Run[tuple[Tensor, Tensor]] = _Run(
            "forward", lambda call: call.attended(q, k, v), inputs, ("out",)
        )
        return self._steadily(run)

    def backward(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        run: _Run[tuple[Tensor, Tensor, Tensor]] = _Run(
            "backward",
            lambda call: call.differentiated(given),
            {"the gradient of out": given.dout},
            ("dq", "dk", "dv"),
        )
        return self._steadily(run)

    def _steadily(self, run: _Run[T]) -> T:
        plan = self._call.plan
        if plan.world == 1:
            return self._alone(run)

        def attempt(group: Any) -> T:
            with engine.quiet(self._device):
                return run.by(self._on(_over(plan, group)))

        attempts = _Attempts(run, self._call, device=self._device, **self._attempts)
        try:
            return attempts.run(attempt)
        finally:
            self.retried += attempts.retried

    def _alone(self, run: _Run[T]) -> T:
        """With one rank there is nobody to meet."""
        with engine.quiet(self._device):
            result = run.by(self._call)
        if found := run.not_finite(self._call.plan, result):
            raise NonFiniteError(f"{run.direction}: {found}")
        return result


_overs: WeakKeyDictionary[RankPlan, RankPlan] = WeakKeyDictionary()


def _over(plan: RankPlan, group: Any) -> RankPlan:
    """The plan over the process group of an attempt."""
    made = _overs.get(plan)
    if made is None or made.group is not group:
        made = RankPlan(plan.plan, plan.sequences, group, plan.made_by, within=True)
        _overs[plan] = made
    return made

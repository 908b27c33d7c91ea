"""A call that ends alike on all ranks: tried again after failed transfers, or one error for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_attention_distributed.finite import not_finite
from ring_attention_distributed.lane import Lane, lane_of
from ring_attention_distributed.verdict import Report
from ring_core import engine
from ring_core.agreement import agreement_of
from ring_core.calls import Call
from ring_core.errors import CommunicatorError, NonFiniteError, RingTimeoutError
from ring_core.given import Given
from ring_core.rank_plan import RankPlan

logger = logging.getLogger("ring_attention_distributed")

T = TypeVar("T", bound=tuple[Tensor, ...])

WAIT = 0.75
"""Of the deadline, what a transfer may take; the rest is for the ranks to meet."""


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


class SteadyCall:
    """An attempt is the whole forward, or backward, from inputs that nobody changed. When it ended,
    well or not, the ranks meet: all go on, all try again on a fresh process group, or all raise.

    Args:
        call: of the group, for its number and for what ranks compare.
        on: makes the call that attends, by a plan over the process group to use.
        device: of the tensors.
        retries: attempts after the first. backoff: seconds before the second, then twice as long.
        finite: whether to check what comes out.
        forget: what holds on to a process group that failed.

    Attributes:
        retried: attempts after the first, so far.
    """

    def __init__(
        self,
        call: Call,
        on: Callable[[RankPlan], Call],
        *,
        device: torch.device,
        retries: int,
        backoff: float,
        finite: bool,
        forget: Callable[[], None],
    ) -> None:
        self._call, self._on, self._device = call, on, device
        self._retries, self._backoff, self._finite = retries, backoff, finite
        self._forget = forget
        self._timeout = call.runtime.config.timeout
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
        call, plan = self._call, self._call.plan
        if plan.world == 1:
            return self._alone(run)
        lane = lane_of(plan.group)
        for attempt in range(self._retries + 1):
            what = f"{run.direction} of call {call.number}"
            if attempt:
                what += f", attempt {attempt + 1}"
            here = f"rank {plan.rank} of {plan.world}, {what}"
            result: T | None = None
            raised: Exception | None = None
            started = time.monotonic()
            try:
                with engine.quiet(self._device):
                    result = run.by(self._on(lane_plan(plan, lane, WAIT * self._timeout)))
                    self._settle(here, started)
                report = Report("done")
                if self._finite:
                    found = run.not_finite(plan, result)
                    report = Report("nonfinite", f"{here}: {found}") if found else report
            except (RingTimeoutError, CommunicatorError) as error:
                report, raised = Report("late", f"{here}: {error}"), error
            except Exception as other:
                report = Report("raised", f"{here}: {type(other).__name__}: {other}")
                raised = other
            left = self._timeout - (time.monotonic() - started)
            verdict = lane.meetings.meet(what, report, max(left, (1 - WAIT) * self._timeout))
            if verdict.error is not None and not isinstance(verdict.error, NonFiniteError):
                lane.fail()  # what was on its way when a rank broke off would come still
                self._forget()
            if verdict.error is None:
                assert result is not None
                return result
            if verdict.again and attempt < self._retries:
                self.retried += 1
                pause = self._backoff * 2**attempt
                logger.warning("%s; trying again in %g s", verdict.text, pause)
                time.sleep(pause)
                continue
            ending = verdict.error
            if verdict.lost:
                ending = agreement_of(plan.group).end(call.number, ending)
            if report.ending == "raised" and raised is not None:
                raise raised  # the others have it by name
            raise ending from raised
        raise AssertionError("an attempt ends with a result, another attempt or an error")

    def _alone(self, run: _Run[T]) -> T:
        """With one rank there is nobody to meet."""
        with engine.quiet(self._device):
            result = run.by(self._call)
        if found := run.not_finite(self._call.plan, result):
            raise NonFiniteError(f"{run.direction}: {found}")
        return result

    def _settle(self, here: str, started: float) -> None:
        """Wait until a GPU has done its part: only then is it known whether all came."""
        device = self._device
        if device.type != "cuda":
            return
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() - started > WAIT * self._timeout:
                raise RingTimeoutError(f"{here}: the GPU waits for a peer's data")
            time.sleep(2e-5)


_on_lanes: WeakKeyDictionary[RankPlan, RankPlan] = WeakKeyDictionary()


def lane_plan(plan: RankPlan, lane: Lane, timeout: float) -> RankPlan:
    """The plan over the lane's process group of the moment."""
    group = lane.over(plan.group, timeout)
    made = _on_lanes.get(plan)
    if made is None or made.group is not group:
        made = RankPlan(plan.plan, plan.sequences, group, plan.made_by, within=True)
        _on_lanes[plan] = made
    return made

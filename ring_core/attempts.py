"""An operation that ends alike on all ranks: tried again after failed transfers, or one error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch

from ring_core.errors import CommunicatorError, NonFiniteError, RingError, RingTimeoutError
from ring_core.groups import rank_and_world
from ring_core.lane import lane_of
from ring_core.meetings import Report

T = TypeVar("T")

WAIT = 0.75
"""Of the deadline, what a transfer may take; the rest is for the ranks to meet."""


class Attempts(Generic[T]):
    """An attempt is the whole operation, from inputs that nobody changed. When it ended, well or
    not, the ranks meet: all go on, all try again on a fresh process group, or all raise.

    A subclass may look at results, and at what becomes of the process group.

    Args:
        group: of more than one rank; all of them make the same operations in the same order.
        operation: for messages; alike on all ranks.
        device: where results are.
        timeout: seconds for an attempt and for the ranks to meet after it.
        retries: attempts after the first. backoff: seconds before the second, then twice as long.

    Attributes:
        retried: attempts after the first, so far.
    """

    logger: ClassVar[logging.Logger] = logging.getLogger("ring_core")

    def __init__(
        self,
        group: Any,
        operation: str,
        *,
        device: torch.device,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        self._group, self._operation, self._device = group, operation, device
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self.retried = 0

    def run(self, attempt: Callable[[Any], T]) -> T:
        """What ``attempt`` returns, when it has ended well on all ranks.

        Args:
            attempt: by a process group of the library's own. Its transfers may take ``WAIT`` of
                ``timeout``, and raise RingTimeoutError or CommunicatorError where they fail.

        Raises:
            RingTimeoutError: transfers failed in the last attempt; the same on all ranks.
            NonFiniteError: :meth:`check` found something; the same on all ranks.
            RankFailedError: ranks raised something else, did not come in time, or are at another
                operation; or the store through which they meet is gone.
            Exception: any other, as ``attempt`` raised it on this rank.
        """
        lane = lane_of(self._group)
        rank, world = rank_and_world(self._group)
        for number in range(self._retries + 1):
            what = self._operation
            if number:
                what += f", attempt {number + 1}"
            here = f"rank {rank} of {world}, {what}"
            result: T | None = None
            raised: Exception | None = None
            started = time.monotonic()
            try:
                result = attempt(lane.over(self._group, WAIT * self._timeout))
                self._settle(here, started)
                found = self.check(result)
                report = Report("nonfinite", f"{here}: {found}") if found else Report("done")
            except (RingTimeoutError, CommunicatorError) as error:
                report, raised = Report("late", f"{here}: {error}"), error
            except Exception as other:
                report = Report("raised", f"{here}: {type(other).__name__}: {other}")
                raised = other
            left = self._timeout - (time.monotonic() - started)
            verdict = lane.meetings.meet(what, report, max(left, (1 - WAIT) * self._timeout))
            if verdict.error is None:
                return cast(T, result)
            if not isinstance(verdict.error, NonFiniteError):
                lane.fail()  # what was on its way when a rank broke off would come still
                self.failed()
            if verdict.again and number < self._retries:
                self.retried += 1
                pause = self._backoff * 2**number
                self.logger.warning("%s; trying again in %g s", verdict.text, pause)
                time.sleep(pause)
                continue
            ending = self.lost(verdict.error) if verdict.lost else verdict.error
            if report.ending == "raised" and raised is not None:
                raise raised  # the others have it by name
            raise ending from raised
        raise AssertionError("an attempt ends with a result, another attempt or an error")

    def check(self, result: T) -> str | None:
        """What is wrong with numbers of a result, for NonFiniteError; None: nothing."""
        return None

    def failed(self) -> None:
        """The process group of an attempt is given up: drop what holds on to it."""

    def lost(self, error: RingError) -> RingError:
        """What to raise where ranks are gone, in place of ``error``; all ranks ask."""
        return error

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

"""An observer of transfers: what they move, and how long a call waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ring_attention_distributed.monitor import Span, current
from ring_core.hookspecs import Observer
from ring_core.protocols import Communicator, Pending
from ring_core.wrapping import WrappedCommunicator


class Watching(Observer):
    """Of the attentions whose config asks for a monitor."""

    def communicator(self, communicator: Communicator) -> Communicator:
        return Watched(communicator)


class Watched(WrappedCommunicator):
    """A communicator whose transfers are counted in the call that this thread is in."""

    def fetch(self, *transfer: Any) -> Pending:
        """As the communicator's."""
        return self._counted(self.inner.fetch, transfer)

    def give_back(self, *transfer: Any) -> Pending:
        """As the communicator's."""
        return self._counted(self.inner.give_back, transfer)

    def _counted(self, start: Callable[..., Pending], transfer: tuple[Any, ...]) -> Pending:
        span, counters = current(), self.counters
        before = counters.moved()
        pending = start(*transfer)
        if span is None:
            return pending
        span.moved.append((before, counters.moved()))
        return _Timed(pending, span)


class _Timed:
    def __init__(self, pending: Pending, span: Span) -> None:
        self._pending, self._span = pending, span

    def wait(self) -> list[Any]:
        before = self._span.clock.now()
        try:
            return self._pending.wait()
        finally:
            self._span.waits.append((before, self._span.clock.now()))

    def release(self) -> None:
        self._pending.release()

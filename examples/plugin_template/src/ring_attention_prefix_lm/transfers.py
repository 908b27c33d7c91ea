"""An observer that logs what calls fetch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ring_core import Observer

if TYPE_CHECKING:
    from ring_core.protocols import Communicator, Pending
    from ring_core.rounds import Round
    from torch import Tensor

logger = logging.getLogger("ring_attention_prefix_lm")


class TransferLog(Observer):
    """Wraps the communicator of one attention."""

    def communicator(self, communicator: Communicator) -> Communicator:
        """``communicator``, whose fetches are logged."""
        return cast("Communicator", _Logged(communicator))


class _Logged:
    """A communicator that logs what it fetches and is otherwise the one it wraps."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self._tag, self._fetched = 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        """As the communicator's; forward and backward of a call have a tag each."""
        counters = self._inner.counters
        before = counters.bytes_received
        pending = self._inner.fetch(one, tensors, tag)
        if tag != self._tag:
            self._tag, self._fetched = tag, 0
        fetched = counters.bytes_received - before
        self._fetched += fetched
        logger.info(
            "round %d: fetching %d bytes, %d bytes in this call", one.index, fetched, self._fetched
        )
        return pending

"""An observer that logs what calls fetch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ring_core import Observer, WrappedCommunicator
from ring_core.protocols import Communicator, Pending
from ring_core.rounds import Round
from torch import Tensor

logger = logging.getLogger("ring_attention_prefix_lm")


class TransferLog(Observer):
    """Wraps the communicator of one attention."""

    def communicator(self, communicator: Communicator) -> Communicator:
        """``communicator``, whose fetches are logged."""
        return _Logged(communicator)


class _Logged(WrappedCommunicator):
    """A communicator that logs what it fetches."""

    _tag = _fetched = 0

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        """As the communicator's; forward and backward of a call have a tag each."""
        before = self.counters.bytes_received
        pending = super().fetch(one, tensors, tag)
        if tag != self._tag:
            self._tag, self._fetched = tag, 0
        fetched = self.counters.bytes_received - before
        self._fetched += fetched
        logger.info(
            "round %d: fetching %d bytes, %d bytes in this call", one.index, fetched, self._fetched
        )
        return pending

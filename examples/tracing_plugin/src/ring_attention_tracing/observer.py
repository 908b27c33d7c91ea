"""An observer that writes every transfer of an attention into this process's trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ring_core import Observer, WrappedCommunicator
from ring_core.groups import ranks_of
from ring_core.protocols import Communicator, Pending
from ring_core.rounds import Round, Step
from torch import Tensor

from ring_attention_tracing.trace import TraceFile

_EPOCH = time.time_ns() - time.perf_counter_ns()
"""Added to a clock that never jumps, so that ranks' traces can be laid beside each other."""


@cache
def trace_of(path: str, rank: int) -> TraceFile:
    """The trace of this process: one for all of its attentions."""
    return TraceFile(Path(f"{path}.rank{rank}.json"), rank)


class Tracing(Observer):
    """Wraps communicators; kernels stay as they are.

    Args:
        path: what the names of all ranks' files begin with.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def communicator(self, communicator: Communicator) -> Communicator:
        """``communicator``, whose transfers are written down."""
        trace = trace_of(self._path, dist.get_rank())
        return _Traced(communicator, trace)


class _Traced(WrappedCommunicator):
    """A communicator that writes down its transfers."""

    def __init__(self, inner: Communicator, trace: TraceFile) -> None:
        super().__init__(inner)
        self._trace = trace
        self._ranks = ranks_of(inner.group)  # rounds name peers by their place in the group

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        """As the communicator's."""
        about = self._about(one, _owners(one), _readers(one))
        return self._started("keys", about, lambda: self.inner.fetch(one, tensors, tag))

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        """As the communicator's; gradients go the way that keys came."""
        about = self._about(one, _readers(one), _owners(one))
        start = self.inner.give_back
        return self._started("gradients", about, lambda: start(one, gradients, like, tag))

    def _about(self, one: Round, senders: Iterable[int], readers: Iterable[int]) -> dict[str, Any]:
        return {
            "round": one.index,
            "from": [self._ranks[peer] for peer in senders],
            "to": [self._ranks[peer] for peer in readers],
        }

    def _started(
        self, name: str, about: dict[str, Any], start: Callable[[], Pending]
    ) -> _TracedTransfer:
        counters = self.counters
        sent, received = counters.bytes_sent, counters.bytes_received
        began, line = _now(), self._trace.begin()
        pending = start()
        about["bytes_sent"] = counters.bytes_sent - sent
        about["bytes_received"] = counters.bytes_received - received
        return _TracedTransfer(pending, lambda: self._trace.add(name, line, began, _now(), about))


class _TracedTransfer:
    """A transfer under way that says when it has been waited for, in vain or not."""

    def __init__(self, pending: Pending, over: Callable[[], None]) -> None:
        self._pending, self._over = pending, over

    def wait(self) -> list[Any]:
        """As the transfer's."""
        try:
            return self._pending.wait()
        finally:
            self._over()

    def release(self) -> None:
        """As the transfer's."""
        self._pending.release()


def _owners(one: Round) -> list[int]:
    """Whose keys this rank reads."""
    return [step.source for step in _between_ranks(one) if step.parts]


def _readers(one: Round) -> list[int]:
    """Who reads this rank's keys."""
    return [step.requester for step in _between_ranks(one) if step.give]


def _between_ranks(one: Round) -> list[Step]:
    return [step for step in one.steps if step.offset]  # at offset 0 a rank copies to itself


def _now() -> int:
    return _EPOCH + time.perf_counter_ns()

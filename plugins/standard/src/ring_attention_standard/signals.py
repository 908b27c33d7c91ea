"""Barriers between streams of different GPUs that need no SM.

Kernels that fill a GPU keep a barrier kernel waiting until they end, and with it every transfer
behind it. Here a rank copies a word into each peer's memory, and its stream waits for the words of
its peers in the GPU's front end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ring_core.errors import CommunicatorError

BARRIERS = ("free", "keys", "gradients of odd rounds", "gradients of even rounds")
"""Two barriers of one name always have another one between them: see :class:`Signals`."""

LARGEST = 72
"""Ranks of the largest group: what one NVLink domain holds."""


class Signals:
    """Words of this rank that its peers set to 1, a set for each of :data:`BARRIERS`.

    A word is put back to 0 once it was seen. The peer cannot set it again before that: it would
    have to pass a barrier of another name first, which this rank enters only afterwards. So no
    numbers count up, and a captured CUDA graph can be replayed.

    Args:
        at: gives a rank's words ``[start, start + numel)`` in memory that all ranks reach, zeroed.
    """

    bytes = len(BARRIERS) * LARGEST * torch.int32.itemsize
    """Room for the words of the largest group."""

    def __init__(self, rank: int, world: int, at: Callable[[int, int, int], Tensor]) -> None:
        from cuda.bindings import driver

        self._driver, self._rank, self._world = driver, rank, world
        peers = [(rank + t) % world for t in range(1, world)]
        self._theirs = [[at(peer, i * world + rank, 1) for peer in peers] for i in _sets()]
        self._mine = [[at(rank, i * world + peer, 1) for peer in peers] for i in _sets()]
        self._one = torch.ones(1, dtype=torch.int32, device=self._mine[0][0].device)

    def barrier(self, name: str, stream: int) -> None:
        """On ``stream``, the current one: what all ranks' streams did before comes before what
        follows."""
        which = BARRIERS.index(name)
        for word in self._theirs[which]:
            word.copy_(self._one)
        equal = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        for word in self._mine[which]:
            self._check(self._driver.cuStreamWaitValue32(stream, word.data_ptr(), 1, equal))
            self._check(self._driver.cuStreamWriteValue32(stream, word.data_ptr(), 0, 0))

    def _check(self, answer: tuple[Any, ...]) -> None:
        if answer[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise CommunicatorError(f"a stream could not wait for a peer's signal: {answer[0]!r}")


def _sets() -> range:
    return range(len(BARRIERS))

"""What every communicator needs beside its transport: paired buffers, deadlines, counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_core.errors import RingTimeoutError
from ring_core.groups import rank_and_world

_Key = tuple[torch.device, torch.dtype, int, bool]


@dataclass
class Counters:
    """What a communicator did since it was made or :meth:`reset`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    transfers: int = 0
    wait_seconds: float = 0.0

    def reset(self) -> None:
        """Start again from zero."""
        self.bytes_sent = self.bytes_received = self.transfers = 0
        self.wait_seconds = 0.0


class BufferPool:
    """Flat buffers that calls of all layers of a group take turns with.

    A buffer on a GPU goes only to users of the stream that it was last used on.
    """

    def __init__(self) -> None:
        self._free: dict[_Key, list[Tensor]] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A flat uninitialised tensor of ``numel`` elements, dtype and device as ``like``'s."""
        free = self._free.setdefault(
            _key(like.device, like.dtype, torch.is_inference_mode_enabled()), []
        )
        large_enough = [i for i, buffer in enumerate(free) if buffer.numel() >= numel]
        if large_enough:
            best = min(large_enough, key=lambda i: free[i].numel())
            return free.pop(best)[:numel]
        # Too small for this request, they would pile up beside those that fit.
        free.clear()
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer that :meth:`take` handed out."""
        whole = buffer if buffer._base is None else buffer._base
        key = _key(whole.device, whole.dtype, whole.is_inference())
        self._free.setdefault(key, []).append(whole)


def _key(device: torch.device, dtype: torch.dtype, inference: bool) -> _Key:
    # Tensors made under inference_mode cannot be written outside of it.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, dtype, stream, inference


_pools: WeakKeyDictionary[Any, BufferPool] = WeakKeyDictionary()


class RingCommunicationMixin:
    """Paired buffers, deadlines and counters for a communicator; it brings the transport.

    Attributes:
        group: the process group. rank, world: this process's place in it.
        timeout: seconds that a wait may take.
        counters: bytes, transfers and waiting time so far.
        buffers: the group's pool, shared by all its communicators.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = group
        self.rank, self.world = rank_and_world(group)
        self.timeout = timeout
        self.counters = Counters()
        self.buffers = _pools.setdefault(group, BufferPool())

    def pair(self, numels: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
        """One buffer per tensor of a transfer: keys and values never share memory."""
        return [
            self.buffers.take(numel, tensor) for numel, tensor in zip(numels, like, strict=True)
        ]

    def wait_for(self, works: Sequence[Any], operation: Callable[[], str]) -> None:
        """Wait for ``works`` until the deadline, and count the time.

        Raises:
            RingTimeoutError: a work failed or is late; names this rank and ``operation``.
        """
        started = time.perf_counter()
        deadline = started + self.timeout
        try:
            for work in works:
                work.wait(timedelta(seconds=max(0.001, deadline - time.perf_counter())))
        except RuntimeError as error:
            waited = time.perf_counter() - started
            late = waited >= self.timeout * 0.99
            reason = f"not done after timeout={self.timeout:g} s" if late else f"failed: {error}"
            raise RingTimeoutError(
                f"rank {self.rank} of {self.world}: {operation()} {reason}. The process group "
                "cannot be used any more; look at the named peer's log first."
            ) from error
        finally:
            self.counters.wait_seconds += time.perf_counter() - started

"""Memory of a group of GPUs that all its ranks can write, and the order in which they do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from ring_attention_standard.meeting import catch_up, share
from ring_attention_standard.signals import Signals
from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world

_LEAST = 256
"""Bytes of the smallest allocation."""


class Memory:
    """Bytes that every rank of a group has at hand, of itself and of each peer.

    Attributes:
        memory: this rank's. known: what users made of places in it, until it is allocated anew.
    """

    def __init__(self, group: Any) -> None:
        self._group = weakref.ref(group)  # the group's region holds this
        self._handle: Any = None
        self._captured: list[Any] = []
        self.memory: Tensor | None = None
        self.known: dict[Any, Any] = {}

    def has(self, needed: int) -> bool:
        """Whether there are ``needed`` bytes; then a graph that is being captured keeps them."""
        enough = self.memory is not None and self.memory.numel() >= needed
        new = not any(kept is self._handle for kept in self._captured)
        if enough and new and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._handle)  # replays use it, whatever comes later
        return enough

    def allocate(self, size: int, timeout: float) -> None:
        """Get ``size`` zeroed bytes; every rank of the group comes here."""
        device = torch.device("cuda", torch.cuda.current_device())
        self.known.clear()
        catch_up(self._group(), device, timeout)
        self.memory = symmetric.empty(max(size, _LEAST), dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize()
        self._handle = share(self.memory, self._group())

    def at(self, rank: int, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """``rank``'s elements from byte ``start`` on, flat."""
        found: Tensor = self._handle.get_buffer(rank, (numel,), dtype, start // dtype.itemsize)
        return found


class Region:
    """A group's shared memory and the stream that uses it.

    Peers write keys and values into ``keys``, gradients into ``slots``; there are two of each, with
    which rounds take turns.
    """

    def __init__(self, group: Any) -> None:
        self.keys = Memory(group), Memory(group)
        self.slots = Memory(group), Memory(group)
        self._words = Memory(group)
        self._rank, self._world = rank_and_world(group)
        self._stream: torch.cuda.Stream | None = None
        self._signals: Signals | None = None

    @property
    def bytes(self) -> int:
        """What this rank holds of it; torch's allocator does not count it."""
        held = (*self.keys, *self.slots, self._words)
        return sum(one.memory.numel() for one in held if one.memory is not None)

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where transfers run."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def grow(self, memory: Memory, needed: int, device: torch.device, timeout: float) -> None:
        """Have ``needed`` bytes; alike on all ranks, so they meet here or none does.

        Args:
            device: this rank's. timeout: seconds to wait for the others.

        Raises:
            CommunicatorError: a CUDA graph is being captured, and memory would have to grow.
        """
        if memory.has(needed):
            return
        if torch.cuda.is_current_stream_capturing():
            raise CommunicatorError(
                "the shared memory is too small for this call and cannot grow while a CUDA graph "
                "is captured: run one forward and backward of the same shapes first"
            )
        with torch.cuda.device(device.index):
            torch.cuda.synchronize()  # with the meeting below: no peer uses the old memory any more
            memory.allocate(needed, timeout)

    def barrier(self, name: str, timeout: float) -> None:
        """Order what all ranks' streams did so far before what they do next.

        Args:
            timeout: seconds to wait for the others at the first one.
        """
        if self._signals is None:
            with torch.inference_mode(False):  # words of an inference could not be set later
                self._words.allocate(Signals.bytes, timeout)
                self._signals = Signals(
                    self._rank,
                    self._world,
                    lambda rank, start, numel: self._words.at(
                        rank, start * torch.int32.itemsize, numel, torch.int32
                    ),
                )
        self._signals.barrier(name, self.stream.cuda_stream)

    def mark(self) -> torch.cuda.Event:
        """Reached when the region's stream did all it was given so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """Have the caller's stream wait for ``mark``."""
        self._caller().wait_event(mark)

    def catch_up(self, device: torch.device) -> None:
        """Have the caller's stream wait for all that was given to the region's so far."""
        with torch.cuda.device(device.index):
            caller = self._caller()
            self.stream.wait_stream(caller)  # a graph that is being captured must know both
            caller.wait_stream(self.stream)

    def used(self) -> None:
        """What arrived has been used on the caller's stream; the next call may come on another."""
        if not torch.cuda.is_current_stream_capturing():
            self.stream.wait_stream(self._caller())

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """On the region's stream, after everything that the caller's stream holds."""
        with torch.cuda.device(device.index):
            caller = self._caller()
            self.stream.wait_stream(caller)
            # torch.cuda.stream asks the environment for devices each time, which takes longer
            torch.cuda.set_stream(self.stream)
            try:
                yield
            finally:
                torch.cuda.set_stream(caller)

    def _caller(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.stream.device_index)

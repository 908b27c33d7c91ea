"""One-sided transfers over symmetric memory: the copy engines move rows while the SMs compute."""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from ring_attention_standard.meeting import compare, share
from ring_attention_standard.signals import LARGEST, Signals
from ring_core.communication import RingCommunicationMixin
from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world
from ring_core.protocols import Pending
from ring_core.rounds import Part, Round, Step
from ring_core.rows import block_views, blocks_numel, part_views, parts_numel, select
from ring_core.softmax import gradient_dtype

_ALIGNED = 256
"""Bytes: tensors begin at multiples of it."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ALLOW_SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class SymmetricMemory(RingCommunicationMixin):
    """Every rank puts its keys where its peers can read them; each pulls what it needs.

    Gradients are pushed into their owner's memory, a slot for each peer, and added by the owner.
    Between writing and reading stand barriers: peers are done with what lies there; everybody's
    keys are there; everybody's gradients are. No kernel runs for any of it, so kernels that fill
    the GPU hold nothing up. Calls of all attentions of a group take turns on one stream.

    A stream that waits for a peer does so without a deadline.
    """

    name: ClassVar[str] = "symmetric"
    priority: ClassVar[int] = 10
    shards: ClassVar[int] = 3

    def __init__(self, group: Any, timeout: float) -> None:
        super().__init__(group, timeout)
        if group not in _regions:
            _regions[group] = _Region(group)
        self._region = _regions[group]

    @classmethod
    def refuse(cls, group: Any, device: torch.device) -> str | None:
        """Ranks compare where they are through the group's store, so all come to one answer."""
        if device.type != "cuda" or torch.version.cuda is None:
            return "between CUDA GPUs only"
        if rank_and_world(group)[1] > LARGEST:
            return f"up to {LARGEST} ranks"
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
            return "needs cuda-bindings, as torch's CUDA builds do: pip install cuda-bindings"
        if group not in _refusals:
            _refusals[group] = _why_apart(group, device)
        return _refusals[group]

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        region = self._region
        flats = [self._buffer(blocks_numel(one.blocks, x), x) for x in tensors]
        views = [block_views(flat, one.blocks, x) for flat, x in zip(flats, tensors, strict=True)]
        with region.turn(tensors[0].device):
            if one.number == 1:
                region.grow(region.keys, _keys_bytes(tensors))
                region.barrier("free")
                for i, x in enumerate(tensors):
                    region.shard(self.rank, tensors, i).copy_(x)
                region.barrier("keys")
            for step in one.steps:
                for i, x in enumerate(tensors):
                    for part in step.parts:
                        there = select(region.shard(step.source, tensors, i), part.rows, part.heads)
                        here = views[i][part.block][:, part.row : part.row + len(part.rows)]
                        here.unflatten(1, there.shape[1:3]).copy_(there)
                    self._count(step, step.give, step.parts, x, x.dtype)
            self.counters.transfers += 1
        return _Transfer(self, list(zip(*views, strict=True)), flats)

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        region = self._region
        received: list[list[tuple[Tensor, ...]]] = []
        with region.turn(like[0].device):
            region.grow(region.slots, _halves(one) * _slots_bytes(one, like))
            for place, step in enumerate(one.steps):
                dtype = gradient_dtype(like[0].dtype, step.rounded)
                mine = []
                for i, x in enumerate(like):
                    theirs = region.slot(step.source, one, place, like, i, step.parts)
                    for slot, part in zip(theirs, gradients[place], strict=True):
                        slot.copy_(part[i])
                    mine.append(region.slot(self.rank, one, place, like, i, step.give))
                    self._count(step, step.parts, step.give, x, dtype)
                received.append(list(zip(*mine, strict=True)))
            region.barrier(f"gradients of {'odd' if one.number % 2 else 'even'} rounds")
            self.counters.transfers += 1
        # What is being pushed, and the slots' memory, live until the caller's stream waited.
        return _Transfer(self, received, [], kept=(gradients, region.slots.memory))

    def _count(
        self,
        step: Step,
        sent: Sequence[Part],
        received: Sequence[Part],
        like: Tensor,
        dtype: torch.dtype,
    ) -> None:
        if step.source != self.rank:
            self.counters.bytes_sent += parts_numel(sent, like) * dtype.itemsize
            self.counters.bytes_received += parts_numel(received, like) * dtype.itemsize

    def _buffer(self, numel: int, like: Tensor) -> Tensor:
        """From the pool; a captured graph keeps its own."""
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(numel, dtype=like.dtype, device=like.device)
        return self.buffers.take(numel, like)


class _Transfer:
    """Copies under way on the region's stream."""

    def __init__(
        self,
        communicator: SymmetricMemory,
        received: list[Any],
        borrowed: Sequence[Tensor],
        kept: Any = None,
    ) -> None:
        self.communicator, self.received = communicator, received
        self.borrowed, self.kept = borrowed, kept
        self.done = torch.cuda.Event()
        self.done.record(communicator._region.stream)

    def wait(self) -> list[Any]:
        torch.cuda.current_stream().wait_event(self.done)
        return self.received

    def release(self) -> None:
        self.kept = None
        if not torch.cuda.is_current_stream_capturing():
            # The next call may come on another stream.
            self.communicator._region.stream.wait_stream(torch.cuda.current_stream())
            for buffer in self.borrowed:
                self.communicator.buffers.give(buffer)


class _Memory:
    """Bytes that every rank of a group has at hand, of itself and of each peer."""

    def __init__(self, group: Any) -> None:
        self._group = weakref.ref(group)  # the group's region holds this
        self._handle: Any = None
        self._captured: list[Any] = []
        self.memory: Tensor | None = None

    def has(self, needed: int) -> bool:
        """Whether there are ``needed`` bytes; then a graph that is being captured keeps them."""
        enough = self.memory is not None and self.memory.numel() >= needed
        if enough and torch.cuda.is_current_stream_capturing():
            self._captured = [*(kept for kept in self._captured if kept is not self._handle)]
            self._captured.append(self._handle)  # replays use it, whatever comes later
        return enough

    def allocate(self, size: int) -> None:
        """Get ``size`` zeroed bytes; every rank of the group comes here."""
        device = torch.device("cuda", torch.cuda.current_device())
        self.memory = symmetric.empty(max(size, _ALIGNED), dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize()
        self._handle = share(self.memory, self._group())

    def at(self, rank: int, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """``rank``'s elements from byte ``start`` on, flat."""
        found: Tensor = self._handle.get_buffer(rank, (numel,), dtype, start // dtype.itemsize)
        return found


class _Region:
    """A group's shared memory and the stream that uses it.

    ``keys`` hold a call's keys and values. ``slots`` hold gradients on their way home; twice those
    of a round where there are several, since one round's arrive while the last one's are added.
    """

    def __init__(self, group: Any) -> None:
        self.keys, self.slots, self._words = _Memory(group), _Memory(group), _Memory(group)
        self._rank, self._world = rank_and_world(group)
        self._stream: torch.cuda.Stream | None = None
        self._signals: Signals | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where transfers run."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def grow(self, memory: _Memory, needed: int) -> None:
        """Have ``needed`` bytes; alike on all ranks, so they meet here or none does.

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
        torch.cuda.synchronize()  # with the meeting below: no peer uses the old memory any more
        memory.allocate(needed)

    def barrier(self, name: str) -> None:
        """Order what all ranks' streams did so far before what they do next."""
        if self._signals is None:
            self._words.allocate(Signals.bytes)
            self._signals = Signals(
                self._rank,
                self._world,
                lambda rank, start, numel: self._words.at(
                    rank, start * torch.int32.itemsize, numel, torch.int32
                ),
            )
        self._signals.barrier(name)

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """On the region's stream, after everything that the caller's stream holds."""
        with torch.cuda.device(device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield

    def shard(self, rank: int, tensors: Sequence[Tensor], which: int) -> Tensor:
        """``rank``'s copy of a tensor, [B, S, K, D]; batch rows lie side by side in memory."""
        batch, rows, heads, dim = tensors[which].shape
        start = _keys_bytes(tensors[:which])
        flat = self.keys.at(rank, start, tensors[which].numel(), tensors[which].dtype)
        return flat.view(rows, batch, heads, dim).transpose(0, 1)

    def slot(
        self,
        rank: int,
        one: Round,
        place: int,
        like: Sequence[Tensor],
        which: int,
        parts: Sequence[Part],
    ) -> list[Tensor]:
        """Where ``rank`` gets a gradient of the round's ``place``-th step, part by part."""
        x = like[which]
        start = one.number % _halves(one) * _slots_bytes(one, like)
        start += sum(_slot_bytes(step, like) for step in one.steps[:place])
        start += _slot_bytes(one.steps[place], like[:which])
        dtype = gradient_dtype(x.dtype, one.steps[place].rounded)
        return part_views(self.slots.at(rank, start, parts_numel(parts, x), dtype), parts, x)


def _keys_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(_aligned(x.numel() * x.element_size()) for x in tensors)


def _slots_bytes(one: Round, like: Sequence[Tensor]) -> int:
    return sum(_slot_bytes(step, like) for step in one.steps)


def _slot_bytes(step: Step, like: Sequence[Tensor]) -> int:
    """Room for what any rank gives back at this step: alike on every rank."""
    total = 0
    for x in like:
        rows = max(sum(n * heads.count(x.shape[2]) for n, heads in size) for size in step.sizes)
        itemsize = gradient_dtype(x.dtype, step.rounded).itemsize
        total += _aligned(rows * x.shape[0] * x.shape[3] * itemsize)
    return total


def _halves(one: Round) -> int:
    return 1 if one.number == 1 and one.is_last else 2


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _why_apart(group: Any, device: torch.device) -> str | None:
    """Why some rank of the group cannot reach another's memory; the same answer on all."""
    index = torch.cuda.current_device() if device.index is None else device.index
    here = {
        "host": _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else platform.node(),
        "gpu": str(torch.cuda.get_device_properties(index).uuid),
    }
    places = compare(group, "place", here)
    if len({place["host"] for place in places}) > 1:
        return "the group spans several hosts"
    shared = len({place["gpu"] for place in places}) < len(places)
    if shared and os.environ.get(_ALLOW_SHARED) != "1":
        return f"several ranks share a GPU (for tests torch allows it with {_ALLOW_SHARED}=1)"
    visible = {
        str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())
    }
    peers = (visible.get(place["gpu"], index) for place in places)
    apart = [i for i in peers if i != index and not torch.cuda.can_device_access_peer(index, i)]
    trouble = f"GPU {index} has no direct access to {apart}" if apart else None
    found = [answer["trouble"] for answer in compare(group, "reach", {"trouble": trouble})]
    return next((reason for reason in found if reason), None)


_regions: WeakKeyDictionary[Any, _Region] = WeakKeyDictionary()
_refusals: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()

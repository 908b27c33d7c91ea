"""One-sided transfers over symmetric memory: the copy engines move rows while the SMs compute."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_attention_standard.meeting import compare
from ring_attention_standard.region import Region
from ring_attention_standard.signals import LARGEST
from ring_core.communication import RingCommunicationMixin
from ring_core.groups import rank_and_world
from ring_core.protocols import Pending
from ring_core.rounds import Block, Part, Round, Step
from ring_core.rows import numel, parts_numel, select
from ring_core.softmax import gradient_dtype

_ALIGNED = 256
"""Bytes: tensors begin at multiples of it."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ALLOW_SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class SymmetricMemory(RingCommunicationMixin):
    """Each rank writes the rows that a peer needs into that peer's memory, where they are read.

    Keys and values go straight into the block that a kernel reads; gradients into a slot for each
    peer, and their owner adds them. Around them stand barriers: everybody is done with what lies
    there; everybody's keys have come; everybody's gradients have. No kernel runs for any of it, so
    kernels that fill the GPU hold nothing up. Rounds take turns with two places: one round's rows
    come while the last one's are used. Calls of all attentions of a group take turns on one stream.

    A stream that waits for a peer does so without a deadline.

    Args:
        region: the group's shared memory; made for the group if not given.
    """

    name: ClassVar[str] = "symmetric"
    priority: ClassVar[int] = 10
    shards: ClassVar[float] = 3

    def __init__(self, group: Any, timeout: float, region: Any = None) -> None:
        super().__init__(group, timeout)
        if region is None and group not in _regions:
            _regions[group] = Region(group)
        self._region = region or _regions[group]

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

    @property
    def shared_bytes(self) -> int:
        """Memory that this rank lends to transfers; torch's allocator does not count it."""
        held: int = self._region.bytes
        return held

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        region, device = self._region, tensors[0].device
        with region.turn(device):
            region.grow(_of(region.keys, one), _bytes_of_keys(one, tensors), self.timeout)
        mine = [step for step in one.steps if step.requester == self.rank]
        # A copy within one GPU takes SMs: here, before kernels of this call fill them.
        if mine:
            region.catch_up()  # earlier calls may have come on another stream
            self._put_keys(one, mine, tensors)
        with region.turn(device):
            region.barrier("free", self.timeout)
            self._put_keys(one, [step for step in one.steps if step not in mine], tensors)
            region.barrier("keys", self.timeout)
            mark = region.mark()
        self.counters.transfers += 1
        blocks = [self._blocks(self.rank, one, one.blocks, tensors, i) for i in _each(tensors)]
        return _Transfer(
            region, mark, list(zip(*blocks, strict=True)), kept=_of(region.keys, one).memory
        )

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
            region.grow(_of(region.slots, one), _bytes_of_gradients(one.steps, like), self.timeout)
            for place, step in enumerate(one.steps):
                mine = []
                for i in _each(like):
                    theirs = self._slot(step.source, one, place, step.parts, like, i)
                    for slot, part in zip(theirs, gradients[place], strict=True):
                        _put(slot, part[i])
                    mine.append(self._slot(self.rank, one, place, step.give, like, i))
                    dtype = gradient_dtype(like[i].dtype, step.rounded)
                    self._count(step, step.parts, step.give, like[i], dtype)
                received.append(list(zip(*mine, strict=True)))
            turn = "odd" if one.number % 2 else "even"
            region.barrier(f"gradients of {turn} rounds", self.timeout)
            mark = region.mark()
        self.counters.transfers += 1
        return _Transfer(region, mark, received, (gradients, _of(region.slots, one).memory))

    def _put_keys(self, one: Round, steps: Sequence[Step], tensors: Sequence[Tensor]) -> None:
        for step in steps:
            for i, x in enumerate(tensors):
                if step.give:
                    blocks = self._blocks(step.requester, one, step.there, tensors, i)
                    for part in step.give:
                        chosen = select(x, part.rows, part.heads)
                        rows = blocks[part.block][:, part.row : part.row + len(part.rows)]
                        _put(rows.unflatten(1, chosen.shape[1:3]), chosen)
                self._count(step, step.give, step.parts, x, x.dtype)

    def _blocks(
        self, rank: int, one: Round, blocks: Sequence[Block], like: Sequence[Tensor], which: int
    ) -> list[Tensor]:
        """Where ``rank`` gets the round's keys, or its values: its blocks, [B, rows, heads, D]."""
        x = like[which]
        start = _bytes_of_keys(one, like[:which])
        views = []
        for block in blocks:
            size = numel(block.rows, block.heads, x)
            flat = _of(self._region.keys, one).at(rank, start, size, x.dtype)
            views.append(_shaped(flat, block.rows, x))
            start += size * x.element_size()
        return views

    def _slot(
        self,
        rank: int,
        one: Round,
        place: int,
        parts: Sequence[Part],
        like: Sequence[Tensor],
        which: int,
    ) -> list[Tensor]:
        """Where ``rank`` gets a gradient of the round's ``place``-th step, part by part."""
        x, step = like[which], one.steps[place]
        dtype = gradient_dtype(x.dtype, step.rounded)
        start = _bytes_of_gradients(one.steps[:place], like)
        start += _bytes_of_gradients([step], like[:which])
        views = []
        for part in parts:
            size = numel(len(part.rows), part.heads, x)
            flat = _of(self._region.slots, one).at(rank, start, size, dtype)
            views.append(_shaped(flat, len(part.rows), x))
            start += size * dtype.itemsize
        return views

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


class _Transfer:
    """Copies under way on the region's stream.

    Args:
        kept: what they read, and the memory they write to, which lives until release.
    """

    def __init__(self, region: Any, mark: Any, received: list[Any], kept: Any) -> None:
        self.region, self.mark, self.received, self.kept = region, mark, received, kept

    def wait(self) -> list[Any]:
        self.region.wait(self.mark)
        return self.received

    def release(self) -> None:
        self.kept = None
        self.region.used()


def _put(there: Tensor, here: Tensor) -> None:
    """Copy batch row by batch row: each is one piece of memory, which a copy engine can move."""
    for to, what in zip(there.unbind(0), here.unbind(0), strict=True):
        to.copy_(what)


def _shaped(flat: Tensor, rows: int, like: Tensor) -> Tensor:
    batch, dim = like.shape[0], like.shape[3]
    return flat.view(batch, rows, -1, dim)


def _bytes_of_keys(one: Round, tensors: Sequence[Tensor]) -> int:
    """Room for what any rank fetches in this round: alike on every rank."""
    return sum(_room(one.steps, x, x.element_size()) for x in tensors)


def _bytes_of_gradients(steps: Sequence[Step], like: Sequence[Tensor]) -> int:
    """Room for what any rank gives back at these steps, each in a place of its own."""
    return sum(
        _room([step], x, gradient_dtype(x.dtype, step.rounded).itemsize)
        for step in steps
        for x in like
    )


def _room(steps: Sequence[Step], like: Tensor, itemsize: int) -> int:
    kv_heads = like.shape[2]
    rows = sum(
        max(sum(n * heads.count(kv_heads) for n, heads in size) for size in step.sizes)
        for step in steps
    )
    return -(-rows * like.shape[0] * like.shape[3] * itemsize // _ALIGNED) * _ALIGNED


def _of(memories: Sequence[Any], one: Round) -> Any:
    """The memory whose turn it is in this round."""
    return memories[one.number % len(memories)]


def _each(tensors: Sequence[Tensor]) -> range:
    return range(len(tensors))


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


_regions: WeakKeyDictionary[Any, Region] = WeakKeyDictionary()
_refusals: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()

"""One-sided transfers over symmetric memory: the copy engines move rows while the SMs compute."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_attention_standard.region import Region
from ring_attention_standard.signals import LARGEST
from ring_core.communication import RingCommunicationMixin
from ring_core.comparing import compare
from ring_core.copying import copy_chosen, shaped
from ring_core.groups import rank_and_world
from ring_core.plan import ALL_HEADS
from ring_core.protocols import Pending, Selection
from ring_core.rounds import Block, Part, Round, Step
from ring_core.rows import numel, window
from ring_core.softmax import gradient_dtype

_ALIGNED = 256
"""Bytes: tensors begin at multiples of it."""
_REMEMBERED = 512
"""Rounds of plans, with shapes, for which a memory keeps where their rows go."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ALLOW_SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class SymmetricMemory(RingCommunicationMixin):
    """Each rank writes the rows that a peer needs into that peer's memory, where they are read.

    Keys and values go straight into the block that a kernel reads; gradients into a slot for each
    peer, and their owner adds them. Around them stand barriers: everybody is done with what lies
    there; everybody's keys have come; everybody's gradients have. As a rule no kernel runs for any
    of it, so kernels that fill the GPU hold nothing up. Rounds take turns with two places: one
    round's rows come while the last one's are used. Calls of all attentions of a group take turns
    on one stream.

    Where a call's tensors choose what is read, it is kernels that write: the rows that were chosen
    straight into the peer's memory, and zeros in place of the others into this rank's own.

    A stream that waits for a peer does so without a deadline.

    Args:
        region: the group's shared memory; made for the group if not given.
    """

    name: ClassVar[str] = "symmetric"
    priority: ClassVar[int] = 10
    shards: ClassVar[float] = 3
    selects: ClassVar[bool] = True

    _selection: Selection | None = None

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

    def among(self, selection: Selection) -> SymmetricMemory:
        """This one for a call of which only what ``selection`` names moves."""
        other = copy(self)
        other._selection = selection
        return other

    @property
    def shared_bytes(self) -> int:
        """Memory that this rank lends to transfers; torch's allocator does not count it."""
        held: int = self._region.bytes
        return held

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        region, device = self._region, tensors[0].device
        memory = _of(region.keys, one)
        way = self._way(memory, one, tensors, _bytes_of_keys, self._way_of_keys)
        # A copy within one GPU takes SMs: here, before kernels of this call fill them.
        if way.within:
            region.catch_up(device)  # earlier calls may have come on another stream
            for put in way.within:
                put.start(put.source(tensors))
        sources = [put.source(tensors) for put in way.across]  # strided rows take SMs too
        chosen = way.chosen(self._selection)
        self._count(way, chosen)
        with region.turn(device):
            region.barrier("free", self.timeout)
            for put, source in zip(way.across, sources, strict=True):
                put.start(source, chosen)
            way.clear(chosen)
            region.barrier("keys", self.timeout)
            mark = region.mark()
        return _Transfer(region, mark, way.received, kept=(sources, chosen, memory.memory))

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        region = self._region
        memory = _of(region.slots, one)
        way = self._way(memory, one, like, _bytes_of_gradients, self._way_of_gradients)
        flat = [x for step in gradients for part in step for x in part]
        chosen = way.chosen(self._selection)
        self._count(way, chosen)
        with region.turn(like[0].device):
            for put in way.across:
                put.start(put.source(flat), chosen)
            way.clear(chosen)
            turn = "odd" if one.number % 2 else "even"
            region.barrier(f"gradients of {turn} rounds", self.timeout)
            mark = region.mark()
        return _Transfer(region, mark, way.received, kept=(gradients, chosen, memory.memory))

    def _way(
        self,
        memory: Any,
        one: Round,
        like: Sequence[Tensor],
        room: Callable[[Sequence[Step], Sequence[Tensor]], int],
        make: Callable[[_Way, Sequence[Tensor]], None],
    ) -> _Way:
        """Made once for a round, tensors' shapes and memory: that takes the processor long."""
        key = id(one), *((x.shape, x.dtype) for x in like)
        way: _Way | None = memory.known.get(key)
        if way is not None and way.one is one:
            self._region.grow(memory, way.needed, like[0].device, self.timeout)
            return way
        way = _Way(one, room(one.steps, like))
        self._region.grow(memory, way.needed, like[0].device, self.timeout)
        with torch.inference_mode(False):  # views of an inference could not be written later
            make(way, like)
        if len(memory.known) >= _REMEMBERED:
            memory.known.clear()
        memory.known[key] = way
        return way

    def _way_of_keys(self, way: _Way, like: Sequence[Tensor]) -> None:
        one = way.one
        mine = [self._blocks(self.rank, one, one.blocks, like, i) for i in _each(like)]
        way.received = list(zip(*mine, strict=True))
        for step in one.steps:
            for i in _each(like):
                theirs = self._blocks(step.requester, one, step.there, like, i)
                for part, there in zip(step.give, _rows(theirs, step.give), strict=True):
                    if step.offset:
                        named = way.name(step.requester, self.rank, part)
                        way.across.append(_Put(i, there, part, named))
                    else:
                        way.within.append(_Put(i, there, part))
                if step.offset:
                    names = (way.name(self.rank, step.source, part) for part in step.parts)
                    way.came += zip(_rows(mine[i], step.parts), names, strict=True)

    def _way_of_gradients(self, way: _Way, like: Sequence[Tensor]) -> None:
        one, first = way.one, 0
        for place, step in enumerate(one.steps):
            mine = []
            for i in _each(like):
                theirs = self._slot(step.source, one, place, step.parts, like, i)
                for number, there in enumerate(theirs):
                    part = step.parts[number]
                    named = way.name(self.rank, step.source, part) if step.offset else None
                    way.across.append(_Put(first + number * len(like) + i, there, named=named))
                mine.append(self._slot(self.rank, one, place, step.give, like, i))
                if step.offset:
                    names = (way.name(step.requester, self.rank, part) for part in step.give)
                    way.came += zip(mine[-1], names, strict=True)
            way.received.append(list(zip(*mine, strict=True)))
            first += len(step.parts) * len(like)

    def _count(self, way: _Way, chosen: Sequence[Tensor]) -> None:
        if not chosen:
            self.counters.add(*way.moved)
        elif not (chosen[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            # A graph's replays are not counted, nor may it keep what is counted with.
            rows = torch.stack([x.count_nonzero() for x in chosen])
            self.counters.add_late((rows * way.widths).sum(1))

    def _blocks(
        self, rank: int, one: Round, blocks: Sequence[Block], like: Sequence[Tensor], which: int
    ) -> list[Tensor]:
        """Where ``rank`` gets the round's keys, or its values: its blocks, [B, rows, heads, D]."""
        x = like[which]
        start = _bytes_of_keys(one.steps, like[:which])
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


class _Put:
    """Rows of one tensor that go to one place, batch row by batch row: each is one piece of memory,
    which a copy engine can move.

    Args:
        which: of the tensors that a transfer is given.
        there: [B, rows, heads, D]. part: the rows; all of the tensor if not given.
        named: which of the way's names these rows have; None where they stay on this rank.
    """

    def __init__(
        self, which: int, there: Tensor, part: Part | None = None, named: int | None = None
    ) -> None:
        self._which, self._part = which, part
        self.there, self.named = there, named
        self._each = there.unbind(0)
        self._run: slice | None = slice(None)
        if part is not None:
            rows = part.rows
            plain = rows.is_run and part.heads == ALL_HEADS
            self._run = slice(rows.start, rows.start + rows.count) if plain else None

    def source(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows [B, rows, heads, D]; strided ones are copied together on the current stream."""
        x = tensors[self._which]
        if self._run is not None:
            return x[:, self._run]
        assert self._part is not None
        chosen = window(x, self._part.rows, self._part.heads)
        return shaped(chosen, self.there.shape).contiguous()  # a view may be strided still

    def start(self, source: Tensor, chosen: Sequence[Tensor] = ()) -> None:
        """On the current stream.

        Args:
            chosen: bool [B, rows, heads] by name, where not all rows go.
        """
        if chosen and self.named is not None:
            copy_chosen(self.there, source, chosen[self.named])
            return
        for b, there in enumerate(self._each):
            there.copy_(source[b])


@dataclass
class _Way:
    """Where the rows of a round go and come, for tensors of some shapes.

    Attributes:
        needed: bytes of the memory that it leads to.
        received: what waiting for the transfer gives.
        within, across: what is put into this rank's memory, and into the peers'.
        came: where peers put theirs, each with its name.
        names: what goes between two ranks, as (requester, owner, part).
    """

    one: Round
    needed: int
    received: list[Any] = field(default_factory=list)
    within: list[_Put] = field(default_factory=list)
    across: list[_Put] = field(default_factory=list)
    came: list[tuple[Tensor, int]] = field(default_factory=list)
    names: dict[tuple[int, int, Part], int] = field(default_factory=dict)

    def name(self, requester: int, owner: int, part: Part) -> int:
        """The number of a name."""
        return self.names.setdefault((requester, owner, part), len(self.names))

    def chosen(self, selection: Selection | None) -> list[Tensor]:
        """By name which rows move; nothing where all do."""
        return [] if selection is None else [selection.rows(*name) for name in self.names]

    def clear(self, chosen: Sequence[Tensor]) -> None:
        """Zeros in place of rows that peers do not put here."""
        if chosen:
            for rows, named in self.came:
                # And nothing else: peers are writing the chosen ones.
                copy_chosen(rows, rows.new_zeros(()).expand(rows.shape), ~chosen[named])

    @cached_property
    def moved(self) -> tuple[int, int]:
        """Bytes sent and received, where all rows move."""
        sent = sum(put.there.nbytes for put in self.across if put.named is not None)
        return sent, sum(rows.nbytes for rows, _ in self.came)

    @cached_property
    def widths(self) -> Tensor:
        """Bytes that a row of a head takes, by name: int64 [2, names], sent and received."""
        sent = [(put.there, put.named) for put in self.across if put.named is not None]
        found = [[0] * len(self.names) for _ in range(2)]
        for total, rows in zip(found, (sent, self.came), strict=True):
            for x, named in rows:
                total[named] += x.shape[-1] * x.element_size()
        one = self.across[0].there if self.across else self.came[0][0]
        return torch.tensor(found, dtype=torch.int64, device=one.device)


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


def _rows(blocks: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Where parts stand in a round's blocks."""
    return [blocks[part.block][:, part.row : part.row + len(part.rows)] for part in parts]


def _shaped(flat: Tensor, rows: int, like: Tensor) -> Tensor:
    batch, dim = like.shape[0], like.shape[3]
    return flat.view(batch, rows, -1, dim)


def _bytes_of_keys(steps: Sequence[Step], like: Sequence[Tensor]) -> int:
    """Room for what any rank fetches at the steps of a round: alike on every rank."""
    return sum(_room(steps, x, x.element_size()) for x in like)


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

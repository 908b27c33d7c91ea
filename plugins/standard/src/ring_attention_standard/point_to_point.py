"""Point-to-point transfers with batched isend/irecv: works wherever torch.distributed does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.communication import RingCommunicationMixin
from ring_core.protocols import Pending
from ring_core.rounds import Round, Step
from ring_core.rows import as_packed, block_views, blocks_numel, pack, part_views, parts_numel
from ring_core.softmax import gradient_dtype


class PointToPoint(RingCommunicationMixin):
    """Owners send the rows that the plan says their peers need; nobody forwards.

    A rank holds the rows of one step while the next ones arrive, whatever the number of ranks; and
    its own beside them, where two ranks' queries wait for both.
    """

    name: ClassVar[str] = "p2p"
    priority: ClassVar[int] = 0
    shards: ClassVar[int] = 1

    @classmethod
    def refuse(cls, group: Any, device: torch.device) -> str | None:
        try:
            backend = group._get_backend(device).name()
        except RuntimeError:
            return f"the group has no backend for {device.type} tensors"
        if device.type == "cuda" and backend == "gloo":
            return "gloo sends no CUDA tensors; initialise the group with backend 'nccl'"
        return None

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        step, *own = one.steps
        outgoing, borrowed = [], []
        for x in tensors:
            packed = as_packed(step.give, x)
            if packed is None:
                packed = self.buffers.take(parts_numel(step.give, x), x)
                pack(step.give, x, packed)
                borrowed.append(packed)
            outgoing.append(packed)
        # One step's parts stand in its round's buffer in their own order, end to end; the rank's
        # own rows, if it copies them there too, stand behind.
        buffers = self.pair([blocks_numel(one.blocks, x) for x in tensors], tensors)
        incoming = [
            flat[: parts_numel(step.parts, x)] for flat, x in zip(buffers, tensors, strict=True)
        ]
        for flat, into, x in zip(buffers, incoming, tensors, strict=True):
            for mine in own:
                pack(mine.parts, x, flat[into.numel() :])
        works, name = self._start(
            step, "fetching keys", (step.requester, outgoing), (step.source, incoming), tag
        )

        def received() -> list[tuple[Tensor, ...]]:
            views = [
                block_views(flat, one.blocks, x) for flat, x in zip(buffers, tensors, strict=True)
            ]
            return list(zip(*views, strict=True))

        return _Transfer(self, works, name, outgoing, [*buffers, *borrowed], received)

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        step = one.steps[0]
        outgoing = [
            _end_to_end(
                [part[i] for part in gradients[0]], x, gradient_dtype(x.dtype, step.rounded)
            )
            for i, x in enumerate(like)
        ]
        dtype = gradient_dtype(like[0].dtype, step.rounded)
        incoming = self.pair(
            [parts_numel(step.give, x) for x in like], [x.new_empty(0, dtype=dtype) for x in like]
        )
        works, name = self._start(
            step, "returning gradients", (step.source, outgoing), (step.requester, incoming), tag
        )

        def received() -> list[list[tuple[Tensor, ...]]]:
            views = [part_views(flat, step.give, x) for flat, x in zip(incoming, like, strict=True)]
            return [list(zip(*views, strict=True)), *(list(mine) for mine in gradients[1:])]

        return _Transfer(self, works, name, outgoing, incoming, received)

    def _start(
        self,
        step: Step,
        operation: str,
        outgoing: tuple[int, Sequence[Tensor]],
        incoming: tuple[int, Sequence[Tensor]],
        tag: int,
    ) -> tuple[Sequence[Any], Callable[[], str]]:
        ops = []
        for kind, (peer, buffers) in ((dist.isend, outgoing), (dist.irecv, incoming)):
            ops += [
                dist.P2POp(kind, buffer, group=self.group, tag=tag, group_peer=peer)
                for buffer in buffers
                if buffer.numel()
            ]
        self.counters.add(*(sum(x.nbytes for x in way[1]) for way in (outgoing, incoming)))

        def name() -> str:
            return (
                f"step {step.offset}, {operation} (sending to rank {outgoing[0]}, receiving from "
                f"rank {incoming[0]})"
            )

        return self.start(ops, name), name


def _end_to_end(parts: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Tensors [B, rows, heads, D] as one flat one, in the order of :func:`part_views`."""
    if not parts:
        return like.new_empty(0, dtype=dtype)
    if len(parts) == 1:
        return parts[0].transpose(0, 1).reshape(-1)
    return torch.cat([part.transpose(0, 1).reshape(-1) for part in parts])


class _Transfer:
    """Sends and receives of one step under way."""

    def __init__(
        self,
        communicator: PointToPoint,
        works: Sequence[Any],
        name: Callable[[], str],
        outgoing: Sequence[Tensor],
        borrowed: Sequence[Tensor],
        received: Callable[[], list[Any]],
    ) -> None:
        self.communicator, self.works, self.name = communicator, works, name
        self.outgoing = outgoing  # kept alive until sent
        self.borrowed, self.received = borrowed, received

    def wait(self) -> list[Any]:
        self.communicator.wait_for(self.works, self.name)
        return self.received()

    def release(self) -> None:
        for buffer in self.borrowed:
            self.communicator.buffers.give(buffer)

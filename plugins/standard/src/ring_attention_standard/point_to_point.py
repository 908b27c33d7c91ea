"""Point-to-point transfers with batched isend/irecv: works wherever torch.distributed does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.communication import RingCommunicationMixin
from ring_core.errors import RingTimeoutError
from ring_core.plan import Part, Step
from ring_core.protocols import Pending
from ring_core.rows import as_packed, pack, part_numel, part_views


class PointToPoint(RingCommunicationMixin):
    """Owners send the rows that the plan says their peers need; nobody forwards.

    A rank holds the rows of one step while the next ones arrive, whatever the number of ranks.
    """

    name: ClassVar[str] = "p2p"
    priority: ClassVar[int] = 0

    @classmethod
    def refuse(cls, group: Any, device: torch.device) -> str | None:
        try:
            backend = group._get_backend(device).name()
        except RuntimeError:
            return f"the group has no backend for {device.type} tensors"
        if device.type == "cuda" and backend == "gloo":
            return "gloo sends no CUDA tensors; initialise the group with backend 'nccl'"
        return None

    def fetch(self, step: Step, tensors: Sequence[Tensor], tag: int) -> Pending:
        outgoing, borrowed = [], []
        for x in tensors:
            packed = as_packed(step.give, x)
            if packed is None:
                packed = self.buffers.take(part_numel(step.give, x), x)
                pack(step.give, x, packed)
                borrowed.append(packed)
            outgoing.append(packed)
        incoming = self.pair([part_numel(step.parts, x) for x in tensors], tensors)
        return self._start(
            step,
            "fetching keys",
            (step.requester, outgoing),
            (step.source, incoming),
            step.parts,
            tensors,
            borrowed,
            tag,
        )

    def give_back(
        self, step: Step, gradients: Sequence[Tensor], like: Sequence[Tensor], tag: int
    ) -> Pending:
        incoming = self.pair([part_numel(step.give, x) for x in like], gradients)
        return self._start(
            step,
            "returning gradients",
            (step.source, gradients),
            (step.requester, incoming),
            step.give,
            like,
            [],
            tag,
        )

    def _start(
        self,
        step: Step,
        operation: str,
        outgoing: tuple[int, Sequence[Tensor]],
        incoming: tuple[int, Sequence[Tensor]],
        parts: Sequence[Part],
        like: Sequence[Tensor],
        borrowed: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        ops = []
        for kind, (peer, buffers) in ((dist.isend, outgoing), (dist.irecv, incoming)):
            ops += [
                dist.P2POp(kind, buffer, group=self.group, tag=tag, group_peer=peer)
                for buffer in buffers
                if buffer.numel()
            ]
        sent = sum(x.numel() * x.element_size() for x in outgoing[1])
        self.counters.bytes_sent += sent
        self.counters.bytes_received += sum(x.numel() * x.element_size() for x in incoming[1])
        self.counters.transfers += 1

        def name() -> str:
            return (
                f"step {step.index}, {operation} (sending to rank {outgoing[0]}, receiving from "
                f"rank {incoming[0]})"
            )

        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise RingTimeoutError(
                f"rank {self.rank} of {self.world}: {name()} failed to start: {error}"
            ) from error
        return _Transfer(self, works, name, outgoing[1], incoming[1], parts, like, borrowed)


class _Transfer:
    """Sends and receives of one step under way."""

    def __init__(
        self,
        communicator: PointToPoint,
        works: Sequence[Any],
        name: Any,
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
        parts: Sequence[Part],
        like: Sequence[Tensor],
        borrowed: Sequence[Tensor],
    ) -> None:
        self.communicator, self.works, self.name = communicator, works, name
        self.outgoing, self.incoming = outgoing, incoming  # kept alive until sent
        self.parts, self.like, self.borrowed = parts, like, borrowed

    def wait(self) -> list[tuple[Tensor, ...]]:
        self.communicator.wait_for(self.works, self.name)
        views = [
            part_views(flat, self.parts, x)
            for flat, x in zip(self.incoming, self.like, strict=True)
        ]
        return list(zip(*views, strict=True))

    def release(self) -> None:
        for buffer in (*self.incoming, *self.borrowed):
            self.communicator.buffers.give(buffer)

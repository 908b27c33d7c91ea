"""A communicator for tests on the CPU: rounds of several steps, as one-sided ones have them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist

from ring_core.communication import RingCommunicationMixin
from ring_core.rows import block_views, blocks_numel, part_views, parts_numel, select
from ring_core.softmax import gradient_dtype


class OneSided(RingCommunicationMixin):
    """Everybody gets everybody's shards and takes what the plan says; slow and obvious."""

    name: ClassVar[str] = "one_sided"
    priority: ClassVar[int] = -1
    shards: ClassVar[float] = 3

    def fetch(self, one, tensors, tag):
        flats = [x.new_full((blocks_numel(one.blocks, x),), torch.nan) for x in tensors]
        views = [block_views(flat, one.blocks, x) for flat, x in zip(flats, tensors, strict=True)]
        for i, x in enumerate(tensors):
            shards = [torch.empty_like(x) for _ in range(self.world)]
            dist.all_gather(shards, x.contiguous(), group=self.group)
            for step in one.steps:
                for part in step.parts:
                    rows = views[i][part.block][:, part.row : part.row + len(part.rows)]
                    chosen = select(shards[step.source], part.rows, part.heads)
                    rows.unflatten(1, chosen.shape[1:3]).copy_(chosen)
        return Done(list(zip(*views, strict=True)))

    def give_back(self, one, gradients, like, tag):
        received = []
        for place, step in enumerate(one.steps):
            mine = []
            for i, x in enumerate(like):
                dtype = gradient_dtype(x.dtype, step.rounded)
                most = max(sum(n * h.count(x.shape[2]) for n, h in size) for size in step.sizes)
                slot = x.new_zeros(most * x.shape[0] * x.shape[3], dtype=dtype)
                for view, part in zip(
                    part_views(slot, step.parts, x), gradients[place], strict=True
                ):
                    assert part[i].dtype == dtype
                    view.copy_(part[i])
                slots = [torch.empty_like(slot) for _ in range(self.world)]
                dist.all_gather(slots, slot, group=self.group)
                flat = slots[step.requester][: parts_numel(step.give, x)]
                mine.append(part_views(flat, step.give, x))
            received.append(list(zip(*mine, strict=True)))
        return Done(received)


class Done:
    """A transfer that is over; what it gave is spoilt when it is released."""

    def __init__(self, received):
        self.received = received

    def wait(self):
        return self.received

    def release(self):
        for group in self.received:
            for tensors in group:
                for x in tensors if isinstance(tensors, tuple) else (tensors,):
                    x.fill_(torch.nan)

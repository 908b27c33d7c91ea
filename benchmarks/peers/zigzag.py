"""The sharding that several peers share: an early and a late chunk for each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def of(group: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """This rank's rows of a whole [1, tokens, H, D], and the whole of all ranks' rows."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def shard(x: Tensor) -> Tensor:
        chunks = x.chunk(2 * world, dim=1)
        return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim=1)

    def gather(x: Tensor) -> Tensor:
        shards = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(shards, x.contiguous(), group=group)
        halves = [one.chunk(2, dim=1) for one in shards]
        return torch.cat([one[0] for one in halves] + [one[1] for one in halves[::-1]], dim=1)

    return shard, gather

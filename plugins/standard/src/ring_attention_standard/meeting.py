"""What the ranks of a group tell each other before they share memory, and how they do so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world, store_of

_SECONDS = 60
_BYTES = 256

_met = 0
_alone: list[Any] = []


def compare(group: Any, what: str, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every rank of the group says, by rank; every rank comes here alike.

    Raises:
        CommunicatorError: a rank did not say anything in time.
    """
    rank, world = rank_and_world(group)
    store = store_of(group)
    # A store may outlive the group, as a launcher's does; its next group reads other keys.
    turn = store.add(f"ring_attention/symmetric/{what}/turn/{rank}", 1)
    keys = [f"ring_attention/symmetric/{what}/{turn}/{peer}" for peer in range(world)]
    store.set(keys[rank], json.dumps(mine))
    try:
        store.wait(keys, timedelta(seconds=_SECONDS))
    except RuntimeError as error:
        raise CommunicatorError(
            f"rank {rank} of {world}: some rank did not say its {what} within {_SECONDS} s: {error}"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def share(memory: Tensor, group: Any) -> Any:
    """torch's handle for ``memory`` and that of the peers, which is as large.

    torch (2.11 at least) numbers the exchanges of its rendezvous by process, not by group: ranks
    that made unequally many, in groups of other ranks, would wait for each other's for ever. So
    those that made fewer make up for it alone first.
    """
    global _met
    most = max(said["meetings"] for said in compare(group, "meetings", {"meetings": _met}))
    while _met < most:
        if not _alone:
            _alone.append(dist.new_group([dist.get_rank()], use_local_synchronization=True))
        filler = symmetric.empty(_BYTES, dtype=torch.uint8, device=memory.device)
        symmetric.rendezvous(filler, _alone[0].group_name)
        _met += 1
    _met += 1
    return symmetric.rendezvous(memory, group.group_name)

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

from ring_core.errors import CommunicatorError, InputError
from ring_core.groups import by_name, rank_and_world, store_of

_SECONDS = 60
_BYTES = 256

_met = 0
_alone: str | None = None


def compare(
    group: Any, what: str, mine: Mapping[str, Any], timeout: float = _SECONDS
) -> list[dict[str, Any]]:
    """What every rank of the group says, by rank; every rank comes here alike.

    Raises:
        CommunicatorError: a rank did not say anything in ``timeout`` seconds.
    """
    rank, world = rank_and_world(group)
    store = store_of(group)
    # A store may outlive the group, as a launcher's does; its next group reads other keys.
    turn = store.add(f"ring_attention/symmetric/{what}/turn/{rank}", 1)
    keys = [f"ring_attention/symmetric/{what}/{turn}/{peer}" for peer in range(world)]
    store.set(keys[rank], json.dumps(mine))
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        raise CommunicatorError(
            f"rank {rank} of {world}: not every rank said its {what} within {timeout:g} s: {error}"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def catch_up(group: Any, device: torch.device, timeout: float) -> None:
    """Make the ranks of the group equal in how often they met anybody.

    torch (2.11 at least) numbers the exchanges of its rendezvous by process, not by group: ranks
    that made unequally many, in groups of other ranks, would wait for each other's for ever. So
    those that made fewer make up for it alone.
    """
    global _met
    said = compare(group, "meetings", {"meetings": _met}, timeout)
    most = max(one["meetings"] for one in said)
    while _met < most:
        filler = symmetric.empty(_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(filler, _only_me())
        _met += 1


def share(memory: Tensor, group: Any) -> Any:
    """torch's handle for ``memory`` and that of the peers, which is as large."""
    global _met
    _met += 1
    return symmetric.rendezvous(memory, group.group_name)


def _only_me() -> Any:
    """The name of a group of this process; made again where torch.distributed was."""
    global _alone
    try:
        if _alone is not None:
            by_name(_alone)
    except InputError:
        _alone = None
    if _alone is None:
        _alone = dist.new_group([dist.get_rank()], use_local_synchronization=True).group_name
    return _alone

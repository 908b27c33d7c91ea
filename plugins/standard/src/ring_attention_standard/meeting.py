"""How the ranks of a group come to share memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from ring_core.comparing import compare
from ring_core.errors import InputError
from ring_core.groups import by_name

_BYTES = 256

_met = 0
_alone: str | None = None


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

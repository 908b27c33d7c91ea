"""Whether the ranks of a group hold the same weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from ring_core import groups
from ring_core.comparing import compare
from ring_core.errors import DisagreementError


def check_alike(module: nn.Module, group: Any = None, timeout: float = 300.0) -> None:
    """Compare the parameters and buffers of ``module`` between ranks that should hold the same.

    Bit by bit, by digests that go through the group's store; every rank of the group calls it.
    Parameters that are sharded (DTensors) are compared by their local shard, so pass the group of
    the ranks that replicate them.

    Args:
        group: ProcessGroup or 1-D DeviceMesh; None takes the default group.
        timeout: seconds to wait for the other ranks.

    Raises:
        DisagreementError: names the parameters that differ, by rank; the same on every rank.
        CommunicatorError: a rank did not come within ``timeout`` seconds.
    """
    resolved = groups.resolve(group)
    if groups.rank_and_world(resolved)[1] == 1:
        return
    said = compare(resolved, "weights", _digests(module), timeout)
    names = list(dict.fromkeys(name for mine in said for name in mine))
    apart = []
    for name in names:
        by_digest: dict[str, list[int]] = {}
        for rank, mine in enumerate(said):
            by_digest.setdefault(mine.get(name, "missing"), []).append(rank)
        if len(by_digest) > 1:
            held = " against ".join(str(ranks) for ranks in by_digest.values())
            apart.append(f"{name} (ranks {held})")
    if apart:
        raise DisagreementError(
            f"{len(apart)} of {len(names)} parameters and buffers differ between ranks that should "
            f"hold the same: {', '.join(apart[:8])}{', ...' if len(apart) > 8 else ''}. Load them "
            "from one checkpoint, or broadcast them from one rank."
        )


def _digests(module: nn.Module) -> dict[str, str]:
    found = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        local = x.to_local() if hasattr(x, "to_local") else x
        data = local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{tuple(local.shape)} {local.dtype}".encode()
        found[name] = hashlib.blake2b(data, digest_size=16, key=kind[:64]).hexdigest()
    return found

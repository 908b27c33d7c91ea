"""Process groups of some ranks of a group, made when only those ranks come to it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ring_attention_standard.meeting import compare
from torch.distributed import distributed_c10d


def child_group(group: Any, ranks: Sequence[int], timeout: float) -> Any:
    """A new process group of ``ranks`` (global numbers), which this process is one of; all ranks of
    ``group`` make one alike.

    Raises:
        CommunicatorError: a rank did not come within ``timeout`` seconds.
    """
    # torch (2.13 at least) names such a group by its ranks and by how many groups the process has.
    # Ranks that have unequally many would wait under other names for ever.
    most = max(said["groups"] for said in compare(group, "groups", {"groups": _known()}, timeout))
    while _known() < most:
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return dist.new_group(
        list(ranks),
        timeout=timedelta(seconds=timeout),
        backend=dist.get_backend_config(group),
        use_local_synchronization=True,
    )


def _known() -> int:
    return len(distributed_c10d._world.pg_names)

"""Process groups of some ranks of a group, made when only those ranks come to it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ring_core.comparing import compare
from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world
from ring_core.store import turn

_GLOO_WAITS = 5
"""Times its timeout, for a peer that connects to it."""

_lock = threading.Lock()
_made: WeakKeyDictionary[Any, WeakSet[Any]] = WeakKeyDictionary()


def child_group(group: Any, ranks: Sequence[int], timeout: float) -> Any:
    """A new process group of ``ranks`` (global numbers), which this process is one of; all ranks of
    ``group`` make one alike.

    Raises:
        CommunicatorError: a rank did not come within ``timeout`` seconds, or they cannot connect.
    """
    rank, world = rank_and_world(group)
    turns = turn(group, "children")
    compare(group, "children", {"turn": turns}, timeout)
    backend = dist.get_backend_config(group)
    if "nccl" not in backend:
        timeout /= _GLOO_WAITS  # transfers here say themselves how long they wait
    joined = "_".join(map(str, ranks))
    name = hashlib.sha1(f"ring_attention {group.group_name} {turns} {joined}".encode()).hexdigest()
    try:
        with _named(name):
            child = dist.new_group(
                list(ranks),
                timeout=timedelta(seconds=timeout),
                backend=backend,
                use_local_synchronization=True,
            )
    except (RuntimeError, ValueError) as error:
        raise CommunicatorError(
            f"rank {rank} of {world}: no process group with ranks {list(ranks)}: {error}"
        ) from error
    _made.setdefault(group, WeakSet()).add(child)
    return child


def abort(child: Any) -> None:
    """End the transfers of a group of :func:`child_group` that failed, and of those made of it.

    It is not destroyed while errors of its transfers are alive: gloo (of torch 2.13) warns then in
    the middle of them, and Python raises a SystemError in their place.
    """
    for part in _made.pop(child, ()):
        abort(part)
    with contextlib.suppress(Exception):  # it is broken already
        child.abort()


def destroy(child: Any) -> None:
    """Give the connections, threads and buffers of a group of :func:`child_group` back."""
    with contextlib.suppress(Exception):  # it may have gone with all others
        dist.destroy_process_group(child)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Have torch give the next group that this thread makes this name.

    torch (2.13 at least) names a group that not all ranks make by its ranks and by how many groups
    the process has: ranks that have unequally many would wait under other names for ever, and a
    name comes back where a group was destroyed, with what its store held.
    """
    me, usual = threading.get_ident(), distributed_c10d._process_group_name

    def ours(*arguments: Any, **options: Any) -> Any:
        return name if threading.get_ident() == me else usual(*arguments, **options)

    with _lock:
        distributed_c10d._process_group_name = ours
        try:
            yield
        finally:
            distributed_c10d._process_group_name = usual

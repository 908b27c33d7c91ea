"""A group of the library's own for the transfers of a group, replaced where it fails."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch.distributed as dist

from ring_core.child import abort, child_group, destroy
from ring_core.groups import rank_and_world
from ring_core.meetings import Meetings
from ring_core.store import store_of, turn


class Lane:
    """A process group that failed is dead. The caller's own group must not die of transfers here,
    so they have one of their own; what they agree goes through the store of the caller's.

    Attributes:
        meetings: of the ranks of the caller's group.
    """

    def __init__(self, group: Any) -> None:
        self._child: Any | None = None
        name = f"ring_attention/lane/{turn(group, 'lane')}"
        self.meetings = Meetings(store_of(group), *rank_and_world(group), name)

    def over(self, group: Any, timeout: float) -> Any:
        """The process group to use now for ``group``, made if there is none; all ranks ask alike.

        Raises:
            CommunicatorError: a rank did not come within ``timeout`` seconds.
        """
        if self._child is None:
            self._child = child_group(group, dist.get_process_group_ranks(group), timeout)
        return self._child

    def fail(self) -> None:
        """Give the process group up; the next question makes another."""
        child, self._child = self._child, None
        if child is not None:
            abort(child)

    def close(self) -> None:
        """The caller's group is gone."""
        child, self._child = self._child, None
        if child is not None:
            destroy(child)


_lanes: WeakKeyDictionary[Any, Lane] = WeakKeyDictionary()


def lane_of(group: Any) -> Lane:
    """The lane of a group, shared by all that use it; it goes with the group."""
    if group not in _lanes:
        _lanes[group] = lane = Lane(group)
        finalize(group, lane.close)
    return _lanes[group]

"""How many ranks of a group share a host, where that is the same number on every host."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ring_core.comparing import compare

_agreed: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()


def agreed_per_host(group: Any, mine: int, timeout: float) -> int | None:
    """What all ranks of ``group`` say, asked once a group; None where they say different numbers.

    Launchers tell each rank how many there are on its own host, and hosts may have unequally many.

    Args:
        mine: ranks on this rank's host.

    Raises:
        CommunicatorError: a rank did not say anything within ``timeout`` seconds.
    """
    if group not in _agreed:
        said = {one["ranks"] for one in compare(group, "hosts", {"ranks": mine}, timeout)}
        _agreed[group] = said.pop() if len(said) == 1 else None
    return _agreed[group]

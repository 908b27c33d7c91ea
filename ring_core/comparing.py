"""What the ranks of a group tell each other through its store, outside of any call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world, store_of

_SECONDS = 60


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
    turn = store.add(f"ring_attention/compare/{what}/turn/{rank}", 1)
    keys = [f"ring_attention/compare/{what}/{turn}/{peer}" for peer in range(world)]
    store.set(keys[rank], json.dumps(mine))
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        raise CommunicatorError(
            f"rank {rank} of {world}: not every rank said its {what} within {timeout:g} s: {error}"
        ) from error
    return [json.loads(store.get(key)) for key in keys]

"""What the ranks of a group tell each other through its store, outside of any call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ring_core.errors import CommunicatorError
from ring_core.groups import rank_and_world
from ring_core.store import ask, store_of, turn

_SECONDS = 60


def compare(
    group: Any, what: str, mine: Mapping[str, Any], timeout: float = _SECONDS
) -> list[dict[str, Any]]:
    """What every rank of the group says, by rank; every rank comes here alike.

    Raises:
        CommunicatorError: a rank did not say anything in ``timeout`` seconds.
        RankFailedError: the store is gone, or cannot be reached.
    """
    rank, world = rank_and_world(group)
    store = store_of(group)
    time = turn(group, f"compare/{what}")
    keys = [f"ring_attention/compare/{what}/{time}/{peer}" for peer in range(world)]

    def question() -> list[dict[str, Any]]:
        store.set(keys[rank], json.dumps(mine))
        try:
            store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError as error:
            raise CommunicatorError(
                f"rank {rank} of {world}: not every rank said its {what} within {timeout:g} s: "
                f"{error}"
            ) from error
        return [json.loads(store.get(key)) for key in keys]

    return ask(question, timeout)

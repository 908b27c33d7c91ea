"""A group's store, through which its ranks tell each other things, and questions to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ring_core.errors import CommunicatorError, RankFailedError

T = TypeVar("T")

SECONDS_TO_ANSWER = 3.0
"""For a store to answer what needs no other rank."""


def store_of(group: Any) -> Any:
    """The group's key-value store, whose keys no other group sees."""
    store = distributed_c10d._get_process_group_store(group)
    if store is None:
        raise CommunicatorError(
            f"process group {group.group_name!r} (backend {dist.get_backend(group)}) has no store, "
            "and ranks compare their calls through it; use a gloo or NCCL group"
        )
    return store


def ask(question: Callable[[], T], seconds: float = 0.0) -> T:
    """What ``question``, which talks to a store, comes to.

    torch's store waits for an answer for as long as the system keeps the connection, a quarter of
    an hour where a cable was pulled; so it is asked in a thread that can be left behind.

    Args:
        seconds: that the question itself waits for other ranks.

    Raises:
        RankFailedError: the store is gone, or cannot be reached.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="ring-attention-store")
    thread.start()
    thread.join(seconds + SECONDS_TO_ANSWER)
    if answers:
        return answers[0]
    lost = "the store through which ranks meet"
    if not errors:
        raise RankFailedError(
            f"{lost} did not answer in {SECONDS_TO_ANSWER:g} s: the rank or launcher that serves "
            "it, or the network to its host, is down"
        )
    if isinstance(errors[0], RuntimeError):
        raise RankFailedError(
            f"{lost} is gone, and with it the rank or launcher that served it: {errors[0]}"
        ) from errors[0]
    raise errors[0]


def turn(group: Any, what: str) -> int:
    """How many of ``what`` this rank has made in the store of ``group``, with this one.

    A store may outlive the group, as a launcher's does; what is numbered reads keys of its own.
    """
    store, rank = store_of(group), dist.get_rank(group)
    return int(ask(lambda: store.add(f"ring_attention/{what}/turn/{rank}", 1)))

"""Communicators that inherit agreed retry: transfers fail, ranks raise or stay away, and all ranks
end alike, over a process group that is not the caller's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ring_attention_standard.point_to_point import PointToPoint
from test_faults import connections, drop
from torch import Tensor

from ring_core import RingCommunicationMixin
from ring_core.attempts import WAIT
from ring_core.child import abort, child_group
from ring_core.errors import InputError, RingError
from ring_core.exchange import Exchange
from ring_core.store import store_of
from ring_core.testing import RankPool, Worker

PAGE = Path(__file__).parents[1] / "docs" / "write-a-plugin.md"
TIMEOUT = 3.0
VICTIM = 1


class Neighbours(RingCommunicationMixin):
    """Sends a tensor to the next rank."""

    def shift(self, x: Tensor) -> Tensor:
        """The tensor of the rank before."""
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        (buffer,) = self.pair([x.numel()], [x])
        ops = [
            dist.P2POp(dist.isend, x, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=before),
        ]

        def name() -> str:
            return f"receiving from rank {before}"

        self.counters.transfers += 1
        self.wait_for(self.start(ops, name), name)
        received = buffer.view(x.shape).clone()
        self.buffers.give(buffer)
        return received


def total(neighbours: Neighbours, x: Tensor) -> Tensor:
    """The sum of all ranks' tensors."""
    found = x.clone()
    for _ in range(1, neighbours.world):
        x = neighbours.shift(x)
        found += x
    return found


class Sabotaged(Neighbours):
    """Something happens to its first transfers, one after the other.

    Args:
        todo: ``lose``: the message never comes; ``drop``: all connections are shut down; ``raise``.
        before: what was open in the process before there were connections.
    """

    def __init__(
        self, group: Any, timeout: float, todo: list[str], before: Collection[str]
    ) -> None:
        super().__init__(group, timeout)
        self._todo, self._before = todo, before

    def over(self, group: Any, timeout: float) -> Sabotaged:
        return Sabotaged(group, timeout, self._todo, self._before)

    def start(self, ops: Any, operation: Callable[[], str]) -> list[Any]:
        kind = self._todo.pop(0) if self._todo else None
        if kind == "raise":
            raise ArithmeticError("sabotage")
        if kind == "drop":
            assert drop(self._before), "no connection to drop"
        works = super().start(ops, operation)
        if kind == "lose":
            before = (self.rank - 1) % self.world
            nothing = dist.irecv(torch.empty(1), group=self.group, group_src=before, tag=99)
            works.append(nothing)
        return works


def drilled(worker: Worker, todo: list[str], retries: int) -> dict[str, Any]:
    """What a sum comes to on this rank, and what works after it."""
    kinds = list(todo) if worker.rank == VICTIM else []
    neighbours = Sabotaged(worker.group, TIMEOUT, kinds, connections())
    x = torch.tensor([1.0, 10.0]) ** worker.rank
    found: dict[str, Any] = {"attempts": 0}
    dist.barrier(worker.group)  # a process that has just started may be late

    def attempt(one: Sabotaged) -> Tensor:
        assert type(one) is Sabotaged
        assert one.group is not worker.group
        found["attempts"] += 1
        return total(one, x)

    try:
        found["sum"] = neighbours.retried("the sum", attempt, retries=retries, backoff=0.05)
    except Exception as error:
        found["error"], found["text"] = type(error).__name__, str(error)
    found["transfers"] = neighbours.counters.transfers
    dist.all_reduce(x_of_all := x.clone(), group=worker.group)
    found["after"] = [
        x_of_all,
        total(neighbours, x),  # over the caller's group
        neighbours.retried("another sum", lambda one: total(one, x), retries=0),
    ]
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Processes of this module's own: a thread of gloo's may spin on lost connections for good."""
    pool = RankPool(4)
    yield pool
    pool.close()


def drill(pool: RankPool, world: int, todo: list[str], retries: int) -> list[dict[str, Any]]:
    """What the ranks found out; none of it did harm to the caller's group."""
    found = pool.run(drilled, todo, retries, world=world, fresh=True, timeout=60)
    for one in found:
        for after in one["after"]:
            assert torch.equal(after, right(world)), found
    return found


def right(world: int) -> Tensor:
    return sum(torch.tensor([1.0, 10.0]) ** rank for rank in range(world))


@pytest.mark.parametrize("kind", ["lose", "drop"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_try_again_where_transfers_fail(pool: RankPool, world: int, kind: str) -> None:
    found = drill(pool, world, [kind], retries=2)
    for one in found:
        assert torch.equal(one["sum"], right(world)), found
    victim = found[VICTIM]
    if kind == "lose":
        assert all(one["attempts"] == 2 for one in found), found
        assert all(one["transfers"] > world - 1 for one in found), found
        assert victim["transfers"] == 1 + (world - 1), "both attempts are counted"
    else:  # others may not have come as far as their first transfer
        assert victim["attempts"] >= 2, found
        assert victim["transfers"] > world - 1, found


def test_retries_come_to_an_end(pool: RankPool) -> None:
    """All raise one error, which says what each rank met in the last attempt."""
    found = drill(pool, 3, ["lose", "lose"], retries=1)
    assert [one["error"] for one in found] == ["RingTimeoutError"] * 3, found
    assert len({one["text"] for one in found}) == 1, found
    assert late("rank 1 of 3, the sum, attempt 2") in found[0]["text"]
    assert all(one["attempts"] == 2 for one in found), found


def late(here: str) -> str:
    """How the victim reports a message that was lost."""
    who = here.split(",")[0]
    return f"{here}: {who}: receiving from rank 0 not done after timeout={WAIT * TIMEOUT:g} s"


def test_without_retries_a_lost_message_is_one_error(pool: RankPool) -> None:
    found = drill(pool, 2, ["lose"], retries=0)
    assert [one["error"] for one in found] == ["RingTimeoutError"] * 2, found
    assert found[0]["text"] == found[1]["text"]
    assert late("rank 1 of 2, the sum") in found[0]["text"]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_that_raises_is_named_by_the_others(pool: RankPool, world: int) -> None:
    found = drill(pool, world, ["raise"], retries=3)
    assert all(one["attempts"] == 1 for one in found), "another attempt would not mend it"
    victim = found.pop(VICTIM)
    assert (victim["error"], victim["text"]) == ("ArithmeticError", "sabotage")
    for one in found:
        assert one["error"] == "RankFailedError", one
        assert one["text"] == f"rank 1 of {world}, the sum: ArithmeticError: sabotage"


def behind(worker: Worker) -> tuple[str, Tensor | str]:
    """A sum to which a rank comes when the others have given up, and another one."""
    dist.barrier(worker.group)
    neighbours = Neighbours(worker.group, TIMEOUT)
    x = torch.tensor([1.0, 10.0]) ** worker.rank
    store = store_of(worker.group)
    others = [rank for rank in range(worker.world) if rank != VICTIM]
    if worker.rank == VICTIM:
        store.wait([f"gave up: {rank}" for rank in others], timedelta(seconds=30))
    said = tried(neighbours, "the sum", x)
    store.set(f"gave up: {worker.rank}", "")
    return said, tried(neighbours, "another sum", x)


def tried(neighbours: Neighbours, operation: str, x: Tensor) -> Tensor | str:
    """A sum, or the error instead."""
    try:
        return neighbours.retried(operation, lambda one: total(one, x), retries=2)
    except RingError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_that_does_not_come_is_named(pool: RankPool, world: int) -> None:
    found = pool.run(behind, world=world, fresh=True, timeout=60)
    (text,) = {said for said, _ in found}
    assert text.startswith(f"RankFailedError: rank 1 of {world} did not come to the end of the sum")
    for _, after in found:  # it was slow, and comes to the next one in time
        assert torch.equal(after, right(world)), found


def apart(worker: Worker) -> tuple[str, Tensor | str]:
    dist.barrier(worker.group)
    neighbours = Neighbours(worker.group, TIMEOUT)
    x = torch.tensor([1.0, 10.0]) ** worker.rank
    operation = "a product" if worker.rank == VICTIM else "the sum"
    return tried(neighbours, operation, x), tried(neighbours, "another sum", x)


def test_ranks_at_different_operations_are_told_apart(pool: RankPool) -> None:
    found = pool.run(apart, world=3, fresh=True, timeout=60)
    (text,) = {said for said, _ in found}
    assert text.startswith("RankFailedError: the ranks of the group are at different operations")
    assert "(rank 0: the sum; rank 1: a product; rank 2: the sum)" in text
    assert all(torch.equal(after, right(3)) for _, after in found)


def alone(worker: Worker) -> bool:
    neighbours = Neighbours(worker.group, TIMEOUT)
    assert neighbours.retried("nothing", lambda one: one, retries=3) is neighbours
    with pytest.raises(ArithmeticError, match="sabotage"):
        neighbours.retried("a failure", raising, retries=3)
    for wrong in ({"retries": -1}, {"retries": 0, "backoff": -0.5}):
        with pytest.raises(InputError, match="neither may be negative"):
            neighbours.retried("nothing", lambda one: one, **wrong)
    return True


def raising(neighbours: Neighbours) -> None:
    raise ArithmeticError("sabotage")


def test_one_rank_alone(pool: RankPool) -> None:
    assert pool.run(alone, world=1, fresh=True) == [True]


def gathered(worker: Worker) -> tuple[int, int, list[float]]:
    """The shipped communicator: every rank's tensor on all, where connections are lost once."""
    dist.barrier(worker.group)
    communicator = PointToPoint(worker.group, TIMEOUT)
    before, attempts = connections(), 0

    def attempt(one: PointToPoint) -> list[float]:
        nonlocal attempts
        attempts += 1
        if attempts == 1 and worker.rank == VICTIM:
            assert drop(before), "no connection to drop"
        x = torch.full((1, 1, 1, 2), float(worker.rank))
        found = Exchange(one.rank, one.world, one, tag=7).gather([x], [1] * one.world)
        return [float(x.sum()) for (x,) in found]

    found = communicator.retried("gathering", attempt, retries=2, backoff=0.05)
    return attempts, communicator.counters.transfers, found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_shipped_communicator(pool: RankPool, world: int) -> None:
    ranks = pool.run(gathered, world=world, fresh=True, timeout=60)
    for _, _, found in ranks:
        assert found == [2.0 * rank for rank in range(world)], ranks
    attempts, transfers, _ = ranks[VICTIM]
    assert attempts >= 2
    assert transfers > world - 1, "all attempts are counted"


def given_up(worker: Worker) -> bool:
    """A group of the library's own, and one of two of its ranks."""
    ranks = dist.get_process_group_ranks(worker.group)
    child = child_group(worker.group, ranks, 20.0)
    first = worker.rank - worker.rank % 2
    part = child_group(child, ranks[first : first + 2], 20.0)
    ended: list[str] = []
    # gloo (of torch 2.13) shows nothing of it: what waits there goes on waiting.
    with patch.object(dist.ProcessGroup, "abort", lambda group: ended.append(group.group_name)):
        abort(child)
    return ended == [part.group_name, child.group_name]


def test_parts_of_a_group_are_given_up_with_it(pool: RankPool) -> None:
    assert all(pool.run(given_up, world=4, fresh=True))


def as_shown(worker: Worker, code: str) -> Tensor:
    x = torch.tensor([1.0, 10.0]) ** worker.rank
    names: dict[str, Any] = {"group": worker.group, "x": x}
    exec(code, names)
    return names["sums"]


def test_the_pages_communicator_works_as_it_stands_there(pool: RankPool) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = [block for block in blocks if "Neighbours(" in block]
    assert len(code) == 2
    for found in pool.run(as_shown, "\n".join(code), world=3):
        assert torch.equal(found, right(3))

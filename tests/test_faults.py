"""Fault drills: ranks that die, stop, raise, are slow or lose their connections, at random steps.

Each drill is a few steps of forward and backward in real processes; each ends in the right outcome
on every rank within the deadline: the undisturbed result, or one error that names the rank.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ring_core import Observer, WrappedCommunicator, hookimpl, reference, registry
from ring_core.testing import RankPool, Worker

TIMEOUT = 3.0
STEPS = 3
RANKS = 3
LENGTH = 21


class Saboteur:
    """A plugin of this process: something happens at a transfer of its rank, once."""

    RING_HOOK_API = 1

    def __init__(self, kind: str, transfer: int) -> None:
        self.kind, self.transfer, self.armed, self.seen = kind, transfer, False, 0
        self.sockets: Collection[str] = ()

    @hookimpl
    def ring_observers(self) -> list[Observer]:
        return [Wrapping(self)]

    def strike(self) -> None:
        """Called before each transfer."""
        if not self.armed:
            return
        self.seen += 1
        if self.seen <= self.transfer:
            return
        self.armed = False
        if self.kind == "raise":
            raise ArithmeticError("sabotage")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "slow":
            time.sleep(TIMEOUT / 4)
        if self.kind == "too slow":
            time.sleep(2 * TIMEOUT)
        if self.kind == "drop":
            assert drop(self.sockets), "no connection to drop"


class Wrapping(Observer):
    def __init__(self, saboteur: Saboteur) -> None:
        self._saboteur = saboteur

    def communicator(self, communicator: Any) -> Any:
        return Wrapped(communicator, self._saboteur)


class Wrapped(WrappedCommunicator):
    """A communicator before whose transfers the saboteur is asked."""

    def __init__(self, inner: Any, saboteur: Saboteur) -> None:
        super().__init__(inner)
        self._saboteur = saboteur

    def fetch(self, *transfer: Any) -> Any:
        self._saboteur.strike()
        return super().fetch(*transfer)

    def give_back(self, *transfer: Any) -> Any:
        self._saboteur.strike()
        return super().give_back(*transfer)


def connections() -> dict[str, int]:
    """Sockets of this process, each by a name that no later one gets, with its file's number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own is closed again
            name = os.readlink(f"/proc/self/fd/{number}")
            if name.startswith("socket:"):
                found[name] = int(number)
    return found


def drop(before: Collection[str]) -> int:
    """Shut down the connections of this process that were not there ``before``."""
    count = 0
    for name, number in connections().items():
        if name in before:
            continue
        with (
            contextlib.suppress(OSError),  # it listens
            socket.socket(fileno=os.dup(number)) as connection,
        ):
            connection.getpeername()
            connection.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def steps(group: Any, rank: int, drill: dict[str, Any]) -> list[dict[str, Any]]:
    """What each step came to on this rank: its error, or how far it is from the reference."""
    saboteur = Saboteur(drill["kind"], drill["transfer"])
    registry.register(saboteur, name="saboteur")
    try:
        dist.barrier(group)  # a rank that is still starting is not what is drilled
        saboteur.sockets = connections()
        attention = registry.create(
            "distributed",
            causal=True,
            group=group,
            timeout=TIMEOUT,
            monitor=True,
            ulysses=drill["ulysses"],
            **drill["with"],
        )
        return [_step(attention, saboteur, drill, step, rank) for step in range(STEPS)]
    finally:
        registry.unregister("saboteur")


def _step(attention, saboteur, drill, step, rank) -> dict[str, Any]:
    now = step == drill["step"] and rank == drill["victim"]
    saboteur.armed = now
    plan = attention.plan(LENGTH)
    generator = torch.Generator().manual_seed(step)
    q, k, v, dout = (
        torch.randn(1, LENGTH, 3, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seen = reference.visible(LENGTH, LENGTH, causal=True)
    right, _ = reference.attention(*leaves, seen)
    wanted = [right.detach(), *torch.autograd.grad(right, leaves, dout)]
    mine = [plan.shard(x.detach()).requires_grad_() for x in leaves]
    if now and drill["kind"] == "nan":
        mine[1] = mine[1].detach().clone()
        mine[1][0, 2] = torch.nan
        mine[1].requires_grad_()
    if now and drill["kind"] == "length":
        mine[1] = mine[1].detach()[:, 1:].requires_grad_()
    started = time.monotonic()
    try:
        out = attention(*mine, plan=plan)
        found = [out.detach(), *torch.autograd.grad(out, mine, plan.shard(dout))]
    except Exception as error:
        return {
            "error": type(error).__name__,
            "text": str(error),
            "seconds": time.monotonic() - started,
        }
    right = [plan.shard(x) for x in wanted]
    error = max(float((a - b).abs().max()) for a, b in zip(found, right, strict=True))
    retries = sum(one.retries for one in list(attention.monitor.records)[-2:])
    return {"off by": error, "seconds": time.monotonic() - started, "retries": retries}


def in_pool(worker: Worker, drill: dict[str, Any]) -> list[dict[str, Any]]:
    return steps(worker.group, worker.rank, drill)


GUARDED = {"retries": 2, "backoff": 0.05, "check_finite": True}


def drills(kinds: list[str], count: int, **fields: Any) -> list[dict[str, Any]]:
    chance = random.Random(len(kinds))
    return [
        {
            "kind": kinds[n % len(kinds)],
            "victim": chance.randrange(RANKS),
            "step": chance.randrange(STEPS),
            "transfer": chance.randrange(4),
            "ulysses": chance.choice([1, 1, 3]),
            "with": fields,
        }
        for n in range(count)
    ]


def check(drill: dict[str, Any], outcomes: dict[int, list[dict[str, Any]]]) -> None:
    """Whether the ranks that still live came to what they should."""
    victim, kind = drill["victim"], drill["kind"]
    healed = kind in ("slow", "drop")
    for rank, found in outcomes.items():
        for step, one in enumerate(found):
            assert one["seconds"] < 2 * TIMEOUT + 1, (drill, rank, step, one)
            if step < drill["step"] or healed:
                assert one.get("off by", 1) < 1e-10, (drill, rank, step, one)
    if healed:
        retried = {rank: found[drill["step"]]["retries"] for rank, found in outcomes.items()}
        # All alike; twice, where a fresh group could not connect in its part of the deadline.
        assert tuple(set(retried.values())) in ([(1,), (2,)] if kind == "drop" else [(0,)]), drill
        return
    struck = {rank: found[drill["step"]] for rank, found in outcomes.items()}
    others = [one for rank, one in struck.items() if rank != victim]
    assert len({one["text"] for one in others}) == 1, (drill, struck)
    assert all("error" in one for one in struck.values()), (drill, struck)
    named = others[0]
    assert f"rank {victim}" in named["text"], (drill, named)
    expected = {
        "raise": "RankFailedError",
        "nan": "NonFiniteError",
        "length": "DisagreementError",
    }.get(kind, "RankFailedError" if drill["with"] else "RingTimeoutError")
    assert named["error"] == expected, (drill, named)
    if kind == "raise":
        assert struck[victim]["error"] == "ArithmeticError"
        assert "ArithmeticError: sabotage" in named["text"]
    if kind == "nan":
        assert "k holds 12 numbers that are not finite" in named["text"], named
    if kind in ("raise", "nan"):  # and everybody goes on
        for found in outcomes.values():
            for one in found[drill["step"] + 1 :]:
                assert one.get("off by", 1) < 1e-10, (drill, one)


def some(todo: list[dict[str, Any]]) -> list[list[Any]]:
    """Run drills one after the other, in a pool of their own."""
    pool = RankPool(RANKS)
    try:
        return [pool.run(in_pool, drill, fresh=True, timeout=60) for drill in todo]
    finally:
        pool.close()


def alone(rank: int, port: int, drill: dict[str, Any], folder: str) -> None:
    """A process of a drill that may end it; its outcome goes into a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    store = dist.PrefixStore(Path(folder).name, store)  # one serves all drills
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    outcome = steps(None, rank, drill)
    part = Path(folder) / f"part.{rank}"
    part.write_text(json.dumps(outcome))
    part.rename(Path(folder) / f"{rank}.json")  # whole at once
    os._exit(0)  # gloo does not end well where a peer is gone


def end(drill: dict[str, Any], port: int, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Run a drill in processes of its own, which meet at ``port``; what the survivors say."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ring_core.testing.preloaded"])
    processes = [
        context.Process(target=alone, args=(rank, port, drill, str(folder)), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    living = [rank for rank in range(RANKS) if rank != drill["victim"]]
    deadline = time.monotonic() + 60
    try:
        while not all((folder / f"{rank}.json").exists() for rank in living):
            assert time.monotonic() < deadline, f"{drill}: a survivor hangs"
            time.sleep(0.05)
        return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in living}
    finally:
        for process in processes:
            process.kill()
            process.join()


SURVIVED = drills(["raise", "nan", "length", "slow", "drop"], 30, **GUARDED)
DEADLY = drills(["kill", "stop", "too slow"], 20, **GUARDED) + drills(["kill", "stop"], 4)
"""The last ones with the fields as they are by default: without retries and checks."""
LATE = {"kind": "too slow", "victim": 1, "step": 0, "transfer": 0, "ulysses": 1, "with": GUARDED}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Future]]:
    """All drills: they wait most of the time, so several go on at once."""
    folders = [tmp_path_factory.mktemp("drill") for _ in DEADLY]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(5) as pools, ThreadPoolExecutor(7) as threads:
        return {
            "survived": [pools.submit(some, SURVIVED[n::4]) for n in range(4)],
            "late": [pools.submit(some, [LATE])],
            "deadly": [
                threads.submit(end, drill, store.port, folder)
                for drill, folder in zip(DEADLY, folders, strict=True)
            ],
        }


def test_drills_that_everybody_survives(outcomes: dict[str, list[Future]]) -> None:
    """Raising, NaN, a wrong length, slow, connections shut down."""
    for n, part in enumerate(outcomes["survived"]):
        for drill, found in zip(SURVIVED[n::4], part.result(), strict=True):
            check(drill, dict(enumerate(found)))


def test_drills_that_a_rank_does_not_survive(outcomes: dict[str, list[Future]]) -> None:
    """Killed, stopped, or much too slow: the others name it, all in the same words."""
    for drill, found in zip(DEADLY, outcomes["deadly"], strict=True):
        check(drill, found.result())


def test_errors_come_back_in_processes_that_were_slow(outcomes: dict[str, list[Future]]) -> None:
    """A rank that comes after the verdict raises what the others did."""
    (found,) = outcomes["late"][0].result()
    assert len({one[0]["text"] for one in found}) == 1
    assert "rank 1 of 3 did not come" in found[0][0]["text"]
    # The group cannot be used any more, and says so at once.
    assert all(one[1]["text"] == one[0]["text"] and one[1]["seconds"] < 1 for one in found)

"""Links that go down: gloo over two network namespaces of Linux, joined as two hosts are.

Each drill is a few steps of forward and backward in two real processes, each in a namespace of its
own. One link between them carries the transfers, another leads to the store through which the ranks
meet. A rank takes links down before a transfer of its own. No connection is shut down then: packets
vanish and nobody is told, as where a cable is pulled or a host loses its power.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_faults import TIMEOUT, Saboteur, _step

from ring_core import registry

RANKS = 2
STEPS = 3
STRUCK = 1
"""The step in which links go down."""
BACKOFF = 1.0
SLACK = 2.0
"""Seconds that a machine with few cores may take beyond what timeouts add up to."""
LIMIT = 20.0
"""Seconds after which a process that says nothing hangs."""
LINKS = {"data": "10.78.1", "store": "10.78.2"}
"""Their devices are called alike in both namespaces; rank 0 has address .1, rank 1 has .2."""
RETRANSMISSIONS = 3
"""After 0.2, 0.6 and 1.4 s; at 3.0 s the connection is given up."""

Outcomes = dict[str, dict[int, list[dict[str, Any]]]]


def drill(victim: int, transfer: int, *links: str, **options: Any) -> dict[str, Any]:
    """Before a transfer of a rank its ends of links go down.

    Args:
        back: whether they come up again, when the first retry is announced.
        retries: of the attention.
        retransmissions: after which the kernel gives a connection up; None: its default, which
            takes a quarter of an hour.
    """
    usual = {"back": False, "retries": 2, "retransmissions": None}
    place = {"kind": "links", "step": STRUCK, "victim": victim, "transfer": transfer}
    return {**place, "links": links, **usual, **options}


# A rank's transfers of a step: 0 in the forward, 1 and 2 in the backward.
DRILLS = {
    "back in the forward": drill(1, 0, "data", back=True),
    "back in the backward": drill(0, 2, "data", back=True),
    "down, no retries": drill(0, 0, "data", retries=0),
    "down, two retries": drill(1, 1, "data"),
    "both down": drill(1, 1, "data", "store"),
    "both down, given up": drill(1, 1, "data", "store", retransmissions=RETRANSMISSIONS),
}


def ip(*arguments: str) -> None:
    """iproute2's command."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def namespaces(name: str) -> Iterator[list[str]]:
    """Two of them, with the links between them."""
    names = [f"{name}-{rank}" for rank in range(RANKS)]
    try:
        for one in names:
            ip("netns", "add", one)
            ip("-n", one, "link", "set", "lo", "up")
        for link, net in LINKS.items():
            ends = ["netns", names[0], "type", "veth", "peer", "name", link, "netns", names[1]]
            ip("link", "add", link, *ends)
            for rank, one in enumerate(names):
                ip("-n", one, "address", "add", f"{net}.{rank + 1}/24", "dev", link)
                ip("-n", one, "link", "set", link, "up")
        yield names
    finally:
        for one in names:  # the links go with them
            subprocess.run(["ip", "netns", "delete", one], capture_output=True)


def enter(namespace: str) -> None:
    """This thread, and those that it starts, are in it from here on; Python 3.12 has os.setns."""
    new_network = 0x40000000  # CLONE_NEWNET
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")


class Cutter(Saboteur):
    """Takes this namespace's ends of links down."""

    def __init__(self, drill: dict[str, Any]) -> None:
        super().__init__(drill["kind"], drill["transfer"])
        self._links = drill["links"]

    def strike(self) -> None:
        before = self.armed
        super().strike()
        if before and not self.armed:
            for link in self._links:
                ip("link", "set", link, "down")


class Mender(logging.Handler):
    """Brings links up again when a retry is announced: transfers have failed by then, and the retry
    is still to come. Reads the library's log."""

    def __init__(self, links: list[str]) -> None:
        super().__init__()
        self._links = links

    def emit(self, record: logging.LogRecord) -> None:
        if "trying again" in record.getMessage():
            for link in self._links:
                ip("link", "set", link, "up")


def alone(rank: int, namespace: str, drill: dict[str, Any], folder: str) -> None:
    """A process of a drill; its outcome goes into a file."""
    enter(namespace)
    if drill["retransmissions"] is not None:
        Path("/proc/sys/net/ipv4/tcp_retries2").write_text(str(drill["retransmissions"]))
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "data"
    deadline = timedelta(seconds=LIMIT)
    address = f"{LINKS['store']}.1"
    store = dist.TCPStore(address, 29500, RANKS, is_master=rank == 0, timeout=deadline)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    cutter = Cutter(drill)
    registry.register(cutter, name="cutter")
    if drill["back"] and rank == drill["victim"]:
        logging.getLogger("ring_attention_distributed").addHandler(Mender(drill["links"]))
    attention = registry.create(
        "distributed",
        causal=True,
        **({"retries": drill["retries"], "backoff": BACKOFF} if drill["retries"] else {}),
        check_finite=True,
        timeout=TIMEOUT,
        monitor=True,
        ulysses=1,
    )
    outcome: list[dict[str, Any]] = []
    while len(outcome) < STEPS and not any("error" in one for one in outcome):
        outcome.append(_step(attention, cutter, drill, len(outcome), rank))
    part = Path(folder) / f"part.{rank}"
    part.write_text(json.dumps(outcome))
    part.rename(Path(folder) / f"{rank}.json")  # whole at once
    time.sleep(LIMIT)  # rank 0 serves the store; both are killed when both are done
    os._exit(0)


def run(drill: dict[str, Any], names: list[str], folder: Path) -> dict[int, list[dict[str, Any]]]:
    """A drill in processes of its own: what its ranks say, of those that come to an end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_network", "ring_core.testing"])
    processes = [
        context.Process(target=alone, args=(rank, name, drill, str(folder)), daemon=True)
        for rank, name in enumerate(names)
    ]
    for process in processes:
        process.start()
    files = {rank: folder / f"{rank}.json" for rank in range(RANKS)}
    deadline = time.monotonic() + LIMIT
    try:
        while time.monotonic() < deadline and not all(file.exists() for file in files.values()):
            time.sleep(0.05)
        return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all drills: they wait most of the time, so they go on at once."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip (apt-get install iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            pairs = [
                stack.enter_context(namespaces(f"ring-{os.getpid()}-{n}"))
                for n in range(len(DRILLS))
            ]
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces joined by veth devices, as root: {error.stderr}")
        folders = [tmp_path_factory.mktemp("drill") for _ in DRILLS]
        with concurrent.futures.ThreadPoolExecutor(len(DRILLS)) as threads:
            found = threads.map(run, DRILLS.values(), pairs, folders)
            return dict(zip(DRILLS, found, strict=True))


def struck(outcomes: Outcomes, name: str) -> list[dict[str, Any]]:
    """What the step in which links went down came to, by rank; the one before was undisturbed."""
    found = outcomes[name]
    assert set(found) == set(range(RANKS)), f"{name}: came to an end on ranks {list(found)} only"
    for steps in found.values():
        assert steps[0].get("off by", 1) < 1e-10, (name, steps)
        assert steps[0]["retries"] == 0, (name, steps)
    return [found[rank][STRUCK] for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["back in the forward", "back in the backward"])
def test_a_link_that_comes_back_changes_no_result(outcomes: Outcomes, name: str) -> None:
    for one in struck(outcomes, name):
        assert one.get("retries", 0) >= 1, one
        assert one["seconds"] > 0.75 * TIMEOUT, one  # longer than transfers may take
    for steps in outcomes[name].values():
        assert len(steps) == STEPS
        assert all(one.get("off by", 1) < 1e-10 for one in steps), steps
        assert steps[-1]["retries"] == 0, steps


@pytest.mark.parametrize(
    "name",
    [
        "down, no retries",
        "down, two retries",
    ],
)
def test_a_link_that_stays_down_is_one_error_for_both(outcomes: Outcomes, name: str) -> None:
    retries = DRILLS[name]["retries"]
    pauses = sum(BACKOFF * 2**attempt for attempt in range(retries))
    both = struck(outcomes, name)
    for one in both:
        assert one.get("error") == "RingTimeoutError", one
        assert one["seconds"] < (retries + 1) * TIMEOUT + pauses + SLACK, one
    assert len({one["text"] for one in both}) == 1, both


def test_without_any_link_each_ends_alone(outcomes: Outcomes) -> None:
    """Where the kernel gives connections up soon; rank 0 serves the store."""
    at_the_store, away = struck(outcomes, "both down, given up")
    given_up = 0.2 * (2 ** (RETRANSMISSIONS + 1) - 1)
    for one in (at_the_store, away):
        assert one.get("error") == "RankFailedError", one
        assert one["seconds"] < TIMEOUT + given_up + SLACK, one
    assert "rank 1 of 2 did not come" in at_the_store["text"]
    assert "the store through which ranks meet" in away["text"]


def test_without_any_link_each_names_the_other(outcomes: Outcomes) -> None:
    for rank, one in enumerate(struck(outcomes, "both down, given up")):
        assert f"rank {1 - rank}" in one["text"], one


def test_nobody_waits_for_the_kernel(outcomes: Outcomes) -> None:
    """The kernel takes a quarter of an hour to give a connection up."""
    for one in struck(outcomes, "both down"):
        assert one.get("error") == "RankFailedError", one
        assert one["seconds"] < 2 * TIMEOUT + SLACK, one

"""A real Prometheus server scrapes a running job, and what it holds is what the logs say.

Only where RING_TEST_PROMETHEUS=1 is set: it needs a server (apt-get install prometheus).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import Saboteur

from ring_core import registry
from ring_core.errors import RingTimeoutError
from ring_core.testing import RankPool, Worker

pytestmark = pytest.mark.skipif(
    os.environ.get("RING_TEST_PROMETHEUS") != "1",
    reason="RING_TEST_PROMETHEUS=1 runs it, with a server (apt-get install prometheus)",
)

RANKS = 2
CALLS = 40
"""Forwards, each with a backward."""
PAUSE = 0.1
"""Seconds between them: the job goes on for several scrapes, which come every second."""
PATIENCE = 15.0
"""Seconds in which a server starts and scrapes."""


class Late(Saboteur):
    """A transfer of its rank fails, once: the call is tried again."""

    def strike(self) -> None:
        before = self.armed
        super().strike()
        if before and not self.armed:
            raise RingTimeoutError("sabotage")


def made(worker: Worker, folder: str) -> Any:
    """The attention of the job; all those of a process write to the same places."""
    return registry.create(
        "distributed",
        causal=True,
        group=worker.group,
        metrics_port=0,
        metrics_log=folder,
        retries=1,
        backoff=0.05,
        timeout=2.0,
        ulysses=1,
    )


def listening(worker: Worker, folder: str) -> str:
    """Where this rank's endpoint is: host:port."""
    return "{}:{}".format(*made(worker, folder).monitor.endpoint.address)


def job(worker: Worker, folder: str) -> float:
    """Calls, of which one is tried again; when they were written down."""
    late = Late("late", 1)
    registry.register(late, name="late")
    try:
        attention = made(worker, folder)
        q, k, v = (torch.randn(1, 24, 2, 4, requires_grad=True) for _ in range(3))
        plan = attention.plan(24 * worker.world)
        for call in range(CALLS):
            late.armed = call == CALLS // 2 and worker.rank == 1
            attention(q, k, v, plan=plan).sum().backward()
            time.sleep(PAUSE)
        attention.monitor.flush(wait=True)
        return time.time()
    finally:
        registry.unregister("late")


class Server:
    """A Prometheus server on this machine that scrapes ``targets`` every second."""

    def __init__(self, binary: str, folder: Path, targets: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "ring", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._log = (folder / "prometheus.log").open("w+")
        self._process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def ask(self, query: str) -> list[dict[str, Any]]:
        """What the server holds for a query."""
        asked = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{asked}") as answer:
            return list(json.load(answer)["data"]["result"])

    def until(self, query: str) -> None:
        """Wait until the server has an answer for every rank."""
        deadline = time.monotonic() + PATIENCE
        answer: Any = None
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):  # it has yet to start
                answer = self.ask(query)
                if len(answer) == RANKS:
                    return
            time.sleep(0.1)
        self._log.seek(0)
        pytest.fail(f"{query} came to {answer}; the server's log: {self._log.read()}")

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Processes whose endpoints count nothing but this job."""
    pool = RankPool(RANKS)
    yield pool
    pool.close()


def by_rank(answer: list[dict[str, Any]], *labels: str) -> dict[tuple[str, ...], float]:
    """The values of an answer, by rank and other labels."""
    return {
        tuple(one["metric"][label] for label in ("rank", *labels)): float(one["value"][1])
        for one in answer
    }


def test_the_server_holds_what_the_logs_say(pool: RankPool, tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.fail("RING_TEST_PROMETHEUS is set, and there is no server: install prometheus")
    logs = tmp_path / "logs"
    targets = pool.run(listening, str(logs))
    server = Server(binary, tmp_path, targets)
    try:
        server.until("up == 1")
        ended = max(pool.run(job, str(logs)))
        # The processes are there still, with nothing to do: one more scrape sees the last values.
        server.until(f"timestamp(ring_attention_slowdown) > {ended:.3f}")
        compare(server, logs, targets)
    finally:
        server.close()


def compare(server: Server, logs: Path, targets: list[str]) -> None:
    """Each number of the server's with the logs' lines."""
    calls, seconds, moved = {}, {}, {}
    retries, memory, slowdown = {}, {}, {}
    for rank in range(RANKS):
        lines = (logs / f"rank-{rank}.jsonl").read_text().splitlines()
        log, name = [json.loads(line) for line in lines], str(rank)
        for direction in ("forward", "backward"):
            calls[name, direction] = sum(one["direction"] == direction for one in log)
        seconds[name, "wait"] = sum(one["waiting"] for one in log)
        seconds[name, "compute"] = sum(one["seconds"] - one["waiting"] for one in log)
        for way in ("sent", "received"):
            moved[name, way] = sum(one[f"bytes_{way}"] for one in log)
        retries[name,] = sum(one["retries"] for one in log)
        memory[name, targets[rank]] = log[-1]["memory_bytes"]
        slowdown[name, targets[rank]] = log[-1]["slowdown"]
    assert set(calls.values()) == {CALLS}
    assert set(retries.values()) == {1}
    assert min(moved.values()) > 0

    def held(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return by_rank(server.ask(f"ring_attention_{name}"), *labels)

    assert held("calls_total", "direction") == calls
    assert held("seconds_total", "part") == pytest.approx(seconds)
    assert held("bytes_total", "way") == moved
    assert held("retries_total") == retries
    assert held("memory_bytes", "instance") == memory
    assert held("slowdown", "instance") == pytest.approx(slowdown)
    # It was scraped while it went on, not only when it was over.
    courses = server.ask('ring_attention_calls_total{direction="forward"}[5m]')
    assert len(courses) == RANKS
    for course in courses:
        values = [float(value) for _, value in course["values"]]
        assert values == sorted(values)
        assert len(set(values)) >= 2, values
        assert values[-1] == CALLS

"""Traces hold every transfer with its peers and bytes, and are JSON at any moment."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ring_core import registry
from ring_core.rounds import elements_fetched, elements_sent
from ring_core.testing import RankPool, Worker

from ring_attention_tracing.trace import TraceFile

WORLD = 3


def step(worker: Worker, path: str, calls: int = 1) -> dict[str, Any]:
    """Calls with a backward, traced: what they should move by the plan, and this process's rank."""
    os.environ["RING_TRACE"] = path
    try:
        attention = registry.create("standard", causal=True, group=worker.group)
    finally:
        del os.environ["RING_TRACE"]
    plan = attention.plan(30)
    for _ in range(calls):
        q, k, v = (torch.randn(2, plan.local_len, 2, 8, requires_grad=True) for _ in range(3))
        attention(q, k, v, plan=plan).sum().backward()
    row = 2 * 2 * 8 * q.itemsize  # keys and values, batch rows, head_dim
    return {
        "fetched": row * elements_fetched(plan.plan, worker.rank, 2),
        "sent": row * elements_sent(plan.plan, worker.rank, 2),
        "rank": torch.distributed.get_rank(),
        "wrapped": type(attention.communicator(plan)).__name__,
    }


def events(path: Path) -> list[dict[str, Any]]:
    """The transfers of a trace."""
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_a_call_and_its_backward(cpu_pool: RankPool, tmp_path: Path) -> None:
    """Keys are fetched for both; gradients go back as many as keys came."""
    found = cpu_pool.run(step, str(tmp_path / "new folder" / "run"), 2, world=WORLD)
    for one in found:
        rank, there = one["rank"], events(tmp_path / "new folder" / f"run.rank{one['rank']}.json")
        assert {event["pid"] for event in there} == {rank}
        assert all(event["dur"] > 0 for event in there)
        for name, received, sent in (
            ("keys", 4 * one["fetched"], 4 * one["sent"]),
            ("gradients", 2 * one["sent"], 2 * one["fetched"]),
        ):
            mine = [event["args"] for event in there if event["name"] == name]
            assert sum(about["bytes_received"] for about in mine) == received
            assert sum(about["bytes_sent"] for about in mine) == sent
            for about in mine:
                assert bool(about["from"]) == bool(about["bytes_received"])
                assert bool(about["to"]) == bool(about["bytes_sent"])
                offset = about["round"] if name == "keys" else -about["round"]
                assert about["from"] in ([], [(rank - offset) % WORLD])
                assert about["to"] in ([], [(rank + offset) % WORLD])


def test_peers_are_named_by_their_rank_among_all(cpu_pool: RankPool, tmp_path: Path) -> None:
    cpu_pool.run(step, str(tmp_path / "run"), ranks=[1, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.rank1.json", "run.rank4.json"]
    peers = {event["args"]["from"][0] for event in events(tmp_path / "run.rank4.json")}
    assert peers == {1}


def test_events_of_one_line_do_not_overlap(cpu_pool: RankPool, tmp_path: Path) -> None:
    """A viewer draws those of one line one after another."""
    cpu_pool.run(step, str(tmp_path / "run"), 3, world=WORLD)
    there = events(tmp_path / "run.rank0.json")
    for line in {event["tid"] for event in there}:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in there if e["tid"] == line)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_without_the_variable_nothing_is_wrapped(cpu_pool: RankPool, tmp_path: Path) -> None:
    found = cpu_pool.run(step, "", world=2)
    assert {one["wrapped"] for one in found} == {"PointToPoint"}
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code = (
        "from pathlib import Path\n"
        "from ring_attention_tracing.trace import TraceFile\n"
        f"trace = TraceFile(Path({str(path)!r}), 0)\n"
        "for n in range(10**9):\n"
        "    trace.add('keys', trace.begin(), n, n + 1, {'n': n})\n"
        "    if n == 20: print('20', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    there = events(path)
    assert len(there) > 20
    assert [event["args"]["n"] for event in there] == list(range(len(there)))


def test_a_trace_that_cannot_be_written_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    with caplog.at_level(logging.WARNING):
        trace = TraceFile(tmp_path / "file" / "trace.json", 3)
        trace.add("keys", trace.begin(), 0, 1, {})
    assert len(caplog.records) == 1
    assert "no trace of rank 3" in caplog.text

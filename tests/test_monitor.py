"""The monitor: the log, the endpoint and the records say one thing, and it is what happened."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from ring_attention_distributed.monitor import _open
from ring_attention_distributed.top import Logs
from ring_attention_distributed.watching import Watched

from ring_core import Observer, WrappedKernel, hookimpl, registry
from ring_core.cli import main
from ring_core.errors import ConfigError
from ring_core.rounds import elements_fetched, elements_sent
from ring_core.testing import Case, RankPool, Worker
from ring_core.testing.tasks import build

ROOT = Path(__file__).parents[1]


def scraped(address: tuple[str, int]) -> dict[str, float]:
    """The endpoint's numbers by name and labels."""
    text = urllib.request.urlopen("http://{}:{}/metrics".format(*address)).read().decode()
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def watched(worker: Worker, case: Case) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    """Three forwards and backwards: the log, the endpoint, and the bytes that the plan says."""
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    before = scraped(attention.monitor.endpoint.address)  # this process's, of other tests too
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attention(*leaves, plan=plan).backward(dout)
    attention.monitor.flush(wait=True)
    path = Path(case.fields["metrics_log"]) / f"rank-{worker.rank}.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    rows = elements_sent(plan.plan, plan.rank, case.kv_heads) * 2
    rows += elements_fetched(plan.plan, plan.rank, case.kv_heads)
    planned = 3 * rows * (case.head_dim + case.value_dim) * 8
    after = scraped(attention.monitor.endpoint.address)
    gauges = ("ring_attention_memory_bytes", "ring_attention_slowdown")
    counted = {
        name: value if name.startswith(gauges) else value - before.get(name, 0)
        for name, value in after.items()
    }
    return log, counted, planned


def test_log_and_endpoint_agree_and_count_what_is_planned(cpu_pool: RankPool, tmp_path) -> None:
    fields = {"causal": True, "metrics_log": str(tmp_path), "metrics_port": 0, "ulysses": 1}
    case = Case("distributed", fields, seq_len=64)
    for rank, (log, metrics, planned) in enumerate(cpu_pool.run(watched, case, world=3)):
        assert [one["direction"] for one in log] == ["forward", "backward"] * 3
        assert [one["call"] for one in log] == sorted(one["call"] for one in log)
        assert all(0 <= one["waiting"] <= one["seconds"] for one in log)
        assert sum(one["bytes_sent"] for one in log) == planned
        label = f'rank="{rank}"'
        of = {
            'ring_attention_calls_total{direction="forward",%s}': 3,
            'ring_attention_calls_total{direction="backward",%s}': 3,
            'ring_attention_bytes_total{%s,way="sent"}': planned,
            'ring_attention_bytes_total{%s,way="received"}': sum(
                one["bytes_received"] for one in log
            ),
            'ring_attention_seconds_total{part="wait",%s}': sum(one["waiting"] for one in log),
            'ring_attention_seconds_total{part="compute",%s}': sum(
                one["seconds"] - one["waiting"] for one in log
            ),
            "ring_attention_retries_total{%s}": 0,
            "ring_attention_memory_bytes{%s}": log[-1]["memory_bytes"],
        }
        for name, value in of.items():
            assert metrics[name % label] == pytest.approx(value), name


def test_top_shows_every_rank(cpu_pool: RankPool, tmp_path, capsys) -> None:
    fields = {"metrics_log": str(tmp_path), "metrics_port": 0, "ulysses": 1}
    found = cpu_pool.run(watched, Case("distributed", fields, seq_len=64), world=3)
    assert main(["top", str(tmp_path), "--json"]) == 0
    for (log, _, planned), one in zip(found, json.loads(capsys.readouterr().out), strict=True):
        span = log[-1]["time"] - log[0]["time"] + log[0]["seconds"]
        assert one["call"] == log[-1]["call"]
        assert one["calls a second"] == pytest.approx(6 / span, rel=1e-4)
        assert one["bytes sent a second"] == pytest.approx(planned / span, rel=1e-4)
        waiting = sum(line["waiting"] for line in log) / span
        assert one["waiting"] == pytest.approx(waiting, rel=1e-4)
    assert main(["top", str(tmp_path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3" in shown
    # A file that grows, and whose last line is not whole yet.
    logs, path = Logs(tmp_path), tmp_path / "rank-1.jsonl"
    before = logs.read(10)[1]["call"]
    line = json.dumps({**found[1][0][-1], "call": 999}) + "\n"
    with open(path, "a") as file:
        file.write(line[:20])
        file.flush()
        assert logs.read(10)[1]["call"] == before
        file.write(line[20:])
        file.flush()
        assert logs.read(10)[1]["call"] == 999
    # What a job that was killed had begun to write, and what one that goes on writes behind it.
    path.write_text(line + line[:20])
    _open(str(tmp_path), 1).close()
    assert path.read_text().endswith(line[:20] + "\n")
    assert Logs(tmp_path).read(10)[1]["call"] == 999
    with pytest.raises(SystemExit):
        main(["top", str(tmp_path), "--once", "--seconds", "-5"])
    assert "-5 is not above 0" in capsys.readouterr().err
    assert main(["top", str(tmp_path / "nothing")]) == 1
    assert "holds no rank-*.jsonl" in capsys.readouterr().err


class Slow:
    """A plugin of one process, whose kernels take their time."""

    RING_HOOK_API = 1

    @hookimpl
    def ring_observers(self) -> list[Observer]:
        class Sleepy(Observer):
            def kernel(self, kernel: Any) -> Any:
                return Sleeping(kernel)

        return [Sleepy()]


class Sleeping(WrappedKernel):
    def forward(self, *tensors: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return super().forward(*tensors, **options)


def straggling(worker: Worker, slow: int) -> list[tuple[float, float]]:
    """Slowdown and waiting of the calls of a group in which a rank is slow."""
    if worker.rank == slow:
        registry.register(Slow(), name="slow")
    try:
        attention = registry.create("distributed", group=worker.group, monitor=True, ulysses=1)
        plan = attention.plan(24)
        q = torch.randn(1, 8, 2, 4)
        # All ranks make equally many calls.
        for _ in range(20):
            attention(q, q, q, plan=plan)
        return [(one.slowdown, one.waiting) for one in attention.monitor.records]
    finally:
        if worker.rank == slow:
            registry.unregister("slow")


def test_a_straggler_is_told_from_those_that_wait_for_it(cpu_pool: RankPool) -> None:
    found = cpu_pool.run(straggling, 1, world=3, fresh=True)
    slowdown = [records[-1][0] for records in found]
    waiting = [sum(wait for _, wait in records) for records in found]
    assert slowdown[1] > 2
    assert max(slowdown[0], slowdown[2]) < 1.5
    assert waiting[1] < min(waiting[0], waiting[2])


def test_nothing_is_watched_unless_asked_for(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(wrapped, {}, world=2) == [(False, False)] * 2
    assert cpu_pool.run(wrapped, {"monitor": True}, world=2) == [(True, True)] * 2


def wrapped(worker: Worker, fields: dict[str, Any]) -> tuple[bool, bool]:
    attention = registry.create("distributed", group=worker.group, ulysses=1, **fields)
    communicator = attention.communicator(attention.plan(8))
    return attention.monitor is not None, isinstance(communicator, Watched)


def test_one_rank_is_monitored_too(tmp_path) -> None:
    attention = registry.create("distributed", metrics_log=str(tmp_path))
    q = torch.randn(1, 8, 2, 4)
    attention(q, q, q)
    (one,) = attention.monitor.records
    assert one.direction == "forward"
    assert one.computing == pytest.approx(one.seconds)
    assert one.memory_bytes > 1e6


def test_what_is_missing_or_taken_is_told(monkeypatch, tmp_path) -> None:
    first = registry.create("distributed", metrics_port=0, metrics_log=str(tmp_path))
    port = first.monitor.endpoint.address[1]
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        _ = registry.create("distributed", metrics_port=port).monitor
    with pytest.raises(ConfigError, match="nothing listens without metrics_port"):
        registry.create("distributed", metrics_host="0.0.0.0")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'ring-attention-distributed\[metrics\]'"):
        _ = registry.create("distributed", metrics_port=0, metrics_host="localhost").monitor
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"metrics_log=.*cannot write"):
        _ = registry.create("distributed", metrics_log=str(tmp_path / "file")).monitor


def of_two_groups(worker: Worker, folder: str) -> tuple[list[str], set[str]]:
    """Calls of two groups of a process with one port and one folder: addresses, and groups."""
    fields = {"metrics_port": 0, "metrics_log": folder, "group": worker.group}
    first = registry.create("distributed", **fields)
    other = torch.distributed.new_group([worker.rank], use_local_synchronization=True)
    second = registry.create("distributed", **{**fields, "group": other})
    q = torch.randn(1, 4, 2, 4)
    for attention in (first, second):
        attention(q, q, q, plan=attention.plan(4 * (worker.world if attention is first else 1)))
        attention.monitor.flush(wait=True)
    lines = (Path(folder) / f"rank-{worker.rank}.jsonl").read_text().splitlines()
    addresses = [one.monitor.endpoint.address for one in (first, second)]
    return addresses, {json.loads(line)["group"] for line in lines}


def test_groups_of_a_process_share_its_places(cpu_pool: RankPool, tmp_path) -> None:
    for addresses, groups in cpu_pool.run(of_two_groups, str(tmp_path), world=2):
        assert addresses[0] == addresses[1]
        assert len(groups) == 2


def test_the_dashboard_shows_what_there_is() -> None:
    """Every number that the dashboard asks for is one that the endpoint gives."""
    attention = registry.create("distributed", metrics_port=0)
    q = torch.randn(1, 8, 2, 4, requires_grad=True)
    attention(q, q, q).sum().backward()
    given = {name.split("{")[0] for name in scraped(attention.monitor.endpoint.address)}
    board = json.loads((ROOT / "plugins" / "distributed" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"ring_attention_\w+", expression)}
    assert len(names) == 6
    assert names <= given

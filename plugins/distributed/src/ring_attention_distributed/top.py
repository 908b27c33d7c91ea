"""``ring-attention top``: a running job, rank by rank, from the files of its monitor."""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from ring_core.cli.arguments import positive
from ring_core.cli.output import console, print_json, table
from ring_core.errors import InputError

SUMMARY = "show what the ranks of a monitored job do (fields metrics_log=..., of 'distributed')"

_BEHIND = 1.5
_KEPT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``top``."""
    parser.add_argument("folder", type=Path, help="what the job was given as metrics_log")
    parser.add_argument(
        "--seconds", type=positive, default=10.0, help="over how long to average (default: 10)"
    )
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--json", action="store_true", help="print JSON once and end")


def run(arguments: argparse.Namespace) -> int:
    """Show the table, live in a terminal; 0.

    Raises:
        InputError: there are no such files in the folder.
    """
    logs = Logs(arguments.folder)
    found = logs.read(arguments.seconds)
    if arguments.json:
        print_json(found)
        return 0
    out = console()
    if arguments.once or not out.is_terminal:
        out.print(_table(found))
        return 0
    with Live(_table(found), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(_table(logs.read(arguments.seconds)), refresh=True)


class Logs:
    """The files of all ranks, read as they grow.

    Args:
        folder: of ``rank-N.jsonl``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at: dict[Path, int] = {}
        self._records: dict[Path, deque[dict[str, Any]]] = {}
        if not any(folder.glob("rank-*.jsonl")):
            raise InputError(
                f"{folder} holds no rank-*.jsonl: give the folder that the job has as metrics_log, "
                "as in registry.create('distributed', metrics_log='ring-log')"
            )

    def read(self, seconds: float) -> list[dict[str, Any]]:
        """For each rank its latest numbers, over so many seconds before its own last line."""
        for path in self._folder.glob("rank-*.jsonl"):
            records = self._records.setdefault(path, deque(maxlen=_KEPT))
            with open(path, encoding="utf-8") as lines:
                lines.seek(self._at.get(path, 0))
                text = lines.read()
            whole = text.rfind("\n") + 1  # the last line may be half written
            self._at[path] = self._at.get(path, 0) + len(text[:whole].encode())
            records.extend(_records(text[:whole]))
        found = (_summary(records, seconds) for records in self._records.values() if records)
        return sorted(found, key=lambda one: one["rank"])


def _records(text: str) -> Iterator[dict[str, Any]]:
    """Lines that are records: a job that was killed may have left half of one."""
    for line in text.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _summary(records: deque[dict[str, Any]], seconds: float) -> dict[str, Any]:
    last = records[-1]
    recent = [one for one in records if one["time"] >= last["time"] - seconds]
    began = recent[0]["time"] - recent[0]["seconds"]
    span = max(last["time"] - began, 1e-9)
    busy = sum(one["seconds"] for one in recent)
    waiting = sum(one["waiting"] for one in recent)
    return {
        "rank": last["rank"],
        "world": last["world"],
        "call": last["call"],
        "calls a second": len(recent) / span,
        "computing": (busy - waiting) / span,
        "waiting": waiting / span,
        "bytes sent a second": sum(one["bytes_sent"] for one in recent) / span,
        "retries": sum(one["retries"] for one in records),
        "slowdown": last["slowdown"],
        "memory_bytes": last["memory_bytes"],
        "seconds ago": time.time() - last["time"],
    }


def _table(found: list[dict[str, Any]]) -> Table:
    rows = table(
        "Rank",
        "Call",
        "Calls/s",
        "Computing",
        "Waiting",
        "MB/s sent",
        "Retries",
        "Slowdown",
        "GB held",
        "Last seen",
    )
    for one in found:
        rows.add_row(
            f"{one['rank']} of {one['world']}",
            str(one["call"]),
            f"{one['calls a second']:.1f}",
            f"{one['computing']:.0%}",
            f"{one['waiting']:.0%}",
            f"{one['bytes sent a second'] / 1e6:.1f}",
            str(one["retries"]),
            Text(f"{one['slowdown']:.2f}", style="red" if one["slowdown"] > _BEHIND else ""),
            f"{one['memory_bytes'] / 1e9:.2f}",
            f"{one['seconds ago']:.0f} s ago",
        )
    return rows

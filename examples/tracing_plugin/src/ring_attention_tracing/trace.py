"""A file of Chrome trace events that is whole whenever the process ends."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("ring_attention_tracing")

_END = b"\n]\n"


class TraceFile:
    """Events of one process, as one JSON array.

    Each event is written over the closing bracket, with a new one behind it, in one write: the file
    is valid JSON after every event, whatever becomes of the process then. A file that cannot be
    written any more is given up with a warning: a trace must not end a training.

    Args:
        path: an earlier trace there is overwritten; missing folders are made.
        rank: names the process in the picture.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self._end = 1
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            self._give_up(error)
        self._write(b"[" + _END, 0)
        self._add({"name": "process_name", "ph": "M", "args": {"name": f"rank {rank}"}})

    def begin(self) -> int:
        """The first line of the picture that no event under way stands on."""
        with self._lock:
            line = next(n for n in itertools.count() if n not in self._busy)
            self._busy.add(line)
            return line

    def add(self, name: str, line: int, start: int, stop: int, about: Mapping[str, Any]) -> None:
        """Write an event that is over.

        Args:
            line: from :meth:`begin`; free again. start, stop: nanoseconds since 1970.
            about: what a viewer shows beside it; goes into JSON.
        """
        with self._lock:
            self._busy.discard(line)
            times = {"ts": start / 1000, "dur": (stop - start) / 1000}  # microseconds
            self._add({"name": name, "cat": "ring", "ph": "X", "tid": line, **times, "args": about})

    def _add(self, event: dict[str, Any]) -> None:
        text = json.dumps({"pid": self._rank, **event}).encode()
        written = (b",\n" if self._end > 1 else b"\n") + text
        if self._write(written + _END, self._end):
            self._end += len(written)

    def _write(self, data: bytes, at: int) -> bool:
        if self._descriptor is None:
            return False
        try:
            os.pwrite(self._descriptor, data, at)
        except OSError as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s: no trace of rank %d from here on: %s", self._path, self._rank, error)
        self._descriptor = None

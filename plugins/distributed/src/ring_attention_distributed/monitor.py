"""What calls cost on this rank: a line of a log and numbers of an endpoint for each of them."""

from __future__ import annotations

import atexit
import json
import logging
import os
import resource
import statistics
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attention_distributed.config import DistributedConfig
from ring_attention_distributed.endpoint import endpoint_at
from ring_core.calls import AnyCall
from ring_core.communication import Moved
from ring_core.errors import ConfigError
from ring_core.given import Given
from ring_core.groups import rank_and_world
from ring_core.store import store_of, turn

logger = logging.getLogger("ring_attention_distributed")

_EVERY = 1.0
"""Seconds between looks at what the other ranks took, and at the memory held."""
_LEAST = 8
"""Calls between them: the first ones of a process compile and allocate."""
_BEHIND = 1.5
"""A rank that computes for so many times the median rank's time is called a straggler."""


@dataclass(frozen=True)
class Record:
    """One forward or backward on one rank; a line of the log.

    Attributes:
        time: when it ended, seconds since the epoch. group: its name. rank, world: of this process
            in it. call: its number there.
        seconds: from its begin to its end; on a GPU of the stream's time. waiting: of those for
            data of other ranks. bytes_sent, bytes_received: by this rank.
        retries: attempts after the first. memory_bytes: held by torch on the GPU, or the most that
            the process held, within the last second.
        slowdown: this rank's computing over the median rank's when that was last compared.
    """

    time: float
    group: str
    rank: int
    world: int
    call: int
    direction: str
    seconds: float
    waiting: float
    bytes_sent: int
    bytes_received: int
    transfers: int
    retries: int
    memory_bytes: int
    slowdown: float

    @property
    def computing(self) -> float:
        """Seconds that were not spent waiting."""
        return max(0.0, self.seconds - self.waiting)


class Clock:
    """Points in time: of a GPU's stream, or of the processor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """A mark; on a GPU it takes no time of the processor's."""
        if self._device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    @staticmethod
    def passed(mark: Any) -> bool:
        """Whether the stream has come to it."""
        return isinstance(mark, float) or bool(mark.query())

    @staticmethod
    def between(first: Any, last: Any) -> float:
        """Seconds."""
        if isinstance(first, float):
            return float(last - first)
        return float(first.elapsed_time(last)) / 1e3


@dataclass
class Span:
    """A call under way, or one whose GPU is still at it."""

    clock: Clock
    number: int
    direction: str
    first: Any
    last: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    moved: list[tuple[Moved, Moved]] = field(default_factory=list)
    """Before each transfer, and after."""
    retries: int = 0
    ended: float = 0.0
    memory: int = 0


_here = threading.local()


def current() -> Span | None:
    """The call that this thread is in, if it is monitored."""
    return getattr(_here, "span", None)


class Monitor:
    """Of one group on this rank; shared by all its attentions that write to the same places.

    Args:
        log: folder for ``rank-N.jsonl``, N the process's rank in its launch. address: (host, port)
            of the first rank's endpoint; the others' ports follow it; port 0 takes a free one.
    """

    def __init__(self, group: Any, log: str | None, address: tuple[str, int] | None) -> None:
        self.rank, self.world = rank_and_world(group)
        self.records: deque[Record] = deque(maxlen=1024)
        self.slowdown = 1.0
        process = dist.get_rank() if dist.is_initialized() else 0
        self.group = "" if group is None else str(group.group_name)
        self._log = _open(log, process) if log is not None else None
        self.endpoint = endpoint_at(process, address) if address is not None else None
        self._store = store_of(group) if self.world > 1 else None
        self._spans: deque[Span] = deque()
        self._lock = threading.Lock()
        self._sampled, self._memory = float("-inf"), 0
        self._computed, self._calls, self._compared = 0.0, 0, time.monotonic()
        self._telling: threading.Thread | None = None
        if self._store is not None:
            self._prefix = f"ring_attention/monitor/{turn(group, 'monitor')}"
        atexit.register(_last, ref(self))

    def begin(self, number: int, direction: str, device: torch.device) -> Span:
        """A call begins on this thread."""
        clock = Clock(device)
        _here.span = span = Span(clock, number, direction, clock.now())
        return span

    def end(self, span: Span, retries: int, device: torch.device) -> None:
        """It ended, well or not."""
        _here.span = None
        span.last, span.ended, span.retries = span.clock.now(), time.time(), retries
        if time.monotonic() - self._sampled > _EVERY:  # torch takes long to say it
            self._sampled, self._memory = time.monotonic(), _held(device)
        span.memory = self._memory
        with self._lock:
            self._spans.append(span)
        self.flush()

    def flush(self, wait: bool = False) -> None:
        """Write down the calls that ended; ``wait`` for a GPU that is still at them."""
        with self._lock:
            while self._spans and (wait or Clock.passed(self._spans[0].last)):
                span = self._spans.popleft()
                if wait and not isinstance(span.last, float):
                    span.last.synchronize()
                self._write(span)
            if self._log is not None and not self._log.closed:
                self._log.flush()
        if not wait:
            self._compare()

    def close(self) -> None:
        """Close the log."""
        with self._lock:
            if self._log is not None:
                self._log.close()

    def _write(self, span: Span) -> None:
        moved = [(before.bytes(), after.bytes()) for before, after in span.moved]
        record = Record(
            time=span.ended,
            group=self.group,
            rank=self.rank,
            world=self.world,
            call=span.number,
            direction=span.direction,
            seconds=Clock.between(span.first, span.last),
            waiting=sum(Clock.between(*wait) for wait in span.waits),
            bytes_sent=sum(after[0] - before[0] for before, after in moved),
            bytes_received=sum(after[1] - before[1] for before, after in moved),
            transfers=len(moved),
            retries=span.retries,
            memory_bytes=span.memory,
            slowdown=self.slowdown,
        )
        self.records.append(record)
        self._computed += record.computing
        self._calls += 1
        if self._log is not None and not self._log.closed:
            self._log.write(json.dumps(asdict(record)) + "\n")
        if self.endpoint is not None:
            self.endpoint.count(record, record.computing)

    def _compare(self) -> None:
        """Tell the others how long this rank computes; see who takes longest. Nobody waits for it:
        a store may be slow, or out of reach."""
        early = time.monotonic() - self._compared < _EVERY or self._calls < _LEAST
        if self._store is None or early or (self._telling and self._telling.is_alive()):
            return
        self._compared = time.monotonic()
        mean, self._computed, self._calls = self._computed / self._calls, 0.0, 0
        self._telling = threading.Thread(target=self._tell, args=(self._store, mean), daemon=True)
        self._telling.start()

    def _tell(self, store: Any, mean: float) -> None:
        try:
            store.set(f"{self._prefix}/{self.rank}", str(mean))
            keys = [f"{self._prefix}/{rank}" for rank in range(self.world)]
            found = {
                rank: float(store.get(key)) for rank, key in enumerate(keys) if store.check([key])
            }
        except RuntimeError:
            return  # the store went down with who served it; calls say so
        usual = statistics.median(found.values())
        self.slowdown = mean / usual if usual else 1.0
        slowest = max(found, key=lambda rank: found[rank])
        if self.rank == 0 and usual and found[slowest] > _BEHIND * usual:
            logger.warning(
                "rank %d of %d computes %.2f times as long as the median rank",
                slowest,
                self.world,
                found[slowest] / usual,
            )


def _last(monitor: ref[Monitor]) -> None:
    """The process ends: write down what a GPU is still at."""
    if (living := monitor()) is not None:
        living.flush(wait=True)
        living.close()


class MonitoredCall:
    """A call whose begin and end are told to the monitor."""

    def __init__(self, call: AnyCall, monitor: Monitor, device: torch.device) -> None:
        self._call, self._monitor, self._device = call, monitor, device
        self.number, self.seed = call.number, call.seed

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out of this rank's queries, and lse in the accumulation dtype."""
        span = self._monitor.begin(self.number, "forward", self._device)
        try:
            return self._call.forward(q, k, v)
        finally:
            self._monitor.end(span, getattr(self._call, "retried", 0), self._device)

    def backward(self, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        span = self._monitor.begin(self.number, "backward", self._device)
        try:
            return self._call.backward(given)
        finally:
            self._monitor.end(span, getattr(self._call, "retried", 0), self._device)


_monitors: WeakKeyDictionary[Any, dict[Any, Monitor]] = WeakKeyDictionary()
_alone: dict[Any, Monitor] = {}


def monitor_by(config: DistributedConfig, group: Any) -> Monitor | None:
    """The monitor that a config asks for, shared by all attentions of a group that write to the
    same places; None where it asks for none."""
    if not config.monitored:
        return None
    port = config.metrics_port
    key = config.metrics_log, None if port is None else (config.metrics_host, port)
    made = _alone if group is None else _monitors.setdefault(group, {})
    if key not in made:
        made[key] = Monitor(group, *key)
    return made[key]


def _held(device: torch.device) -> int:
    """Bytes that torch holds on a GPU, or the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _open(folder: str, process: int) -> Any:
    path = Path(folder) / f"rank-{process}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and _ends_in_half_a_line(path)
        log = open(path, "a", encoding="utf-8")  # noqa: SIM115
        log.write("\n" * torn)  # a job that was killed had begun it
        return log
    except OSError as error:
        raise ConfigError(f"metrics_log={folder!r}: cannot write {path}: {error}") from error


def _ends_in_half_a_line(path: Path) -> bool:
    with open(path, "rb") as log:
        if not log.seek(0, os.SEEK_END):
            return False
        log.seek(-1, os.SEEK_END)
        return log.read() != b"\n"

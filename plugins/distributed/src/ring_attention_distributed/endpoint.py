"""An HTTP endpoint that a Prometheus server scrapes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ring_core.errors import ConfigError

if TYPE_CHECKING:
    from ring_attention_distributed.monitor import Record


_open: dict[tuple[str, int], Endpoint] = {}


def endpoint_at(rank: int, first: tuple[str, int]) -> Endpoint:
    """This process's endpoint there, made at the first question: all its groups count together."""
    if first not in _open:
        _open[first] = Endpoint(rank, first)
    return _open[first]


class Endpoint:
    """Of one process; needs package prometheus-client.

    Args:
        rank: of the process in its launch. first: host, and port of rank 0; the others' follow,
            within a host by LOCAL_RANK. Port 0 takes a free one.

    Attributes:
        address: (host, port) where it listens.

    Raises:
        ConfigError: prometheus-client is not installed, or the port is taken.
    """

    def __init__(self, rank: int, first: tuple[str, int]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                "metrics_port needs prometheus-client: pip install "
                "'ring-attention-distributed[metrics]'"
            ) from error
        registry = prometheus.CollectorRegistry()

        def made(kind: Any, name: str, text: str, *labels: str) -> Any:
            return kind(f"ring_attention_{name}", text, ("rank", *labels), registry=registry)

        self._rank = str(rank)
        self._calls = made(prometheus.Counter, "calls", "Forwards and backwards", "direction")
        self._seconds = made(
            prometheus.Counter, "seconds", "Time computing, and waiting for data", "part"
        )
        self._bytes = made(prometheus.Counter, "bytes", "Moved between ranks", "way")
        self._transfers = made(prometheus.Counter, "transfers", "Between ranks")
        self._retries = made(prometheus.Counter, "retries", "Attempts after a call's first")
        self._memory = made(prometheus.Gauge, "memory_bytes", "Held after the last call")
        self._slowdown = made(prometheus.Gauge, "slowdown", "Computing time over the median rank's")
        host, port = first
        if port:
            port += int(os.environ.get("LOCAL_RANK", rank))
        try:
            server, _ = prometheus.start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"metrics_port: rank {rank} cannot listen on {host}:{port}: {error}"
            ) from error
        self.address: tuple[str, int] = host, server.server_port

    def count(self, record: Record, computing: float) -> None:
        """Add a call."""
        rank = self._rank
        self._calls.labels(rank, record.direction).inc()
        self._seconds.labels(rank, "compute").inc(computing)
        self._seconds.labels(rank, "wait").inc(record.waiting)
        self._bytes.labels(rank, "sent").inc(record.bytes_sent)
        self._bytes.labels(rank, "received").inc(record.bytes_received)
        self._transfers.labels(rank).inc(record.transfers)
        self._retries.labels(rank).inc(record.retries)
        self._memory.labels(rank).set(record.memory_bytes)
        self._slowdown.labels(rank).set(record.slowdown)

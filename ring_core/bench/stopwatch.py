"""Time and memory of something that all ranks of a launch run together."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ring_core.errors import RingError
from ring_core.launching import Worker

T = TypeVar("T")


class Stopwatch:
    """Figures of the slowest rank."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.on_gpu = worker, worker.device.type == "cuda"

    def milliseconds(self, run: Callable[[], Any], turns: int) -> float:
        """Median over turns of some runs back to back; runs that came before are not counted."""
        repeats = max(1, min(20, int(0.3 / self._seconds(run, 1))))
        times = [self._seconds(run, repeats) for _ in range(turns)]
        return 1e3 * self.slowest(statistics.median(times))

    def bytes(self, run: Callable[[], Any]) -> int:
        """Most bytes that torch's allocator of a GPU held during a run, inputs included; else 0."""
        if not self.on_gpu:
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(self.slowest(torch.cuda.max_memory_allocated()))

    def wait(self) -> None:
        """Until all ranks are here, and their GPUs are idle."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.worker.world > 1:
            dist.barrier()

    def slowest(self, figure: float) -> float:
        """The largest of all ranks' figures."""
        return self._over_ranks(figure, dist.ReduceOp.MAX)

    def together(self, make: Callable[[], T]) -> T | None:
        """What ``make`` gives; None on every rank if some rank has too little memory for it."""
        found: T | None = None
        # A rank whose peer ran out of memory has a RingError.
        with contextlib.suppress(torch.OutOfMemoryError, RingError):
            found = make()
        if self.on_gpu:
            torch.cuda.empty_cache()
        fits = self._over_ranks(float(found is not None), dist.ReduceOp.MIN)
        return found if fits else None

    def _seconds(self, run: Callable[[], Any], repeats: int) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.slowest((time.perf_counter() - started) / repeats)

    def _over_ranks(self, figure: float, how: Any) -> float:
        on_all = torch.tensor(float(figure), device=self.worker.device, dtype=torch.float64)
        if self.worker.world > 1:
            dist.all_reduce(on_all, how)
        return float(on_all)

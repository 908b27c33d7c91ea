"""Time and memory of one contender on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peers import Contender
from ring_core.bench.step import Step

SECONDS_A_TURN = 0.25


class Entry:
    """A contender with its tensors on this rank.

    Args:
        tensors: whole q, k, v and gradient of out.
        alone: the other ranks take no part; each measures for itself.
    """

    def __init__(self, contender: Contender, tensors: Sequence[Tensor], alone: bool) -> None:
        self.contender, self.alone = contender, alone
        self.step = Step(contender.attend, [contender.shard(x).contiguous() for x in tensors])
        self.times: dict[str, list[float]] = {"forward": [], "both": []}
        self.host: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @property
    def ways(self) -> dict[str, Callable[[], Any]]:
        return {"forward": self.step.forward, "both": self.step.both}

    def warm(self) -> None:
        """Compile, allocate, and find out how many runs make a turn."""
        self.step.warm()
        seconds = torch.zeros((), device="cuda")
        for name, run in self.ways.items():
            self._together()
            started = time.perf_counter()
            run()
            self.host[name] = 1e3 * (time.perf_counter() - started)
            torch.cuda.synchronize()
            seconds.fill_(time.perf_counter() - started)
        if not self.alone:  # the ranks must make equally many runs
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.repeats = max(2, min(30, int(SECONDS_A_TURN / float(seconds))))

    def measure_memory(self) -> None:
        """Most bytes beyond inputs and outputs at any time of a run."""
        q, k, _ = self.step.leaves
        outputs = {"forward": q.nbytes, "both": q.nbytes * 2 + 2 * k.nbytes}
        for name, run in self.ways.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            counted = torch.cuda.max_memory_allocated() - before - outputs[name]
            self.memory[name] = counted + self.contender.uncounted()

    def turn(self) -> None:
        """Milliseconds of a run, several of them back to back, as training steps come.

        One more goes before them and is not counted: it starts with idle GPUs, which wait for the
        processor.
        """
        for name, run in self.ways.items():
            self._together()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            start.record()
            for _ in range(self.repeats):
                run()
            stop.record()
            stop.synchronize()
            self.times[name].append(start.elapsed_time(stop) / self.repeats)

    def _together(self) -> None:
        if not self.alone:
            dist.barrier()
        torch.cuda.synchronize()

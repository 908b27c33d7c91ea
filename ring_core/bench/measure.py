"""What attentions cost and how exact they are, beside dense attention on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ring_core import hookimpl
from ring_core.bench.memory import PeakMemory
from ring_core.bench.step import Step
from ring_core.bench.stopwatch import Stopwatch
from ring_core.errors import RingError
from ring_core.hookspecs import Observer
from ring_core.launching import Worker, launch
from ring_core.registry import registry

NAMES = ("out", "dq", "dk", "dv")
DENSE = "dense, one device"


@dataclass(frozen=True)
class Contender:
    """An attention to measure: fields of a config, 'variant' among them."""

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank.

    Attributes:
        folder: where the process that computes in float64 leaves its results for the others.
    """

    contenders: tuple[Contender, ...]
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    turns: int
    seed: int
    folder: str


@dataclass(frozen=True)
class Row:
    """Figures of the slowest rank, or why there are none.

    Attributes:
        forward, both: milliseconds of a forward, and of one with backward.
        peak_bytes: held at most during both, beyond what was before. bytes_sent: by a rank, in
            both; the most of any rank.
        errors: of out and gradients, relative to float64: norm of the difference over the norm.
        refused: why it could not run.
    """

    name: str
    ranks: int
    forward: float = 0.0
    both: float = 0.0
    peak_bytes: int = 0
    bytes_sent: int = 0
    errors: Mapping[str, float] | None = None
    refused: str = ""


def compare(job: Job, processes: int, device_type: str) -> list[Row]:
    """A row for dense attention on one device, and one for each contender on ``processes``.

    Raises:
        RankFailedError: a rank failed with something else than an error of this library.
    """
    (dense,) = launch(_alone, job, processes=1, device_type=device_type)
    rows: list[Row] = launch(_together, job, processes=processes, device_type=device_type)[0]
    return [dense, *rows]


def _alone(worker: Worker, job: Job) -> Row:
    """Dense attention as torch has it, and every contender's result in float64."""
    tensors = _tensors(job, worker.device)
    exact = [x.double() for x in tensors]
    for number, contender in enumerate(job.contenders):
        try:
            attention = registry.create({**contender.fields, "kernel": "reference"})
            plan = attention.plan(job.tokens)
            found = Step(lambda *x: attention(*x, plan=plan), exact).both()  # noqa: B023
        except RingError:
            continue  # it will be refused on all ranks, too
        torch.save([x.cpu() for x in found], _result(job, number))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=job.causal, enable_gqa=True)
        return found.transpose(1, 2)

    right = Step(dense, exact).both()
    found = Step(dense, tensors).both()
    return _row(worker, job, DENSE, dense, tensors, _errors(found, right))


def _together(worker: Worker, job: Job) -> list[Row]:
    return [
        _measured(worker, job, number, contender) for number, contender in enumerate(job.contenders)
    ]


def _measured(worker: Worker, job: Job, number: int, contender: Contender) -> Row:
    listener = _Listener()
    registry.register(listener, name="bench")
    try:
        attention = registry.create(contender.fields)
        plan = attention.plan(job.tokens)
        tensors = [plan.shard(x).contiguous() for x in _tensors(job, worker.device)]

        def attend(*inputs: Tensor) -> Tensor:
            found: Tensor = attention(*inputs, plan=plan)
            return found

        found = [plan.unshard(x) for x in Step(attend, tensors).both()]
        right = torch.load(_result(job, number), map_location=worker.device)
        errors = _errors(found, right)
        return _row(worker, job, contender.name, attend, tensors, errors, listener.sent)
    except RingError as error:
        return Row(contender.name, worker.world, refused=str(error).splitlines()[0])
    finally:
        registry.unregister("bench")


def _row(
    worker: Worker,
    job: Job,
    name: str,
    attend: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    errors: Mapping[str, float],
    sent: Callable[[], int] = lambda: 0,
) -> Row:
    watch, step = Stopwatch(worker), Step(attend, tensors)
    before = sent()
    memory = PeakMemory(worker.device)
    step.both()
    peak, bytes_sent = memory.taken(), sent() - before
    return Row(
        name,
        worker.world,
        watch.milliseconds(step.forward, job.turns),
        watch.milliseconds(step.both, job.turns),
        int(watch.slowest(peak)),
        int(watch.slowest(bytes_sent)),
        errors,
    )


def _tensors(job: Job, device: torch.device) -> list[Tensor]:
    """Whole q, k, v and the gradient of out: alike on every rank."""
    generator = torch.Generator().manual_seed(job.seed)
    heads = job.heads, job.kv_heads, job.kv_heads, job.heads
    return [
        torch.randn(1, job.tokens, h, job.head_dim, generator=generator).to(device, job.dtype)
        for h in heads
    ]


def _errors(found: Sequence[Tensor], right: Sequence[Tensor]) -> dict[str, float]:
    return {
        name: float((a.double() - b).norm() / b.norm().clamp_min(1e-300))
        for name, a, b in zip(NAMES, found, right, strict=True)
    }


def _result(job: Job, number: int) -> Path:
    return Path(job.folder, f"{number}.pt")


class _Listener:
    """A plugin of this process that knows every communicator made meanwhile."""

    RING_HOOK_API = 1

    def __init__(self) -> None:
        self._observer = _Counting()

    @hookimpl
    def ring_observers(self) -> list[Observer]:
        return [self._observer]

    def sent(self) -> int:
        """Bytes that this rank has sent through them."""
        return sum(one.counters.bytes_sent for one in self._observer.communicators)


class _Counting(Observer):
    def __init__(self) -> None:
        self.communicators: list[Any] = []

    def communicator(self, communicator: Any) -> Any:
        self.communicators.append(communicator)
        return communicator

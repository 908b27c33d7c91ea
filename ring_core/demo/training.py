"""The training loop of one rank. Sharded and unsharded runs are this same code."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ring_core import registry
from ring_core.attention import BaseRingAttention
from ring_core.bench.memory import PeakMemory
from ring_core.demo.model import LanguageModel, ModelSize, Rotary
from ring_core.demo.progress import progress
from ring_core.launching import Worker
from ring_core.rank_plan import RankPlan
from ring_core.rounds import elements_fetched, elements_sent

_NO_LABEL = -100
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """What to train on; the same for every rank and for both runs.

    Attributes:
        fields: of the attention's config, beside the variant and ``causal``.
        windows: one run of ``context + 1`` bytes per step.
    """

    variant: str
    fields: Mapping[str, Any]
    windows: tuple[bytes, ...]
    seed: int
    size: ModelSize
    learning_rate: float
    epsilon: float

    @property
    def context(self) -> int:
        """Tokens of a step, over all ranks."""
        return len(self.windows[0]) - 1


@dataclass(frozen=True)
class RankResult:
    """What one rank measured.

    Attributes:
        losses: of the whole context at each step, the same on every rank.
        seconds: that each step took.
        tokens: of the context that this rank held.
        peak_bytes: see :class:`PeakMemory`; ``memory_method`` says how it was read.
        bytes_sent: by attention, over all steps and layers. ``bytes_planned``: what its plan says.
    """

    rank: int
    losses: list[float]
    seconds: list[float]
    tokens: int
    peak_bytes: int
    memory_method: str
    bytes_sent: int
    bytes_planned: int


def train(worker: Worker, job: Job, title: str) -> RankResult:
    """Train on this rank's rows of each window. A task for :func:`ring_core.launching.launch`."""
    attention = registry.create(job.variant, causal=True, **job.fields)
    warm_up(worker, job, attention)
    plan = attention.plan(job.context)
    communicator = attention.communicator(plan, worker.device)
    if communicator is not None:
        communicator.counters.reset()
    losses, seconds = [], []
    memory = PeakMemory(worker.device)
    trainer = Trainer(worker, job, attention, plan)
    with progress(title, len(job.windows), shown=worker.rank == 0) as report:
        for done, window in enumerate(job.windows, start=1):
            started = time.perf_counter()
            losses.append(trainer.step(window))
            seconds.append(time.perf_counter() - started)
            report(done, losses[-1])
    return RankResult(
        rank=worker.rank,
        losses=losses,
        seconds=seconds,
        tokens=int((plan.positions >= 0).sum()),
        peak_bytes=memory.taken(),
        memory_method=memory.method,
        bytes_sent=communicator.counters.bytes_sent if communicator is not None else 0,
        bytes_planned=planned_bytes(plan, job.size) * job.size.layers * len(job.windows),
    )


def warm_up(worker: Worker, job: Job, attention: BaseRingAttention) -> None:
    """One step of a throw-away model on a few tokens, so that code loaded late is not measured."""
    plan = attention.plan(_WARM_UP_TOKENS)
    Trainer(worker, job, attention, plan).step(bytes(_WARM_UP_TOKENS + 1))


class Trainer:
    """A model, its optimiser, and one step over a window of which this rank holds some rows."""

    def __init__(
        self, worker: Worker, job: Job, attention: BaseRingAttention, plan: RankPlan
    ) -> None:
        torch.manual_seed(job.seed)  # the same weights on every rank and in both runs
        self.worker, self.attention, self.plan = worker, attention, plan
        self.model = LanguageModel(job.size).to(worker.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=job.learning_rate, eps=job.epsilon
        )
        self.rotary = Rotary(plan.positions, job.size.head_dim, worker.device)

    def step(self, window: bytes) -> float:
        """Train on a window of ``context + 1`` bytes; the mean loss over the whole of it."""
        whole = torch.frombuffer(bytearray(window), dtype=torch.uint8).long()
        ids = self.plan.shard(whole[:-1], dim=0).to(self.worker.device)
        labels = self.plan.shard(whole[1:], dim=0, fill=_NO_LABEL).to(self.worker.device)
        logits = self.model(ids[None], self.rotary, self._attend)
        # A sum over this rank's labels, divided by the number of everybody's: then losses and
        # gradients of the ranks add up to those of the whole window.
        loss = F.cross_entropy(logits[0], labels, ignore_index=_NO_LABEL, reduction="sum")
        loss = loss / (len(window) - 1)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        total = loss.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._add_over_ranks([total, *gradients])
        self.optimizer.step()
        return float(total)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attention(q, k, v, plan=self.plan)
        return out

    def _add_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        if self.worker.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def planned_bytes(plan: RankPlan, size: ModelSize) -> int:
    """Bytes that the plan has this rank send for one layer and step, in float32.

    Keys and values go out once in the forward and once more in the backward; in the backward also
    gradients go home for every row that was fetched.
    """
    fetched = elements_fetched(plan.plan, plan.rank, size.heads)
    sent = elements_sent(plan.plan, plan.rank, size.heads)
    return (2 * sent + fetched) * 2 * size.head_dim * torch.float32.itemsize

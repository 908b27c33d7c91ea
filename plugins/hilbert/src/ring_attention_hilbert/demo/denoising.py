"""The training of one rank. Sharded and unsharded runs are this same code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attention_hilbert.demo.network import Denoiser, Rotary2d, Size
from ring_core import registry
from ring_core.demo.progress import progress
from ring_core.launching import Worker


@dataclass(frozen=True)
class Job:
    """What to train on; the same for every rank and for both runs.

    Attributes:
        clean: [patches, values], row by row. noise: its standard deviation.
        radius: patches that a patch sees on each side. order: along which they are sharded.
    """

    clean: Tensor
    grid: tuple[int, int]
    radius: int
    order: str
    noise: float
    steps: int
    seed: int
    size: Size
    block: int = 64

    @property
    def learning_rate(self) -> float:
        """Smaller steps where a patch has more values, whose steps add up."""
        return 0.5 / self.clean.shape[1]


@dataclass(frozen=True)
class RankResult:
    """What one rank measured.

    Attributes:
        losses: of the whole photograph at each step, the same on every rank.
        denoised: of the whole photograph, from noise that was not trained on; from rank 0.
        seconds: that each step took. order: that the plan took.
        bytes_sent: by attention, over all steps and layers.
    """

    rank: int
    losses: list[float]
    denoised: Tensor | None
    seconds: list[float]
    tokens: int
    bytes_sent: int
    order: str


def noisy(job: Job, step: int) -> tuple[Tensor, Tensor]:
    """The photograph with the noise of a step, and the noise; ``job.steps`` is for the end."""
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
    noise = job.noise * torch.randn(job.clean.shape, generator=generator)
    return job.clean + noise, noise


def train(worker: Worker, job: Job, title: str) -> RankResult:
    """Train on this rank's patches. A task for :func:`ring_core.launching.launch`."""
    attention = registry.create(
        "hilbert",
        grid=job.grid,
        order=job.order,
        patterns=[{"kind": "neighborhood", "radius": job.radius}],
        block_q=job.block,
        block_kv=job.block,
    )
    plan = attention.plan(len(job.clean))
    communicator = attention.communicator(plan, worker.device)
    torch.manual_seed(job.seed)  # the same weights on every rank and in both runs
    network = Denoiser(job.clean.shape[1], job.size).to(worker.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=job.learning_rate, eps=1e-6)
    held = (plan.positions >= 0).to(worker.device)
    positions = plan.positions.to(worker.device)
    rotary = Rotary2d(positions, job.grid[1], job.size.width // job.size.heads)

    def predicted(step: int) -> tuple[Tensor, Tensor, Tensor]:
        given, noise = (plan.shard(x, dim=0).to(worker.device) for x in noisy(job, step))
        found = network(given[None], rotary, lambda q, k, v: attention(q, k, v, plan=plan))[0]
        return given, noise, found

    losses, seconds = [], []
    with progress(title, job.steps, shown=worker.rank == 0) as report:
        for step in range(job.steps):
            started = time.perf_counter()
            _, noise, found = predicted(step)
            # A sum over this rank's patches, divided by the number of everybody's values: then
            # losses and gradients of the ranks add up to those of the whole photograph.
            loss = (found - noise)[held].square().sum() / job.clean.numel() / job.noise**2
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            total = loss.detach()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            _add_over_ranks(worker, [total, *gradients])
            optimizer.step()
            losses.append(float(total))
            seconds.append(time.perf_counter() - started)
            report(step + 1, losses[-1])
    with torch.no_grad():
        given, _, found = predicted(job.steps)
        denoised = plan.unshard(given - found, dim=0).cpu()
    return RankResult(
        rank=worker.rank,
        losses=losses,
        denoised=denoised if worker.rank == 0 else None,
        seconds=seconds,
        tokens=int(held.sum()),
        bytes_sent=communicator.counters.bytes_sent if communicator is not None else 0,
        order=plan.plan.facts()["order"],
    )


def _add_over_ranks(worker: Worker, tensors: Sequence[Tensor]) -> None:
    if worker.world > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)

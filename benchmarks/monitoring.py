"""What monitoring costs of a training step: a transformer's steps with it and without, in turns.

``python benchmarks/monitoring.py --output benchmarks/results`` writes a page and the numbers;
without ``--output`` it prints the table. All attentions serve one model, whose steps are timed in
turns: one turn is a step or several with each of them. A step is forward, loss, backward and AdamW;
figures are of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from page import add_arguments, write
from ring_core import registry
from ring_core.bench.stopwatch import Stopwatch
from ring_core.demo.model import BYTES, LanguageModel, ModelSize, Rotary
from ring_core.launching import Worker, launch

OFF = "distributed"
"""Whose steps the others are compared with."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    rows: tuple[int, ...]
    size: ModelSize
    turns: int
    dtype: str
    folder: str
    """For logs."""


def measure(worker: Worker, job: Job) -> list[dict[str, Any]]:
    """A row for each number of rows and attention.

    A task for :func:`ring_core.launching.launch`.
    """
    torch.manual_seed(0)
    model = LanguageModel(job.size).to(worker.device, getattr(torch, job.dtype))
    optimizer = torch.optim.AdamW(model.parameters())
    found = []
    each = {
        "standard": {"variant": "standard"},
        OFF: {"variant": "distributed"},
        "monitor=True": {"variant": "distributed", "monitor": True},
        "metrics_log": {"variant": "distributed", "metrics_log": job.folder},
    }
    for rows in job.rows:
        steps = {
            name: _step(worker, model, optimizer, rows, job, fields)
            for name, fields in each.items()
        }
        found += [{"rows": rows, **one} for one in _in_turns(worker, steps, job.turns)]
    if worker.rank == 0:
        print(json.dumps(found), flush=True)
    return found


def _step(
    worker: Worker,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    rows: int,
    job: Job,
    fields: dict[str, Any],
) -> Callable[[], float]:
    attention = registry.create(causal=True, **fields)
    plan = attention.plan(rows * worker.world)
    rotary = Rotary(plan.positions, job.size.head_dim, worker.device)
    ids = torch.randint(BYTES, (1, rows), device=worker.device)

    def run() -> float:
        logits = model(ids, rotary, lambda q, k, v: attention(q, k, v, plan=plan))
        loss = F.cross_entropy(logits[0].float(), ids[0])
        optimizer.zero_grad()
        loss.backward()
        if worker.world > 1:
            for one in model.parameters():
                dist.all_reduce(one.grad)
        optimizer.step()
        return loss.item()

    return run


def _in_turns(
    worker: Worker, steps: dict[str, Callable[[], float]], turns: int
) -> list[dict[str, Any]]:
    watch, names = Stopwatch(worker), list(steps)
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(watch.milliseconds(steps[name], 1))
    return [
        {
            "name": name,
            "ms": statistics.median(found),
            # Neighbours in time, so that what warms up or slows down all of them cancels.
            "more": [one / off - 1 for one, off in zip(found, times[OFF], strict=True)],
        }
        for name, found in times.items()
    ]


def table(rows: list[dict[str, Any]], ranks: int) -> list[str]:
    """Markdown."""
    lines = [
        "| ranks | rows a rank | attention | a step, ms | more than without monitoring, median "
        "| from .. to, middle half of turns |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = statistics.quantiles(row["more"], n=4)
        cells = [
            str(ranks),
            f"{row['rows']:,}",
            row["name"],
            f"{row['ms']:.2f}",
            f"{100 * middle:+.2f}%",
            f"{100 * low:+.2f}% .. {100 * high:+.2f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768], help="a rank")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.set_defaults(turns=21)
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("--turns: at least 2, to say how far they differ")
    size = ModelSize(options.width, options.layers, options.heads)
    device_type = "cuda" if torch.cuda.device_count() else "cpu"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(tuple(options.rows), size, options.turns, options.dtype, folder)
        for ranks in sorted({options.ranks, 1}):
            found[ranks] = launch(measure, job, processes=ranks, device_type=device_type)[0]
    lines = [line for ranks, rows in found.items() for line in [*table(rows, ranks), ""]]
    print("\n".join(lines), flush=True)
    if options.output:
        title = (
            f"Training steps with monitoring and without: {size.layers} layers of width "
            f"{size.width}, {size.heads} heads, {job.dtype}, {job.turns} turns"
        )
        figures = {str(ranks): rows for ranks, rows in found.items()}
        write(options.output, "monitoring", title, lines, figures)


if __name__ == "__main__":
    main()

"""Packed documents, from very many short ones to a few: dense and dilated, by kernel.

``python benchmarks/documents.py --output benchmarks/results`` writes a page and the numbers;
without ``--output`` it prints the table. Lengths are drawn evenly from 1 to twice their mean. A new
packing is a new plan, and new lengths to a kernel: what the first call with one takes beyond a
later one is shown. Errors are relative, of out, against the definition in float64 over some of the
documents; figures are of the slowest rank.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from page import add_arguments, write
from ring_core import reference, registry
from ring_core.bench.stopwatch import Stopwatch
from ring_core.errors import KernelError
from ring_core.launching import Worker, launch

FIELDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dilated": {
        "segment_lengths": [2048 << i for i in range(6)],
        "dilation_rates": [1 << i for i in range(6)],
    },
}

LONGEST_CHECKED = 4096
"""Errors are those of documents of at most so many tokens: the definition looks at every pair."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    tokens: int
    means: tuple[int, ...]
    kernels: tuple[str, ...]
    variants: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    turns: int
    dtype: str


def measure(worker: Worker, job: Job) -> list[dict[str, Any]]:
    """A row for each mean length, kernel and kind of attention.

    A task for :func:`ring_core.launching.launch`.
    """
    found = []
    for mean in job.means:
        for kernel in job.kernels:
            for name in job.variants:
                row = {"mean": mean, "kernel": kernel, "name": name, "ranks": worker.world}
                try:
                    row |= _measured(worker, job, mean, kernel, FIELDS[name])
                except KernelError as error:
                    row["refused"] = str(error)
                found.append(row)
                if worker.rank == 0:
                    print(row, flush=True)
    return found


def ends_of(tokens: int, mean: int, seed: int) -> list[int]:
    """``cu_seqlens`` of documents that fill ``tokens``."""
    draw, ends = random.Random(seed), [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, ends[-1] + draw.randint(1, 2 * mean)))
    return ends


def _measured(
    worker: Worker, job: Job, mean: int, kernel: str, fields: dict[str, Any]
) -> dict[str, Any]:
    watch = Stopwatch(worker)
    attention = registry.create("standard", causal=True, kernel=kernel, **fields)
    torch.manual_seed(0)
    heads = (job.heads, job.kv_heads, job.kv_heads, job.heads)
    whole = [
        torch.randn(1, job.tokens, count, job.head_dim, device=worker.device).to(
            getattr(torch, job.dtype)
        )
        for count in heads
    ]

    def prepared(ends: list[int]) -> Any:
        plan = attention.plan(cu_seqlens=ends)
        *inputs, dout = (plan.shard(x) for x in whole)
        inputs = [x.requires_grad_() for x in inputs]

        def forward() -> Any:
            with torch.no_grad():
                return attention(*inputs, plan=plan)

        def both() -> Any:
            return torch.autograd.grad(attention(*inputs, plan=plan), inputs, dout)

        return plan, forward, both

    _, forward, both = prepared(ends_of(job.tokens, mean, 1))
    forward(), both()  # programs are compiled, memory is allocated
    watch.wait()
    started = time.perf_counter()
    ends = ends_of(job.tokens, mean, 2)
    plan, forward, both = prepared(ends)
    forward(), both()
    watch.wait()
    first = watch.slowest(time.perf_counter() - started)
    times = {
        "forward": watch.milliseconds(forward, job.turns),
        "both": watch.milliseconds(both, job.turns),
    }
    out = plan.unshard(forward())
    return {
        "documents": len(ends) - 1,
        **times,
        "planning": 1e3 * first - times["forward"] - times["both"],
        "bytes": watch.bytes(both),
        "error": _error(out, whole, ends, fields),
    }


def _error(
    out: torch.Tensor, whole: list[torch.Tensor], ends: list[int], fields: dict[str, Any]
) -> float:
    """Of three documents, each by the definition."""
    documents = [(a, b) for a, b in pairwise(ends) if b - a <= LONGEST_CHECKED]
    wrong = right = 0.0
    for start, stop in documents[:: max(1, len(documents) // 2)]:
        q, k, v = (x[:, start:stop] for x in whole[:3])
        seen = reference.visible(stop - start, stop - start, causal=True)
        if fields:
            times = reference.dilated(stop - start, k.shape[2], *fields.values())
            seen = times.repeat_interleave(q.shape[2] // k.shape[2], dim=0) * seen
        expected, _ = reference.attention(q.double(), k.double(), v.double(), seen.to(q.device))
        wrong += float((out[:, start:stop] - expected).square().sum())
        right += float(expected.square().sum())
    return math.sqrt(wrong / right) if right else math.nan


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| ranks | documents | attention | kernel | forward, ms | with backward, ms | more for the "
        "first call of a packing, ms | GB a rank | error of out |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "refused" in row:
            continue
        cells = [
            str(row["ranks"]),
            f"{row['documents']:,}",
            row["name"],
            row["kernel"],
            *(f"{row[name]:.2f}" for name in ("forward", "both")),
            f"{row['planning']:.0f}",
            f"{row['bytes'] / 1e9:.2f}" if row["bytes"] else "",
            f"{row['error']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--means", type=int, nargs="+", default=[128, 1024, 4096, 16384])
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--only", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 8, 64], metavar=("Q", "KV", "D"))
    options = parser.parse_args()
    job = Job(
        options.tokens,
        tuple(options.means),
        tuple(options.kernels),
        tuple(options.only),
        *options.heads,
        options.turns,
        options.dtype,
    )
    device_type = "cuda" if torch.cuda.device_count() else "cpu"
    rows = launch(measure, job, processes=options.ranks, device_type=device_type)[0]
    print("\n".join(table(rows)), flush=True)
    if options.output:
        title = (
            f"Packed documents in {job.tokens:,} tokens: causal, {job.heads} heads ({job.kv_heads} "
            f"of keys) of {job.head_dim}, {job.dtype}"
        )
        write(options.output, "documents", title, table(rows), {"rows": rows})


if __name__ == "__main__":
    main()

"""Heads exchanged times rings: every degree that heads and ranks allow, beside its prediction.

``python benchmarks/mesh.py --output benchmarks/results`` writes a page and the numbers; without
``--output`` it prints the table. Causal attention, each row on all ranks; figures are medians of
the slowest rank. On GPUs torch's context parallelism stands beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch

from page import WAYS, add_arguments, on_many_and_one, write
from ring_core import registry
from ring_core.bench.step import Step
from ring_core.bench.stopwatch import Stopwatch
from ring_core.launching import Worker

GUARDED: tuple[dict[str, Any], ...] = (
    {"monitor": True},
    {"retries": 2},
    {"retries": 2, "check_finite": True},
)
"""What else a call may do."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    rows: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    head_dim: int
    turns: int
    dtype: str
    kernel: str


def measure(worker: Worker, job: Job) -> list[dict[str, Any]]:
    """A row for each shape and degree. A task for :func:`ring_core.launching.launch`."""
    watch, found = Stopwatch(worker), []
    for q_heads, kv_heads in job.heads:
        for rows in job.rows:
            degrees = [{"ulysses": one} for one in (*range(1, worker.world + 1), "auto")]
            for fields in (*degrees, *(GUARDED if worker.world > 1 else ())):
                one = watch.together(
                    lambda: _one(worker, job, watch, rows, q_heads, kv_heads, fields)  # noqa: B023
                )
                if one is not None:
                    found.append(one)
                    if worker.rank == 0:
                        print(json.dumps(one), flush=True)
    return found


def _one(
    worker: Worker,
    job: Job,
    watch: Stopwatch,
    rows: int,
    q_heads: int,
    kv_heads: int,
    fields: dict[str, Any],
) -> dict[str, Any] | None:
    attention = registry.create("distributed", causal=True, kernel=job.kernel, **fields)
    plan = attention.plan(rows * worker.world)
    torch.manual_seed(worker.rank)
    dtype = getattr(torch, job.dtype)
    q, k, v, dout = (
        torch.randn(1, rows, heads, job.head_dim, dtype=dtype, device=worker.device)
        for heads in (q_heads, kv_heads, kv_heads, q_heads)
    )
    known = {one.degree: one for one in attention.predictions(plan, q, k, v)}
    if fields.get("ulysses", "auto") != "auto" and fields["ulysses"] not in known:
        return None
    degree = attention.degree(plan, q, k, v)
    step = Step(lambda *x: attention(*x, plan=plan), (q, k, v, dout))
    step.warm()
    return {
        "ranks": worker.world,
        "rows": rows,
        "heads": f"{q_heads}/{kv_heads}",
        "fields": fields,
        "degree": degree,
        **{
            name: watch.milliseconds(run, job.turns)
            for name, run in zip(WAYS, (step.forward, step.both), strict=True)
        },
        "predicted": 1e3 * known[degree].total,
        "GB": watch.bytes(step.both) / 1e9,
    }


HEADER = [
    "| query/KV heads | rows a rank | heads exchanged x ring | forward, ms | with backward, ms "
    "| predicted, ms | GB a rank |",
    "|---|---|---|---|---|---|---|",
]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [*HEADER]
    for row in rows:
        mesh = f"{row['degree']} x {row['ranks'] // row['degree']}"
        cells = [
            row["heads"],
            f"{row['rows']:,}",
            f"{mesh}{_how(row['fields'], row['degree'])}",
            *(f"{row[way]:.2f}" for way in WAYS),
            f"{row['predicted']:.2f}",
            f"{row['GB']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _how(fields: dict[str, Any], degree: int) -> str:
    said = [f"{name}={value}" for name, value in fields.items() if fields != {"ulysses": degree}]
    return f" ({', '.join(said)})" if said else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768], help="a rank")
    parser.add_argument("--heads", nargs="+", default=["32/8", "28/7", "8/1"])
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    heads = tuple((int(q), int(kv)) for q, kv in (one.split("/") for one in options.heads))
    job = Job(
        tuple(options.rows), heads, options.head_dim, options.turns, options.dtype, options.kernel
    )
    many, one = on_many_and_one(measure, job, options.ranks)
    rows = table([*many, *one])
    print("\n".join(rows), flush=True)
    if options.output:
        title = f"Meshes of {options.ranks} ranks, causal, heads of {job.head_dim}, {job.dtype}"
        write(options.output, "mesh", title, rows, {"ranks": many, "one": one})


if __name__ == "__main__":
    main()

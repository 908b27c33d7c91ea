"""Neighbourhoods of pictures and videos along curves: time, keys that travel, and error.

``python benchmarks/hilbert.py --output benchmarks/results`` on a machine with GPUs writes a page
and the numbers; without ``--output`` it prints the table. Every grid and radius in every order with
the same kernel, on all ranks and on one, beside the dense ring and dense attention on one GPU.
Figures are medians of the slowest rank; errors are those of ``benchmarks/blocksparse.py``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

from blocksparse import HEAD_DIM, HEADS, measure_one
from page import WAYS, add_arguments, dense_lines, on_many_and_one, times, write
from ring_core.bench.stopwatch import Stopwatch
from ring_core.launching import Worker

ORDERS = ("row", "hilbert", "morton", "tile")


@dataclass(frozen=True)
class Shape:
    """A grid, the radius of its neighbourhoods, and the blocks that suit it."""

    grid: tuple[int, ...]
    radius: int
    block: int

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.grid))}, radius {self.radius}, blocks of {self.block}"


SHAPES = tuple(
    Shape(grid, radius, block)
    for grid, radius in (
        ((256, 256), 7),
        ((256, 256), 16),
        ((512, 512), 16),
        ((32, 64, 64), 3),
        ((32, 64, 64), 7),
        ((64, 128, 128), 7),
    )
    for block in (64, 128)
)


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    shapes: tuple[Shape, ...]
    orders: tuple[str, ...]
    turns: int
    dtype: str
    kernel: str


def measure(worker: Worker, job: Job) -> list[dict[str, Any]]:
    """All rows that this many ranks can measure. A task for :func:`ring_core.launching.launch`."""
    watch, found = Stopwatch(worker), []
    for tokens in dict.fromkeys(math.prod(shape.grid) for shape in job.shapes):
        dense = watch.together(
            lambda: measure_one(worker, job, watch, tokens, "dense", {"variant": "standard"})  # noqa: B023
        )
        found += [dense] if dense is not None else []
        for shape in job.shapes:
            for order in job.orders if math.prod(shape.grid) == tokens else ():
                fields = {
                    "variant": "hilbert",
                    "grid": shape.grid,
                    "order": order,
                    "patterns": [{"kind": "neighborhood", "radius": shape.radius}],
                    "block_q": shape.block,
                    "block_kv": shape.block,
                    "kernel": job.kernel,
                }
                one = watch.together(
                    lambda: measure_one(worker, job, watch, tokens, f"{shape}; {order}", fields)  # noqa: B023
                )
                if one is not None:
                    found.append(one)
                    if worker.rank == 0:
                        print(json.dumps(one), flush=True)
    return found


HEADER = [
    "| grid; order | forward, ms | with backward, ms | times row-major | times our dense ring | "
    "times dense on one GPU / ranks | density | of one GPU's speed | MB sent a rank | imbalance | "
    "error of out, dq, dk, dv |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def table(many: list[dict[str, Any]], one: list[dict[str, Any]]) -> list[str]:
    """Markdown; pairs of figures are forward / with backward."""
    here, alone = ({(row["name"], row["tokens"]): row for row in rows} for rows in (many, one))
    lines = [*HEADER]
    for row in many:
        if "density" not in row:
            continue
        tokens = row["tokens"]
        in_rows = row["name"].split(";")[0] + "; row"
        cells = [
            row["name"],
            *(f"{row[way]:.2f}" for way in WAYS),
            times(here.get((in_rows, tokens)), row, 1, ".2f"),
            times(here.get(("dense", tokens)), row, 1, ".1f"),
            times(alone.get(("dense", tokens)), row, 1 / row["ranks"], ".1f"),
            f"{row['density']:.4f}",
            times(alone.get((row["name"], tokens)), row, 1 / row["ranks"], ".2f"),
            f"{row.get('MB sent', 0):,.1f}",
            f"{row['imbalance']:.3f}",
            ", ".join(f"{x:.1e}" for x in row["errors"].values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *dense_lines([*many, *one])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kernel", default="auto", help="of the sparse rows (default: auto)")
    parser.add_argument("--most", type=int, default=1 << 20, help="cells of the largest grid")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    options = parser.parse_args()
    shapes = tuple(shape for shape in SHAPES if math.prod(shape.grid) <= options.most)
    job = Job(shapes, tuple(options.orders), options.turns, options.dtype, options.kernel)
    many, one = on_many_and_one(measure, job, options.ranks)
    rows = table(many, one)
    print("\n".join(rows), flush=True)
    if options.output:
        title = (
            f"Neighbourhoods along curves on {options.ranks} ranks, {HEADS} heads of {HEAD_DIM}, "
            f"{job.dtype}"
        )
        write(options.output, "hilbert", title, rows, {"ranks": many, "one": one})


if __name__ == "__main__":
    main()

"""What the rates of the H200 that come with the core predict, beside what pages recorded there.

``python benchmarks/recorded.py --output benchmarks/results``: needs no GPU. What one process does
in a second was measured by itself, what several add was put together from rows with a star; the
others check it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page import write
from ring_core import registry
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import read
from ring_core.prediction.timeline import Where
from ring_core.sequences import Sequences

RESULTS = Path(__file__).parent / "results"
EXACT = "2026-11-22-2xh200"
MESH = "2026-11-23-mesh-2xh200"
SPARSE = "2026-11-23-blocksparse-2xh200"
ALONE = "2026-11-23-prediction-1gpu"


@dataclass(frozen=True)
class Recorded:
    """A measurement on H200s.

    Attributes:
        known: whether the rates were made of it. forward, both: milliseconds.
    """

    page: str
    fields: dict[str, Any]
    heads: str
    world: int
    rows: int
    known: bool
    forward: float
    both: float


def recorded() -> Iterator[Recorded]:
    """All with one sequence, over kernels that the rates know."""
    for block in _figures(EXACT):
        for name, row in block["rows"].items():
            ours = name in ("ours, cudnn", "ours, flash4")
            if ours and not block["packed"]:
                fields = {"causal": True, "kernel": row["kernel"]}
                times = row["forward"], row["both"]
                yield Recorded(EXACT, fields, "32/8", 2, block["per_rank"], False, *times)
    for rows in _figures(MESH).values():
        for row in rows:
            if not isinstance(row["fields"].get("ulysses"), int):
                continue
            fields = {"variant": "distributed", "causal": True, "kernel": "flash4", **row["fields"]}
            world, times = row["ranks"], (row["forward"], row["both"])
            known = (row["heads"], row["rows"], world) == ("8/1", 8192, 2)
            yield Recorded(MESH, fields, row["heads"], world, row["rows"], known, *times)
    for rows in _figures(SPARSE).values():
        for row in rows:
            if row["name"].startswith("dense"):
                fields = {"causal": "causal" in row["name"], "kernel": "flash4"}
                world, times = row["ranks"], (row["forward"], row["both"])
                yield Recorded(SPARSE, fields, "8/8", world, row["tokens"] // world, False, *times)

    for row in _figures(ALONE)["cases"]:
        times = row["measured"]["forward"], row["measured"]["both"]
        yield Recorded(ALONE, row["fields"], "32/8", row["ranks"], row["rows"], False, *times)


def _figures(page: str) -> Any:
    return json.loads((RESULTS / f"{page}.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    rates, found = read("h200"), []
    lines = [
        "| page | attention | heads | GPUs | rows a GPU | forward, ms: measured, predicted "
        "| with backward, ms: measured, predicted | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in recorded():
        attention = registry.create(one.fields)
        plan = attention.make_plan(Sequences.build(one.rows * one.world), one.world)
        sizes = Sizes(*map(int, one.heads.split("/")), 128, 128, 1, "bfloat16")
        guess = attention.predict(plan, sizes, rates, Where(one.world))
        times = 1e3 * guess.forward.total, 1e3 * guess.total
        off = times[0] / one.forward - 1, times[1] / one.both - 1
        found.append({**vars(one), "predicted": times, "off": off})
        said = ", ".join(f"{name}={value}" for name, value in one.fields.items())
        cells = [
            f"[{one.page}]({one.page}.md)",
            f"{said}{' *' * one.known}",
            one.heads,
            str(one.world),
            f"{one.rows:,}",
            f"{one.forward:,.2f}, {times[0]:,.2f}",
            f"{one.both:,.2f}, {times[1]:,.2f}",
            f"{off[0]:+.0%} / {off[1]:+.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for world in (1, 2):
        errors = [abs(row["off"][1]) for row in found if row["world"] == world and not row["known"]]
        lines += [
            "",
            f"Forward and backward on {world} GPU{'s' * (world > 1)}, rows without a star: off by "
            f"{statistics.median(errors):.1%} in the median, {max(errors):.1%} at most.",
        ]
    print("\n".join(lines))
    if options.output:
        title = "Predicted times beside recorded ones, 1 and 2 H200"
        write(options.output, "prediction-recorded-2xh200", title, lines, {"cases": found})


if __name__ == "__main__":
    main()

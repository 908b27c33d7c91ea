"""How long the curves of variant ``hilbert`` take for millions of cells, on this CPU.

``python benchmarks/curves.py --output benchmarks/results`` writes a page; without ``--output`` it
prints the table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from ring_attention_hilbert import curves

from page import write

GRIDS = ((1024, 1024), (4096, 4096), (4095, 4097), (256, 256, 256))
WALKS = {
    "Hilbert": curves.hilbert,
    "Morton": curves.morton,
    "tiles of 128": lambda grid: curves.tile(grid, 128),
}
TURNS = 3


def seconds(name: str, grid: tuple[int, ...]) -> float:
    """The median of some turns."""
    taken = []
    for _ in range(TURNS):
        started = time.perf_counter()
        WALKS[name](grid)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    figures = [{"grid": grid, **{name: seconds(name, grid) for name in WALKS}} for grid in GRIDS]
    lines = [f"| seconds | {' | '.join(WALKS)} |", "|---" * (len(WALKS) + 1) + "|"]
    for one in figures:
        cells = [" x ".join(map(str, one["grid"])), *(f"{one[name]:.2f}" for name in WALKS)]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.output:
        write(
            options.output,
            "curves-cpu",
            "Curves through millions of cells",
            lines,
            {"curves": figures},
        )


if __name__ == "__main__":
    main()

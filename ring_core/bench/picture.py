"""The figures of a comparison as bars. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ring_core.bench.measure import Row

_DENSE, _OTHERS = "#4c78a8", "#e4572e"
_MB = 1e6


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write time, memory and traffic of the rows that ran to ``path``."""
    ran = [row for row in rows if not row.refused]
    names = [row.name for row in ran]
    colours = [_DENSE if row.ranks == 1 else _OTHERS for row in ran]
    panels = (
        ("Forward and backward", "ms", [row.both for row in ran]),
        ("Peak memory of a rank", "MB", [row.peak_bytes / _MB for row in ran]),
        ("Sent by a rank", "MB", [row.bytes_sent / _MB for row in ran]),
    )
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 1.6 + 0.45 * len(ran)), layout="constrained")
        for axes, (what, unit, numbers) in zip(
            figure.subplots(1, len(panels), sharey=True), panels, strict=True
        ):
            bars = axes.barh(names, numbers, color=colours)
            axes.bar_label(bars, fmt="{:,.1f}", padding=3)
            axes.set(title=what, xlabel=unit)
            axes.margins(x=0.15)
        figure.axes[0].invert_yaxis()
        figure.suptitle(title, fontsize=12)
        figure.savefig(path, dpi=150)

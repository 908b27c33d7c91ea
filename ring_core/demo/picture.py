"""The comparison as a picture: losses, memory and traffic. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ring_core.demo.comparison import Comparison

_UNSHARDED = "#4c78a8"
_SHARDED = "#e4572e"
_MB = 1e6
_MOST_LABELS = 8


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture to ``path`` as PNG."""
    # A figure without pyplot draws with Agg, whatever the display, and leaves no state behind.
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=[1.7, 1.1, 1])
        _losses(axes[0], comparison)
        _memory(axes[1], comparison)
        _traffic(axes[2], comparison)
        figure.suptitle(
            f"One context of {comparison.context:,} tokens on {comparison.options.processes} "
            f"processes and on one: variant {comparison.options.named(comparison.variant)}",
            fontsize=13,
        )
        figure.savefig(path, dpi=150)


def _losses(axes: Axes, comparison: Comparison) -> None:
    steps = range(1, len(comparison.unsharded.losses) + 1)
    unsharded, sharded = comparison.unsharded.losses, comparison.sharded.losses
    # They coincide: a wide pale line with a dashed one on it shows both.
    axes.plot(steps, unsharded, color=_UNSHARDED, alpha=0.4, linewidth=8, label="unsharded")
    label = f"sharded over {comparison.options.processes}"
    axes.plot(steps, sharded, color=_SHARDED, linewidth=1.8, linestyle=(0, (4, 2)), label=label)
    axes.set(title="Loss", xlabel="step", ylabel="nats per byte")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    difference = f"largest difference {comparison.largest_difference:.1e}"
    axes.legend(frameon=False, loc="upper right", title=difference, alignment="left")


def _memory(axes: Axes, comparison: Comparison) -> None:
    alone = comparison.unsharded.ranks[0].peak_bytes / _MB
    ranks = comparison.sharded.ranks
    _bars(axes, ["one\nprocess"], [alone], _UNSHARDED)
    _bars(axes, [str(one.rank) for one in ranks], [one.peak_bytes / _MB for one in ranks], _SHARDED)
    share = f"1/{len(ranks)} of one process"
    axes.axhline(alone / len(ranks), color="0.25", linewidth=1.2, linestyle=":", label=share)
    axes.legend(frameon=False, loc="upper right")
    axes.set(title="Peak memory of training", xlabel="rank", ylabel="MB")


def _traffic(axes: Axes, comparison: Comparison) -> None:
    ranks = comparison.sharded.ranks
    steps = len(comparison.sharded.losses)
    sent = [one.bytes_sent / steps / _MB for one in ranks]
    _bars(axes, [str(one.rank) for one in ranks], sent, _SHARDED)
    axes.set(title="Sent by attention", xlabel="rank", ylabel="MB per step")


def _bars(axes: Axes, names: list[str], values: list[float], colour: str) -> None:
    bars = axes.bar(names, values, color=colour, alpha=0.75, width=0.7)
    if len(values) <= _MOST_LABELS:
        axes.bar_label(bars, fmt=_figure, padding=2)
    else:  # labels would run into each other
        axes.tick_params(axis="x", labelsize=7)
    axes.margins(y=0.12)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"

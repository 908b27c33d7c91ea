"""A plan as a picture: the sequence against itself, coloured by rank and by step of the ring."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ring_core.plan import Plan


def check(path: Path) -> None:
    """Refuse what :func:`draw` could not write.

    Raises:
        InputError: matplotlib is not installed, the name says neither PNG nor SVG, or there is no
            such folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('--picture draws with matplotlib: pip install "ring-attention-core[demo]"')
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--picture {path}: the name must end in .png or .svg")
    if not path.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {path.parent}")


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write the map of a plan's tiles to ``path``, PNG or SVG by its name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ring_core.tile_map import tile_map

    found = tile_map(plan)
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(12, 5.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        few = "tab10" if plan.world <= 10 else "turbo"
        length = found.tokens * len(found.rank)
        _panel(figure, left, found.rank, plan.world, length, "rank that computes", few)
        _panel(figure, right, found.step, plan.world, length, "offset of the ring", "viridis")
        left.set_ylabel("query")
        figure.suptitle(f"{title}, {plan.world} ranks")
        figure.savefig(path, dpi=150)


def _panel(
    figure: Any, axes: Any, values: Tensor, world: int, length: float, name: str, colours: str
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    image = axes.imshow(
        values.double().where(values >= 0, float("nan")).numpy(),
        cmap=colormaps[colours].resampled(world),
        norm=BoundaryNorm([rank - 0.5 for rank in range(world + 1)], world),
        extent=(0, length, length, 0),
        interpolation="nearest",
    )
    axes.set(title=name, xlabel="key")
    ticks = range(0, world, max(1, world // 16))
    figure.colorbar(image, ax=axes, ticks=list(ticks), shrink=0.8)

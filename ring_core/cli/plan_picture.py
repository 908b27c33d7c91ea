"""A plan as a picture: the sequence against itself, coloured by rank and by step of the ring; and
the grid of its tokens, if it has one, with the way that the tokens are laid out."""

from __future__ import annotations

import importlib.util
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_core.errors import InputError

_FRAMES = 4
"""Frames of a video that are drawn."""
_DRAWN = 1 << 14
"""Cells through which the way is drawn."""

if TYPE_CHECKING:
    from torch import Tensor

    from ring_core.order import Walk
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
        walk = plan.walk
        figure = Figure(figsize=(12, 5.4) if walk is None else (18, 5.4), layout="constrained")
        left, right, *more = figure.subplots(1, 2 if walk is None else 3)
        right.sharey(left)
        few = "tab10" if plan.world <= 10 else "turbo"
        length = found.tokens * len(found.rank)
        _panel(figure, left, found.rank, plan.world, length, "rank that computes", few)
        _panel(figure, right, found.step, plan.world, length, "offset of the ring", "viridis")
        left.set_ylabel("query")
        if walk is not None:
            _grid(more[0], plan, walk, few)
        figure.suptitle(f"{title}, {plan.world} ranks")
        figure.savefig(path, dpi=150)


def _grid(axes: Any, plan: Plan, walk: Walk, colours: str) -> None:
    """The cells of a picture by rank, and the way through them; of several some."""
    import torch
    from matplotlib import colormaps

    rank = torch.full((plan.queries.length,), -1, dtype=torch.int64, device="cpu")
    for one in range(plan.world):
        held = plan.queries.positions(one)
        rank[held[held >= 0]] = one
    height, width = walk.grid[-2:]
    frames = torch.full((prod(walk.grid),), float("nan"), dtype=torch.float64, device="cpu")
    frames[walk.cells] = rank[walk.tokens].double()
    frames = frames.view(-1, height, width)
    shown = range(0, len(frames), -(-len(frames) // _FRAMES))
    gap = torch.full((height, max(1, width // 16)), float("nan"), dtype=torch.float64)
    image = torch.cat([x for frame in shown for x in (gap, frames[frame])][1:], 1)
    axes.imshow(
        image.numpy(),
        cmap=colormaps[colours].resampled(plan.world),
        vmin=-0.5,
        vmax=plan.world - 0.5,
        interpolation="nearest",
    )
    name = f"{height} x {width} cells by rank"
    if len(frames) > 1:
        name += f": {', '.join(str(frame) for frame in shown)} of {len(frames)}"
    frame, cells = walk.cells // (height * width), walk.cells % (height * width)
    apart = bool((frame.diff() >= 0).all())  # each is walked by itself
    if apart and len(shown) * height * width <= _DRAWN:
        for place, number in enumerate(shown):
            mine = cells[frame == number]
            left = place * (width + gap.shape[1])
            axes.plot(left + mine % width, mine // width, color="white", linewidth=0.8)
        name += ", and the way through them"
    axes.set(title=name, xticks=[], yticks=[])


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

"""Patterns on a grid of tokens in row-major order: pictures ``(H, W)``, videos ``(T, H, W)``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ring_attention_blocksparse.patterns import Natural, Pattern, Positive

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor

    from ring_attention_blocksparse.limits import Axis
    from ring_attention_blocksparse.scene import Blocks, Reach, Scene
    from ring_core.order import Order

    _Side = tuple[Tensor, Tensor]


def by_axis(given: Any) -> Any:
    """What is given for each axis, unless it has no order.

    Raises:
        ValueError: it is a set.
    """
    if isinstance(given, (set, frozenset)):
        raise ValueError("a set has no order, and entry i belongs to axis i: give a list")
    return given


class GridPattern(Pattern):
    """A pattern whose query sees, along each axis, a range of coordinates of its own."""

    grid: tuple[Positive, ...] | None = Field(default=None, min_length=1)
    """Cells along each axis, the last one running fastest; None: the config's, where a
    variant has one."""

    @field_validator("grid", "radius", "shape", "shift", mode="before", check_fields=False)
    @classmethod
    def _in_order(cls, given: Any) -> Any:
        return by_axis(given)

    @property
    def axes(self) -> range:
        """The grid's axes."""
        assert self.grid is not None
        return range(len(self.grid))

    def seen(self, axis: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """First and last coordinate along an axis that queries with coordinates ``low`` to ``high``
        see between them; both grow with their arguments."""
        raise NotImplementedError(f"{type(self).__name__} must define seen")

    def check(self, scene: Scene) -> str | None:
        assert self.grid is not None  # configs see to that
        if prod(self.grid) + scene.prefix != scene.length:
            before = f" behind the prefix={scene.prefix}" if scene.prefix else ""
            return (
                f"grid={self.grid} has {prod(self.grid)} cells, and the sequence has "
                f"{scene.length - scene.prefix} tokens{before}"
            )
        return None

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - scene.prefix, j - scene.prefix
        found = (i >= 0) & (j >= 0)
        for axis in self.axes:
            low, high = self.seen(axis, *[self._along(axis, i)] * 2)
            there = self._along(axis, j)
            found = found & (low <= there) & (there <= high)
        return found

    def limits(self, scene: Scene, i: Tensor, j: Tensor) -> Sequence[Axis] | None:
        from ring_attention_blocksparse.limits import Axis

        if scene.prefix:
            return None  # tokens that are in no cell
        assert self.grid is not None
        found = []
        for axis, size in enumerate(self.grid):
            here, there = (self._along(axis, x) for x in (i, j))
            found.append(Axis(there, *self.seen(axis, here, here), size))
        return found

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        import torch

        from ring_attention_blocksparse.scene import Reach, ragged

        assert self.grid is not None
        box, cells = self._boxes(scene, q.index, scene.block_q)
        sides = [
            (low.clamp_min(0), high.clamp_max(size - 1))
            for size, (low, high) in zip(
                self.grid, (self.seen(axis, *box[axis]) for axis in self.axes), strict=True
            )
        ]
        # A run of tokens for each line of the box that is seen; the last axis goes along the line.
        lines = (cells > 0).long()
        for low, high in sides[:-1]:
            lines = lines * (high - low + 1).clamp_min(0)
        query, place = ragged(lines)
        start, scale = torch.zeros_like(query), 1
        for size, (low, high) in reversed([*zip(self.grid, sides, strict=True)][:-1]):
            extent = (high - low + 1)[query]
            start = start + (low[query] + place % extent) * scale
            place, scale = place // extent, scale * size
        start = start * self.grid[-1] + scene.prefix
        found = scene.between(q, query, start + sides[-1][0][query], start + sides[-1][1][query])
        # Of a block that is a box, each cell that is seen is seen by some query.
        volume = torch.ones_like(cells)
        for low, high in box:
            volume = volume * (high - low + 1)
        is_box = volume == cells
        if scene.order is not None and not scene.is_open:
            is_box = torch.zeros_like(is_box)
        theirs, count = self._boxes(scene, found.block, scene.block_kv)
        whole = (cells == scene.size_of(q.index, scene.block_q))[found.query]
        whole &= count == scene.size_of(found.block, scene.block_kv)
        for axis in self.axes:
            mine = [x[found.query] for x in box[axis]]
            for coordinate in mine:  # what the first and the last see, those between see too
                low, high = self.seen(axis, coordinate, coordinate)
                whole &= (low <= theirs[axis][0]) & (theirs[axis][1] <= high)
        return Reach(found.query, found.block, whole, is_box[found.query])

    def _boxes(self, scene: Scene, block: Tensor, size: int) -> tuple[list[_Side], Tensor]:
        """For blocks of ``size`` places: for each axis their cells' least and largest coordinate;
        and how many cells they hold."""
        assert self.grid is not None
        if scene.order is None:
            first, count = block * size - scene.prefix, scene.size_of(block, size)
            cells = (first + count).clamp_min(0).minimum(count)
            last = (first + count - 1).clamp_min(0)
            return self._box(first.clamp_min(0), last), cells
        sides, cells = _boxes_in(scene.order, scene.prefix, self.grid, size, block.device)
        return [(low[block], high[block]) for low, high in sides], cells[block]

    def _along(self, axis: int, token: Tensor) -> Tensor:
        """The tokens' coordinate."""
        assert self.grid is not None
        return token // prod(self.grid[axis + 1 :]) % self.grid[axis]

    def _box(self, first: Tensor, last: Tensor) -> list[_Side]:
        """For each axis the least and the largest coordinate of tokens ``first`` to ``last``."""
        import torch

        assert self.grid is not None
        box, same = [], torch.ones_like(first, dtype=torch.bool)
        for axis, size in enumerate(self.grid):
            low, high = self._along(axis, first), self._along(axis, last)
            box.append((torch.where(same, low, 0), torch.where(same, high, size - 1)))
            same = same & (low == high)
        return box


class Neighborhood(GridPattern):
    """Every coordinate differs by at most the radius (Neighborhood Attention, arXiv 2204.07143, but
    cut off at borders and not shifted)."""

    kind: Literal["neighborhood"] = "neighborhood"
    radius: Natural | tuple[Natural, ...]
    """Chebyshev radius: one number, or one for each axis."""
    causal_axes: tuple[Natural, ...] = ()
    """Axes along which nothing behind a query is seen: of a video (0,) is causal in time, whole
    frames at a time, where the config's ``causal`` goes by tokens."""

    @model_validator(mode="after")
    def _one_for_each_axis(self) -> Self:
        _check_axes(self.grid, radius=self.radius)
        if self.grid is not None and any(axis >= len(self.grid) for axis in self.causal_axes):
            raise ValueError(
                f"causal_axes={self.causal_axes} and grid={self.grid}: axes are counted from 0 to "
                f"{len(self.grid) - 1}"
            )
        return self

    def seen(self, axis: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        radius = _at(self.radius, axis)
        return low - radius, high if axis in self.causal_axes else high + radius


class WindowBlocks(GridPattern):
    """Both lie in the same window (Swin Transformer, arXiv 2103.14030)."""

    kind: Literal["window_blocks"] = "window_blocks"
    shape: tuple[Positive, ...] = Field(min_length=1)
    """Cells of a window along each axis."""
    shift: Natural | tuple[Natural, ...] = 0
    """Cells by which windows are shifted: one number, or one for each axis. Windows before the
    first border are smaller."""

    @model_validator(mode="after")
    def _one_for_each_axis(self) -> Self:
        _check_axes(self.grid, shape=self.shape, shift=self.shift)
        return self

    def seen(self, axis: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        size, shift = self.shape[axis], _at(self.shift, axis)
        first, last = (
            (x - shift).div(size, rounding_mode="floor") * size + shift for x in (low, high)
        )
        return first, last + size - 1


@lru_cache(maxsize=32)
def _boxes_in(
    order: Order, prefix: int, grid: tuple[int, ...], size: int, device: torch.device
) -> tuple[list[_Side], Tensor]:
    """What :meth:`GridPattern._boxes` gives, of all blocks of an order."""
    import torch

    with torch.inference_mode(False):
        cells = order.tokens(device) - prefix
        cells = torch.nn.functional.pad(cells, (0, -len(cells) % size), value=-1).view(-1, size)
        none, sides = cells < 0, []
        for axis, extent in enumerate(grid):
            at = cells // prod(grid[axis + 1 :]) % extent
            low, high = at.masked_fill(none, extent), at.masked_fill(none, -1)
            sides.append((low.amin(1), high.amax(1)))
        return sides, (~none).sum(1)


def _at(given: int | tuple[int, ...], axis: int) -> int:
    return given if isinstance(given, int) else given[axis]


def _check_axes(grid: tuple[int, ...] | None, **given: int | tuple[int, ...]) -> None:
    for name, values in given.items():
        if grid is not None and isinstance(values, tuple) and len(values) != len(grid):
            raise ValueError(f"{name}={values} and grid={grid}: give {name} for each axis")

"""Patterns on a grid of tokens in row-major order: pictures ``(H, W)``, videos ``(T, H, W)``."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ring_attention_blocksparse.patterns import Natural, Pattern, Positive

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from ring_attention_blocksparse.scene import Blocks, Reach, Scene


class GridPattern(Pattern):
    """A pattern whose query sees, along each axis, a range of coordinates of its own."""

    grid: tuple[Positive, ...] | None = Field(default=None, min_length=1)
    """Cells along each axis, the last one running fastest; None: the config's, where a
    variant has one."""

    @field_validator("grid", "radius", "shape", "shift", mode="before", check_fields=False)
    @classmethod
    def _in_order(cls, given: Any) -> Any:
        if isinstance(given, (set, frozenset)):
            raise ValueError("a set has no order, and entry i belongs to axis i: give a list")
        return given

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
        if prod(self.grid) != scene.length:
            return (
                f"grid={self.grid} has {prod(self.grid)} cells, and the sequence has "
                f"{scene.length} tokens"
            )
        return None

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        found = i == i
        for axis in self.axes:
            low, high = self.seen(axis, *[self._along(axis, i)] * 2)
            there = self._along(axis, j)
            found = found & (low <= there) & (there <= high)
        return found

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        import torch

        from ring_attention_blocksparse.scene import Reach, ragged

        assert self.grid is not None
        box = self._box(q.first, q.last)
        sides = [
            (low.clamp_min(0), high.clamp_max(size - 1))
            for size, (low, high) in zip(
                self.grid, (self.seen(axis, *box[axis]) for axis in self.axes), strict=True
            )
        ]
        # A run of tokens for each line of the box that is seen; the last axis goes along the line.
        lines = torch.ones_like(q.first)
        for low, high in sides[:-1]:
            lines = lines * (high - low + 1).clamp_min(0)
        query, place = ragged(lines)
        start, scale = torch.zeros_like(query), 1
        for size, (low, high) in reversed([*zip(self.grid, sides, strict=True)][:-1]):
            extent = (high - low + 1)[query]
            start = start + (low[query] + place % extent) * scale
            place, scale = place // extent, scale * size
        start = start * self.grid[-1]
        found = scene.between(q, query, start + sides[-1][0][query], start + sides[-1][1][query])
        # Of a block that is a box, each cell that is seen is seen by some query.
        cells = torch.ones_like(q.first)
        for low, high in box:
            cells = cells * (high - low + 1)
        is_box = cells == q.last - q.first + 1
        theirs = self._box(*scene.keys(found.block))
        whole = torch.ones_like(found.some)
        for axis in self.axes:
            mine = [x[found.query] for x in box[axis]]
            for coordinate in mine:  # what the first and the last see, those between see too
                low, high = self.seen(axis, coordinate, coordinate)
                whole &= (low <= theirs[axis][0]) & (theirs[axis][1] <= high)
        return Reach(found.query, found.block, whole, is_box[found.query])

    def _along(self, axis: int, token: Tensor) -> Tensor:
        """The tokens' coordinate."""
        assert self.grid is not None
        return token // prod(self.grid[axis + 1 :]) % self.grid[axis]

    def _box(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
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

    @model_validator(mode="after")
    def _one_for_each_axis(self) -> Self:
        _check_axes(self.grid, radius=self.radius)
        return self

    def seen(self, axis: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        radius = _at(self.radius, axis)
        return low - radius, high + radius


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


def _at(given: int | tuple[int, ...], axis: int) -> int:
    return given if isinstance(given, int) else given[axis]


def _check_axes(grid: tuple[int, ...] | None, **given: int | tuple[int, ...]) -> None:
    for name, values in given.items():
        if grid is not None and isinstance(values, tuple) and len(values) != len(grid):
            raise ValueError(f"{name}={values} and grid={grid}: give {name} for each axis")

"""Orders of whole sequences: a prefix and a grid, or segments that are folded one by one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from ring_attention_hilbert import curves
from ring_core.order import Order, Walk

Curve = Literal["hilbert", "morton", "tile"]
CURVES: tuple[Curve, ...] = ("hilbert", "morton", "tile")


@dataclass(frozen=True)
class GridOrder(Order):
    """``prefix`` tokens, and then the cells of a grid along a curve. ``block`` is of tiles."""

    curve: Curve
    grid: tuple[int, ...]
    prefix: int
    block: int

    def make(self) -> Tensor:
        before = torch.arange(self.prefix, device="cpu")
        return torch.cat([before, self.prefix + walked(self.curve, self.grid, self.block)])

    def walk(self) -> Walk:
        cells = self.tokens()[self.prefix :] - self.prefix
        return Walk(self.grid, cells, cells + self.prefix)


@dataclass(frozen=True)
class FoldedOrder(Order):
    """Segments of ``segment`` tokens, the last one maybe shorter, each folded and walked."""

    curve: Curve
    length: int
    segment: int
    block: int

    def make(self) -> Tensor:
        whole, tail = divmod(self.length, self.segment)
        first = torch.arange(whole, device="cpu")[:, None] * self.segment
        segments = first + self._folded(self.segment) if whole else first.new_zeros(0)
        rest = whole * self.segment + self._folded(tail)
        return torch.cat([segments.flatten(), rest])

    def walk(self) -> Walk:
        """A frame for each segment; the tail's square stands in the last one's corner."""
        tokens, count = self.tokens(), -(-self.length // self.segment)
        height, width = square(self.segment)
        segment, index = tokens // self.segment, tokens % self.segment
        whole = self.length // self.segment
        _, narrow = square(max(1, self.length % self.segment))
        wide = torch.where(segment < whole, width, narrow)
        cells = segment * height * width + index // wide * width + index % wide
        return Walk((count, height, width), cells, tokens)

    def _folded(self, length: int) -> Tensor:
        """A square of so many cells, row by row, as far as they go."""
        if not length:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        grid = square(length)
        cells = walked(self.curve, grid, self.block)
        return cells[cells < length]


def row_by_row(grid: tuple[int, ...], prefix: int) -> Walk:
    """The way through a grid whose tokens stay as they are."""
    cells = torch.arange(prod(grid), device="cpu")
    return Walk(grid, cells, cells + prefix)


def square(length: int) -> tuple[int, int]:
    """Rows and columns of the smallest square, or nearly one, that holds so many cells."""
    width = ceil(sqrt(length))
    return ceil(length / width), width


def walked(curve: Curve, grid: tuple[int, ...], block: int) -> Tensor:
    """The cells of a grid along a curve: int64."""
    if curve == "tile":
        return curves.tile(grid, block)
    return {"hilbert": curves.hilbert, "morton": curves.morton}[curve](grid)

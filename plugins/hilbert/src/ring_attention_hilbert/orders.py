"""Orders of whole sequences: a prefix and a grid, or segments that are folded one by one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

import torch
from torch import Tensor

from ring_attention_hilbert import curves
from ring_core.order import Order

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

    def _folded(self, length: int) -> Tensor:
        """A square of so many cells, row by row, as far as they go."""
        if not length:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        grid = square(length)
        cells = walked(self.curve, grid, self.block)
        return cells[cells < length]


def square(length: int) -> tuple[int, int]:
    """Rows and columns of the smallest square, or nearly one, that holds so many cells."""
    width = ceil(sqrt(length))
    return ceil(length / width), width


def walked(curve: Curve, grid: tuple[int, ...], block: int) -> Tensor:
    """The cells of a grid along a curve: int64."""
    if curve == "tile":
        return curves.tile(grid, block)
    return {"hilbert": curves.hilbert, "morton": curves.morton}[curve](grid)

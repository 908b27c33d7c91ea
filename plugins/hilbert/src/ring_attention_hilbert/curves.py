"""Space-filling curves through grids of any size, all cells at once.

No library fits: those on the package index know cubes whose side is a power of two, or make one
cell at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

_ALIKE = 1 << 12
"""With so many boxes those that are alike are walked once."""

Axis: TypeAlias = tuple[Tensor, Tensor]
"""Of many boxes one side: [n] how many cells, and [n] from one to the next, in flat indices."""


def row(grid: Sequence[int]) -> Tensor:
    """Cells in row-major order: int64 [cells], as the others here give them."""
    return torch.arange(math.prod(grid), device="cpu")


def morton(grid: Sequence[int]) -> Tensor:
    """Cells by the interleaved bits of their coordinates (Z-order); those of the enclosing cube
    that the grid does not have are left out."""
    cells = row(grid)
    code, place, stride = torch.zeros_like(cells), 0, 1
    sides = []
    for size in reversed(grid):
        sides.append((cells // stride % size, (size - 1).bit_length()))
        stride *= size
    for bit in range(max(bits for _, bits in sides)):
        for coordinate, bits in sides:  # the axis that runs fastest has the lowest bits
            if bit < bits:
                code |= (coordinate >> bit & 1) << place
                place += 1
    return torch.argsort(code)


def tile(grid: Sequence[int], block: int) -> Tensor:
    """Cells in boxes of about ``block`` cells, of sides as equal as halving allows; boxes, and
    cells in each box, in row-major order."""
    shape = [1] * len(grid)
    while math.prod(shape) < block:
        # The shortest side that can still grow; of equal ones the last, which runs fastest.
        room = [axis for axis, size in enumerate(grid) if 2 * shape[axis] <= size]
        if not room:
            break
        axis = min(reversed(room), key=lambda axis: shape[axis])
        shape[axis] *= 2
    cells = row(grid)
    box, inside, stride = torch.zeros_like(cells), torch.zeros_like(cells), 1
    boxes = volume = 1
    for size, side in reversed([*zip(grid, shape, strict=True)]):
        coordinate = cells // stride % size
        box += coordinate // side * boxes
        inside += coordinate % side * volume
        boxes, volume, stride = boxes * -(-size // side), volume * side, stride * size
    return torch.argsort(box * volume + inside)


def hilbert(grid: Sequence[int]) -> Tensor:
    """Cells along a generalised Hilbert curve (Cerveny, "gilbert", 2018-2023): neighbours on the
    curve are neighbours on the grid where sides are even, with a diagonal step here and there where
    some are odd.

    A box is cut in two along a side that is long, else so that its parts are walked one after the
    other; all boxes of a level are cut together.
    """
    sizes = [size for size in grid if size > 1]
    if len(sizes) <= 1:
        return row(grid)
    strides = [math.prod(grid[axis + 1 :]) for axis, size in enumerate(grid) if size > 1]
    order = sorted(range(len(sizes)), key=lambda axis: sizes[axis], reverse=True)
    boxes = _Boxes(
        torch.zeros(1, dtype=torch.int64, device="cpu"),
        [
            (torch.tensor([sizes[axis]], device="cpu"), torch.tensor([strides[axis]], device="cpu"))
            for axis in order
        ],
    )
    return _walked(boxes, _cut2 if len(sizes) == 2 else _cut3)


def _walked(boxes: _Boxes, cut: Callable[[_Boxes], list[_Parts]]) -> Tensor:
    """The cells of boxes, in order."""
    while len(boxes.start) < _ALIKE:
        lines = boxes.are_lines()
        if bool(lines.all()):
            return boxes.cells()
        boxes = boxes.cut(cut, lines)
    # By now many are alike but for where they are entered: one of each kind is walked.
    kinds, kind = torch.unique(torch.stack(boxes.columns()[1:], 1), dim=0, return_inverse=True)
    count = boxes.count()
    first = count.cumsum(0) - count
    found = torch.empty(int(count.sum()), dtype=torch.int64, device="cpu")
    for n, sides in enumerate(kinds.split(1)):
        axes = [(sides[:, i], sides[:, i + 1]) for i in range(0, sides.shape[1], 2)]
        local = _walked(_Boxes(torch.zeros_like(sides[:, 0]), axes), cut)
        mine = (kind == n).nonzero()
        found[first[mine] + torch.arange(len(local), device="cpu")] = boxes.start[mine] + local
    return found


class _Boxes:
    """Boxes in the order of the curve: where each one is entered, and its sides."""

    def __init__(self, start: Tensor, axes: list[Axis]) -> None:
        self.start, self.axes = start, axes

    def are_lines(self) -> Tensor:
        """Whether each box is but one cell wide."""
        return torch.stack([count > 1 for count, _ in self.axes]).sum(0) <= 1

    def count(self) -> Tensor:
        """Of cells in each box."""
        return torch.stack([count for count, _ in self.axes]).prod(0)

    def cells(self) -> Tensor:
        """The cells of boxes that are lines."""
        count = self.count()
        step = sum(torch.where(n > 1, s, 0) for n, s in self.axes)
        which = torch.arange(len(count), device="cpu").repeat_interleave(count)
        place = torch.arange(len(which), device="cpu") - (count.cumsum(0) - count)[which]
        return self.start[which] + place * torch.as_tensor(step)[which]

    def cut(self, how: Callable[[_Boxes], list[_Parts]], lines: Tensor) -> _Boxes:
        """Every box but the ``lines`` cut in its parts, in place."""
        parts = [(lines, [self]), *((case & ~lines, boxes) for case, boxes in how(self))]
        count = torch.zeros_like(self.start)
        for case, boxes in parts:
            count[case] = len(boxes)
        first, total = count.cumsum(0) - count, int(count.sum())
        columns = [
            torch.empty(total, dtype=torch.int64, device="cpu")
            for _ in range(1 + 2 * len(self.axes))
        ]
        for case, boxes in parts:
            for n, box in enumerate(boxes):
                for into, column in zip(columns, box.columns(), strict=True):
                    into[first[case] + n] = column[case]
        start, *rest = columns
        return _Boxes(start, [*zip(rest[::2], rest[1::2], strict=True)])

    def columns(self) -> list[Tensor]:
        return [self.start, *(x for axis in self.axes for x in axis)]


_Parts: TypeAlias = tuple[Tensor, list[_Boxes]]
"""Which boxes are cut so, and the parts of all boxes if they were."""


def _cut2(boxes: _Boxes) -> list[_Parts]:
    """Along a where it is long; else up a half of b, along a, and down again."""
    p, (a, b) = boxes.start, boxes.axes
    long = 2 * a[0] > 3 * b[0]
    a1, a2 = _halves(a, long)
    b1, b2 = _halves(b, ~long)
    return [
        (long, [_Boxes(p, [a1, b]), _Boxes(p + _to(a1), [a2, b])]),
        (
            ~long,
            [
                _Boxes(p, [b1, a1]),
                _Boxes(p + _to(b1), [a, b2]),
                _Boxes(p + _last(a) + _last(b1), [_back(b1), _back(a2)]),
            ],
        ),
    ]


def _cut3(boxes: _Boxes) -> list[_Parts]:
    """As in two dimensions, in those two that are not much the longest or the shortest; else in all
    three."""
    p, (a, b, c) = boxes.start, boxes.axes
    wide = (2 * a[0] > 3 * b[0]) & (2 * a[0] > 3 * c[0])
    flat_c = ~wide & (3 * b[0] > 4 * c[0])
    flat_b = ~wide & ~flat_c & (3 * c[0] > 4 * b[0])
    always = torch.ones_like(wide)
    (a1, a2), (b1, b2), (c1, c2) = (_halves(axis, always) for axis in (a, b, c))
    return [
        (wide, [_Boxes(p, [a1, b, c]), _Boxes(p + _to(a1), [a2, b, c])]),
        (
            flat_c,
            [
                _Boxes(p, [b1, c, a1]),
                _Boxes(p + _to(b1), [a, b2, c]),
                _Boxes(p + _last(a) + _last(b1), [_back(b1), c, _back(a2)]),
            ],
        ),
        (
            flat_b,
            [
                _Boxes(p, [c1, a1, b]),
                _Boxes(p + _to(c1), [a, b, c2]),
                _Boxes(p + _last(a) + _last(c1), [_back(c1), _back(a2), b]),
            ],
        ),
        (
            ~wide & ~flat_c & ~flat_b,
            [
                _Boxes(p, [b1, c1, a1]),
                _Boxes(p + _to(b1), [c, a1, b2]),
                _Boxes(p + _last(b1) + _last(c), [a, _back(b1), _back(c2)]),
                _Boxes(p + _last(a) + _to(b1) + _last(c), [_back(c), _back(a2), b2]),
                _Boxes(p + _last(a) + _last(b1), [_back(b1), c1, _back(a2)]),
            ],
        ),
    ]


def _halves(axis: Axis, even: Tensor) -> tuple[Axis, Axis]:
    """A side cut in two; the first part even where asked for, so that the walk ends beside it."""
    count, step = axis
    half = count // 2
    half = torch.where(even & (half % 2 == 1) & (count > 2), half + 1, half)
    return (half, step), (count - half, step)


def _to(axis: Axis) -> Tensor:
    """From a box's first cell to the one behind its side."""
    return axis[0] * axis[1]


def _last(axis: Axis) -> Tensor:
    """From a box's first cell to the last one of its side."""
    return (axis[0] - 1) * axis[1]


def _back(axis: Axis) -> Axis:
    return axis[0], -axis[1]

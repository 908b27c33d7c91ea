"""What queries see as ranges of coordinates, where it is that: less for a kernel to look at than a
bit for each pair.

A query sees a key if, along every axis, the key's coordinate lies within the query's limits. Tokens
are such an axis: causal masks, windows and documents are limits on it. So are a grid's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Scene, ragged

if TYPE_CHECKING:
    from ring_attention_blocksparse.tables import Pieces

_ROOM = 128
"""Numbers of rows are rounded up to it, for kernels that read whole tiles."""


class Axis(NamedTuple):
    """Coordinates from 0 to ``size - 1``.

    Attributes:
        at: int64 [keys]. low, high: int64 [queries], the first and the last that each sees, if need
            be beyond the ends; high < low where it sees none.
    """

    at: Tensor
    low: Tensor
    high: Tensor
    size: int


class Packed(NamedTuple):
    """All axes in one number of 32 bits: a field for each, whose highest bit is a guard.

    With u = at - low and w = high - at, in unsigned arithmetic, a query sees a key if all guards of
    u and of w are set: no field then borrowed from its guard.

    Attributes:
        at: int32 [keys]. low, high: int32 [queries]. All three go on behind the last row.
        guards: the guards' bits, as a signed number. reach: ``high - low``, where it is the same
            for all queries.
    """

    at: Tensor
    low: Tensor
    high: Tensor
    guards: int
    reach: int | None


class Band(NamedTuple):
    """Row x of the queries sees row y of the keys if low <= y - x <= high."""

    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Limits:
    """Of patterns under a scene's mask, for the rows of a tile; looked at when asked for.

    Attributes:
        q, kv: the tile's pieces, which hold all its rows.
    """

    scene: Scene
    patterns: tuple[Pattern, ...]
    q: Pieces
    kv: Pieces

    @cached_property
    def axes(self) -> tuple[Axis, ...] | None:
        """None where what is seen is nothing of the kind."""
        i, j = (_tokens(side, self.scene) for side in (self.q, self.kv))
        found: list[Axis] = []
        fine = {pattern for pattern in self.patterns if not pattern.is_of_blocks}
        if fine:
            if len(set(self.patterns)) > 1:
                return None  # what any of them shows is no box
            given = fine.pop().limits(self.scene, i, j)
            if given is None:
                return None
            found += given
        if not self.scene.is_open:
            found.append(Axis(j, *self.scene.bounds(i), self.scene.length))
        along = [axis for axis in found if axis.at is j]
        if len(along) > 1:  # one axis, of which several things are asked
            low = torch.stack([axis.low for axis in along]).amax(0)
            high = torch.stack([axis.high for axis in along]).amin(0)
            rest = [axis for axis in found if axis.at is not j]
            found = [*rest, Axis(j, low, high, self.scene.length)]
        return tuple(found)

    @cached_property
    def band(self) -> Band | None:
        """Where neighbouring rows hold neighbouring tokens, and what a query sees goes by the
        distance alone."""
        i, j = (_tokens(side, self.scene) for side in (self.q, self.kv))
        if self.axes is None or len(self.axes) > 1 or not (_neighbours(i) and _neighbours(j)):
            return None
        apart = int(i[0]) - int(j[0])
        if not self.axes:
            return Band(-len(i), len(j))
        at, low, high, _ = self.axes[0]
        if at is not j and not torch.equal(at, j):
            return None
        # Limits beyond the tile's keys say no more than that all are seen on that side.
        ends = [
            _offset(low - i, low > j[0], j[0] - i, least=True),
            _offset(high - i, high < j[-1], j[-1] - i, least=False),
        ]
        if None in ends:
            return None
        return Band(*(int(end) + apart for end in ends if end is not None))

    @cached_property
    def packed(self) -> Packed | None:
        """None where the axes need more than 32 bits."""
        if self.axes is None:
            return None
        axes = self.axes or (self._none,)
        reaches = [axis.high - axis.low for axis in axes]
        even = all(len(x) and bool((x == x[0]).all() & (x[0] >= 0)) for x in reaches)
        return (_packed(axes, even) if even else None) or _packed(axes, False)

    @property
    def _none(self) -> Axis:
        """On which all is seen."""
        low, at = (_tokens(side, self.scene) * 0 for side in (self.q, self.kv))
        return Axis(at, low, low, 1)


def _packed(axes: tuple[Axis, ...], even: bool) -> Packed | None:
    """The axes; where each query reaches ``even``-ly far along each of them, limits may lie beyond
    its ends."""
    fields, shift = [], 0
    for at, low, high, size in axes:
        if not even:
            empty = high < low
            low = low.clamp(0, size).masked_fill(empty, 1)
            high = high.clamp(-1, size - 1).masked_fill(empty, 0)
        under = max(0, -int(low.min())) if len(low) else 0
        most = max(int(x.max()) for x in (low, high, at) if len(x)) if len(low) + len(at) else 0
        guard = 1 << (most + under).bit_length()
        reach = int(high[0] - low[0]) if even else 0
        numbers = at + under + guard, low + under, high + under + 2 * guard
        fields.append((*(x << shift for x in (*numbers, reach + 2 * guard)), guard << shift))
        shift += guard.bit_length()
        if shift > 32:
            return None
    *columns, reach, guards = (sum(column) for column in zip(*fields, strict=True))
    at, low, high = (_wrapped(_padded(x)) for x in columns)
    return Packed(at, low, high, _signed(guards), _signed(reach) if even else None)


def _tokens(pieces: Pieces, scene: Scene) -> Tensor:
    """The token of each row; of those in no piece any."""
    which, at = ragged(pieces.size)
    row = pieces.row[which] + at
    found = row.new_zeros(int(row.max()) + 1 if len(row) else 0)
    found[row] = pieces.place[which] + at * pieces.step[which]
    return found if scene.order is None else scene.order.tokens(found.device)[found]


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % _ROOM))


def _neighbours(token: Tensor) -> bool:
    return len(token) > 0 and bool((token.diff() == 1).all())


def _offset(away: Tensor, binds: Tensor, all_seen: Tensor, least: bool) -> int | None:
    """The one offset from each query's token at which what it sees ends; None if there is none.

    Args:
        away: [queries], the offsets. binds: bool, which of them matter. all_seen: those from which
            on they would not.
    """
    some = away[binds]
    if not len(some):
        return int(all_seen.min() if least else all_seen.max())
    first = some[0]
    beyond = all_seen >= first if least else all_seen <= first
    return int(first) if bool((some == first).all() & (binds | beyond).all()) else None


def _wrapped(x: Tensor) -> Tensor:
    """The lowest 32 bits."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).int()


def _signed(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x

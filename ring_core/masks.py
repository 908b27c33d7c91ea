"""Masks of tiles: descriptors that say which query rows see which key rows, never arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Mask(ABC):
    """Which of a tile's query rows ``x`` see which of its key rows ``y``, both counted from 0.

    Hashable and comparable; subclasses are frozen dataclasses. A kernel names the mask classes it
    computes; :meth:`visible` is the definition, and what the reference kernel uses.
    """

    @abstractmethod
    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        """The definition, for some query rows: bool [len(rows), nk], True where x sees y.

        Where heads of the tile see different keys, or batch rows: [B or 1, K or 1, 1, len(rows),
        nk].
        """

    @abstractmethod
    def count(self, nq: int, nk: int) -> int:
        """Number of visible pairs; the mean over heads, where they differ."""

    def cost(self, nq: int, nk: int) -> tuple[str, int]:
        """What a kernel goes through, for predictions: a name, alike for masks of which a pair
        costs alike, and how many pairs that is; the mean over heads, where they differ."""
        return type(self).__name__, self.count(nq, nk)

    def of_phases(self, phases: range) -> Mask:
        """This mask for some neighbouring ones of the phases of its tile's heads, where they see
        different keys."""
        return self

    def of_heads(self, held: range) -> Mask:
        """This mask of a tile of all KV heads for some neighbouring ones, where heads see different
        keys."""
        return self

    def unread(self, nq: int, nk: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rows and keys of the tile that hold nothing, such as padding: they see nothing, and must
        not be read, for they may be NaN. Bool [nq] and [nk], True where so; None: there are none.
        """
        return None

    def filled(self, choice: Any, batch: range | None) -> Mask:
        """This mask with what an attention chose for a call: see
        :meth:`ring_core.attention.BaseRingAttention.choose`. Most masks leave no choice.

        Args:
            batch: the tile's batch rows; None means all.
        """
        return self


@dataclass(frozen=True, slots=True)
class Band(Mask):
    """Row x sees row y if ``lo <= y - x <= hi``; None leaves a side open.

    Causal is ``Band(None, 0)``; a window is a band; strided rows and offsets between the tile's
    corners are already worked into the numbers.
    """

    lo: int | None = None
    hi: int | None = None

    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        import torch

        x = torch.arange(rows.start, rows.stop, rows.step, device=device)
        offset = torch.arange(nk, device=device) - x[:, None]
        seen = torch.ones_like(offset, dtype=torch.bool)
        if self.lo is not None:
            seen &= offset >= self.lo
        if self.hi is not None:
            seen &= offset <= self.hi
        return seen

    def count(self, nq: int, nk: int) -> int:
        """Closed form, so that a plan over 10^9 tokens can weigh its tiles."""
        upper = nq * nk if self.hi is None else _pairs_up_to(self.hi, nq, nk)
        lower = 0 if self.lo is None else _pairs_up_to(self.lo - 1, nq, nk)
        return max(0, upper - lower)

    def cost(self, nq: int, nk: int) -> tuple[str, int]:
        lo, hi = self.bounds(nq, nk)
        open_below, open_above = lo == -(nq - 1), hi == nk - 1
        name = "full" if open_below and open_above else "triangle"
        return name if open_below or open_above else "window", self.count(nq, nk)

    def bounds(self, nq: int, nk: int) -> tuple[int, int]:
        """Smallest and largest ``y - x`` that a visible pair of an nq x nk tile can have."""
        lo, hi = -(nq - 1), nk - 1
        return (
            lo if self.lo is None else max(lo, self.lo),
            hi if self.hi is None else min(hi, self.hi),
        )


@dataclass(frozen=True, slots=True)
class Diagonal(Mask):
    """Bands of which no two share a row or a key: several tiles as one, as packed documents are.

    Attributes:
        pieces: query rows, key rows and the band between them, counted from their first ones;
            ascending in both. What lies outside of them sees nothing.
    """

    pieces: tuple[tuple[range, range, Band], ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Every call looks up what was made of it; of a thousand pieces this takes half a
        # millisecond.
        object.__setattr__(self, "_hash", hash(self.pieces))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Diagonal], tuple[Any, ...]]:
        return Diagonal, (self.pieces,)  # another process hashes otherwise

    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        import torch

        stop = max([rows.stop, *(q.stop for q, _, _ in self.pieces)])
        seen = torch.zeros(stop, nk, dtype=torch.bool, device=device)
        for q, kv, band in self.pieces:
            inside = band.visible(range(len(q)), len(kv), device)
            seen[q.start : q.stop, kv.start : kv.stop] = inside
        return seen[rows.start : rows.stop : rows.step]

    def count(self, nq: int, nk: int) -> int:
        return sum(band.count(len(q), len(kv)) for q, kv, band in self.pieces)

    def cost(self, nq: int, nk: int) -> tuple[str, int]:
        return "documents", self.count(nq, nk)


FULL = Band()
"""Every row sees every key."""

CAUSAL = Band(None, 0)
"""Row x sees keys 0..x: the corners are aligned."""


def _pairs_up_to(h: int, nq: int, nk: int) -> int:
    """Pairs of an nq x nk tile with ``y - x <= h``: the sum over x of clamp(x+h+1, 0, nk)."""
    first = max(0, -h)  # rows before it see nothing
    full = min(nq, max(first, nk - h - 1))  # rows from here see all nk keys
    if first >= nq:
        return 0
    growing = full - first
    return growing * (first + h + 1 + full + h) // 2 + (nq - full) * nk


def trim(nq: int, nk: int, band: Band) -> tuple[range, range, Band] | None:
    """Cut the rows that see nothing and the keys that nobody sees off a tile's borders.

    Returns:
        The query rows and key rows that remain, and the band counted from their first ones, with
        sides that bind nowhere set to None; or None if no pair is visible.
    """
    lo, hi = band.bounds(nq, nk)
    if nq <= 0 or nk <= 0 or lo > hi:
        return None
    q = range(max(0, -hi), min(nq, nk - lo))
    k = range(max(0, q.start + lo), min(nk, q.stop + hi))
    if not q or not k:
        return None
    shift = q.start - k.start
    lo, hi = lo + shift, hi + shift
    open_lo, open_hi = lo <= -(len(q) - 1), hi >= len(k) - 1
    return q, k, Band(None if open_lo else lo, None if open_hi else hi)


def trim_part(rows: range, keys: range, band: Band) -> tuple[range, range, Band] | None:
    """:func:`trim` of some rows and keys of a tile under ``band``; the ranges count in the tile."""
    shift = rows.start - keys.start
    lo = None if band.lo is None else band.lo + shift
    hi = None if band.hi is None else band.hi + shift
    trimmed = trim(len(rows), len(keys), Band(lo, hi))
    if trimmed is None:
        return None
    q, k, inner = trimmed
    return rows[q.start : q.stop], keys[k.start : k.stop], inner

"""Band tiles cut into what a kernel computes without a mask: rectangles and triangles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ring_core.masks import CAUSAL, FULL, Band, trim_part
from ring_core.plan import Tile

Piece = tuple[range, range, Band]
"""Query rows, key rows (both of the tile), and the band between them."""


def is_mirrored_causal(nq: int, nk: int, band: Band) -> bool:
    """Whether the tile is causal when both its rows and its keys are read backwards.

    It is the left edge of a window: the last row sees the last key only.
    """
    return band.hi is None and band.lo is not None and band.lo == nk - nq


def cut(tile: Tile, direct: Callable[[int, int, Band], bool], block: int) -> list[Tile]:
    """Tiles that ``direct`` accepts and that are ``tile`` together.

    Args:
        direct: whether the kernel computes (rows, keys, band) in one call. It must accept
            rectangles, corner-aligned triangles of both kinds, and anything of at most
            ``block`` rows whose band is at most ``block`` wide.
    """
    if not isinstance(tile.mask, Band):
        return [tile]
    pieces = _pieces(tile.q.count, tile.kv.count, tile.mask, direct, block)
    return [
        replace(tile, q=tile.q.chosen(q), kv=tile.kv.chosen(kv), mask=band)
        for q, kv, band in pieces
    ]


def rows_apart(tile: Tile, row: int) -> list[Tile]:
    """The tile's rows before ``row`` and from it on, each trimmed to the keys that it sees."""
    assert isinstance(tile.mask, Band)
    keys = range(tile.kv.count)
    parts = (trim_part(rows, keys, tile.mask) for rows in (range(row), range(row, tile.q.count)))
    return [
        replace(tile, q=tile.q.chosen(q), kv=tile.kv.chosen(kv), mask=band)
        for q, kv, band in filter(None, parts)
    ]


def _pieces(
    nq: int, nk: int, band: Band, direct: Callable[[int, int, Band], bool], block: int
) -> Iterator[Piece]:
    if direct(nq, nk, band):
        yield range(nq), range(nk), band
    elif band.lo is None:
        # Keys left of the diagonal's start are seen by all; behind them lies a triangle.
        assert band.hi is not None
        yield range(nq), range(band.hi), FULL
        yield range(nq), range(band.hi, nk), CAUSAL
    elif band.hi is None:
        seen_by_all = nq + band.lo - 1  # the last row's first key, and with it all behind
        yield range(nq), range(seen_by_all + 1, nk), FULL
        yield range(nq), range(seen_by_all + 1), Band(band.lo, None)
    else:
        width = band.hi - band.lo + 1
        for first in range(0, nq, max(width, block)):
            rows = range(first, min(nq, first + max(width, block)))
            # As many rows as the band is wide: a triangle on its left edge and one on its right.
            edge = rows.start + band.hi + 1
            halves = (range(nk),) if width <= block else (range(min(edge, nk)), range(edge, nk))
            for keys in halves:
                part = trim_part(rows, keys, band)
                if part:
                    q, kv, inner = part
                    for a, b, piece in _pieces(len(q), len(kv), inner, direct, block):
                        yield q[a.start : a.stop], kv[b.start : b.stop], piece

"""Tiles of band-shaped masks: what causal, windowed and packed attention have in common."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ring_core.layout import Layout
from ring_core.masks import Band, trim
from ring_core.plan import Rows, Tile


@dataclass(frozen=True, slots=True)
class Document:
    """Queries that see nothing but the keys of the same document: two ranges of token indices.

    ``batch`` is the run of batch rows that have this document; None means all.
    """

    q: range
    kv: range
    batch: range | None = None

    @property
    def shift(self) -> int:
        """What aligned ends add to ``j - i``: key ``i + shift`` stands opposite query i."""
        return self.kv.stop - self.q.stop


def band_tiles(
    queries: Layout, keys: Layout, documents: Sequence[Document], band: Band, rank: int, owner: int
) -> list[Tile]:
    """Tiles of ``rank``'s queries with ``owner``'s keys where ``band`` bounds j - i, aligned at the
    ends of each document. Adjacent tiles that form one band together are one tile."""
    tiles: list[Tile] = []
    for batch, members in _by_batch(documents):
        starts = [document.q.start for document in members]
        found: list[Tile] = []
        for q_local, q_run in _placed(queries.rows[rank]):
            first = max(0, bisect_right(starts, q_run[0]) - 1)
            for document in members[first:]:
                if document.q.start > q_run[-1]:
                    break
                q_rows = _within(q_run, document.q)
                if not q_rows:
                    continue
                for kv_local, kv_run in _placed(keys.rows[owner]):
                    kv_rows = _within(kv_run, document.kv)
                    found += _tile(
                        q_local, q_run, q_rows, kv_local, kv_run, kv_rows, document, band
                    )
        tiles += [replace(tile, batch=batch) for tile in merge_tiles(found)]
    return tiles


def visible_pairs(rows: range, documents: Iterable[Document], band: Band, batch: int) -> int:
    """Visible pairs of a unit-step run of queries with all keys, over ``batch`` batch rows."""
    pairs = 0
    for document in documents:
        inside = _within(rows, document.q)
        if inside:
            corner = document.kv.start - inside.start - document.shift
            seen = _shifted(band, -corner).count(len(inside), len(document.kv))
            pairs += seen * (batch if document.batch is None else len(document.batch))
    return pairs


def merge_tiles(tiles: Iterable[Tile]) -> list[Tile]:
    """Join neighbours whose union is a band again: fewer and larger kernel calls.

    Two disjoint band tiles lie inside the smallest band over their common rectangle; they are that
    band exactly if it has as many visible pairs as both together.
    """
    merged: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (tile.q.start, tile.kv.start)):
        merged.append(tile)
        while len(merged) > 1 and (union := _union(merged[-2], merged[-1])):
            merged[-2:] = [union]
    return merged


def _union(a: Tile, b: Tile) -> Tile | None:
    assert isinstance(a.mask, Band)
    assert isinstance(b.mask, Band)
    q0, q1 = _hull(a.q, b.q)
    k0, k1 = _hull(a.kv, b.kv)
    bounds = [
        (tile.mask.bounds(tile.q.count, tile.kv.count), tile.kv.start - tile.q.start)
        for tile in (a, b)
        if isinstance(tile.mask, Band)
    ]
    lo = min(low + corner for (low, _), corner in bounds)
    hi = max(high + corner for (_, high), corner in bounds)
    trimmed = trim(q1 - q0, k1 - k0, Band(lo + q0 - k0, hi + q0 - k0))
    if trimmed is None or len(trimmed[0]) != q1 - q0 or len(trimmed[1]) != k1 - k0:
        return None
    if trimmed[2].count(q1 - q0, k1 - k0) != a.pairs + b.pairs:
        return None
    return replace(a, q=Rows(q0, q1 - q0), kv=Rows(k0, k1 - k0), mask=trimmed[2])


def _hull(a: Rows, b: Rows) -> tuple[int, int]:
    return min(a.start, b.start), max(a.start + a.count, b.start + b.count)


def _tile(
    q_local: int,
    q_run: range,
    q_rows: range,
    kv_local: int,
    kv_run: range,
    kv_rows: range,
    document: Document,
    band: Band,
) -> Iterator[Tile]:
    if not kv_rows:
        return
    step = q_rows.step if len(q_rows) > 1 else kv_rows.step
    if len(kv_rows) > 1 and kv_rows.step != step:
        raise ValueError(f"queries {q_run} and keys {kv_run} must advance by the same step")
    corner = kv_rows.start - q_rows.start - document.shift
    # lo <= corner + step*(y - x) <= hi, solved for y - x in whole numbers
    lo = None if band.lo is None else -((corner - band.lo) // step)
    hi = None if band.hi is None else (band.hi - corner) // step
    trimmed = trim(len(q_rows), len(kv_rows), Band(lo, hi))
    if trimmed:
        q, kv, mask = trimmed
        q_first = q_local + (q_rows.start - q_run.start) // q_run.step
        kv_first = kv_local + (kv_rows.start - kv_run.start) // kv_run.step
        yield Tile(Rows(q_first + q.start, len(q)), Rows(kv_first + kv.start, len(kv)), mask)


def _within(run: range, bounds: range) -> range:
    """The part of an ascending ``run`` that lies in a unit-step range."""
    first = max(0, -((run.start - bounds.start) // run.step))
    last = max(first, -((run.start - bounds.stop) // run.step))
    return run[first:last]


def _shifted(band: Band, by: int) -> Band:
    return Band(
        None if band.lo is None else band.lo + by, None if band.hi is None else band.hi + by
    )


def _placed(runs: Sequence[range]) -> Iterator[tuple[int, range]]:
    """Each run with the local index of its first row."""
    local = 0
    for run in runs:
        yield local, run
        local += len(run)


def _by_batch(
    documents: Sequence[Document],
) -> Iterator[tuple[range | None, list[Document]]]:
    groups: dict[range | None, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.batch, []).append(document)
    yield from groups.items()

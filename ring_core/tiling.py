"""Tiles of band-shaped masks: what causal, windowed and packed attention have in common."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
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


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of a shard, from ``row`` on, and the tokens that they hold."""

    row: int
    tokens: range

    def rows(self, tokens: range) -> Rows:
        """The rows that hold ``tokens``: some of the run's, at equal steps."""
        first = self.row + (tokens.start - self.tokens.start) // self.tokens.step
        return Rows(first, len(tokens), tokens.step // self.tokens.step)


def runs_of(layout: Layout, rank: int) -> list[Run]:
    """What ``rank`` holds."""
    runs, row = [], 0
    for tokens in layout.rows[rank]:
        runs.append(Run(row, tokens))
        row += len(tokens)
    return runs


def common(a: range, b: range) -> range:
    """The numbers in two ascending ranges: again a range."""
    step, divisor = math.lcm(a.step, b.step), math.gcd(a.step, b.step)
    apart, rest = divmod(b.start - a.start, divisor)
    if rest or not a or not b:
        return range(0)
    # The first number of both lattices from a's start on, by the Chinese remainder theorem.
    modulus = b.step // divisor
    first = a.start + a.step * (apart * pow(a.step // divisor, -1, modulus) % modulus)
    first += max(0, -((first - max(a.start, b.start)) // step)) * step
    return range(first, max(first, min(a.stop, b.stop)), step)


def band_tile(
    q: Run, kv: Run, q_tokens: range, kv_tokens: range, band: Band, shift: int = 0
) -> Tile | None:
    """What queries of one run see of keys of another, or None if that is nothing.

    Args:
        q_tokens, kv_tokens: which tokens, in the runs or not. Those in the runs must come at one
            step on both sides.
        band: bounds ``j - i - shift``.

    Raises:
        ValueError: the steps differ.
    """
    q_held, kv_held = common(q.tokens, q_tokens), common(kv.tokens, kv_tokens)
    if not q_held or not kv_held:
        return None
    step = q_held.step if len(q_held) > 1 else kv_held.step
    if len(kv_held) > 1 and kv_held.step != step:
        raise ValueError(f"queries {q_held} and keys {kv_held} must advance by the same step")
    corner = kv_held.start - q_held.start - shift
    # lo <= corner + step*(y - x) <= hi, solved for y - x in whole numbers
    lo = None if band.lo is None else -((corner - band.lo) // step)
    hi = None if band.hi is None else (band.hi - corner) // step
    trimmed = trim(len(q_held), len(kv_held), Band(lo, hi))
    if trimmed is None:
        return None
    q_rows, kv_rows, mask = trimmed
    seeing, seen = q_held[q_rows.start : q_rows.stop], kv_held[kv_rows.start : kv_rows.stop]
    return Tile(q.rows(seeing), kv.rows(seen), mask)


def visible_pairs(rows: range, document: Document, band: Band) -> int:
    """Visible pairs of a unit-step run of queries with all keys of a document, in one batch row."""
    inside = common(rows, document.q)
    corner = document.kv.start - inside.start - document.shift
    return _shifted(band, -corner).count(len(inside), len(document.kv)) if inside else 0


def merge_tiles(tiles: Iterable[Tile]) -> list[Tile]:
    """Join neighbours whose union is a band again: fewer and larger kernel calls.

    Two band tiles without a common pair lie inside the smallest band over their common rectangle;
    they are that band exactly if it has as many visible pairs as both together. Strided rows are
    neighbours on their lattice; repeated ones stay alone.
    """
    done: list[Tile] = []
    alike: dict[Hashable, list[Tile]] = {}
    for tile in tiles:
        if isinstance(tile.mask, Band) and tile.q.repeat == tile.kv.repeat == 1:
            key = tile.block, tile.heads, tile.batch, tile.q.lattice, tile.kv.lattice
            alike.setdefault(key, []).append(tile)
        else:
            done.append(tile)
    for members in alike.values():
        merged: list[Tile] = []
        for tile in sorted(members, key=lambda tile: (tile.q.start, tile.kv.start)):
            merged.append(tile)
            while len(merged) > 1 and (union := _union(merged[-2], merged[-1])):
                merged[-2:] = [union]
        done += merged
    return done


def join_phases(tiles: Iterable[Tile]) -> list[Tile]:
    """Join tiles of one phase of heads each, where the next phase's are the same a row later.

    Phases come in ascending order.
    """
    done: list[Tile] = []
    last: dict[Hashable, int] = {}
    for tile in tiles:
        heads = tile.heads
        q, kv = (replace(rows, start=rows.start - heads.start) for rows in (tile.q, tile.kv))
        key = q, kv, tile.mask, tile.batch, heads.step
        at = last.get(key)
        if at is not None and done[at].heads.start + done[at].heads.phases == heads.start:
            before = done[at]
            q, kv = (replace(rows, slant=1) for rows in (before.q, before.kv))
            phases = before.heads.phases + 1
            done[at] = replace(before, q=q, kv=kv, heads=replace(before.heads, phases=phases))
        else:
            last[key] = len(done)
            done.append(tile)
    return done


def _union(a: Tile, b: Tile) -> Tile | None:
    q, kv = hull(a.q, b.q), hull(a.kv, b.kv)
    if len(q) < len(a.q) + len(b.q) and len(kv) < len(a.kv) + len(b.kv):
        return None  # they share pairs, each of which counts twice
    bounds = []
    for tile in (a, b):
        assert isinstance(tile.mask, Band)
        lo, hi = tile.mask.bounds(tile.q.count, tile.kv.count)
        corner = (tile.kv.start - kv.start) // kv.step - (tile.q.start - q.start) // q.step
        bounds.append((lo + corner, hi + corner))
    band = Band(min(lo for lo, _ in bounds), max(hi for _, hi in bounds))
    trimmed = trim(q.count, kv.count, band)
    if trimmed is None or len(trimmed[0]) != q.count or len(trimmed[1]) != kv.count:
        return None
    if trimmed[2].count(q.count, kv.count) != a.pairs + b.pairs:
        return None
    return replace(a, q=q, kv=kv, mask=trimmed[2])


def hull(a: Rows, b: Rows) -> Rows:
    """The smallest rows on the lattice of both that hold both."""
    last = max(x.start + (x.count - 1) * x.step for x in (a, b))
    start = min(a.start, b.start)
    return replace(a, start=start, count=(last - start) // a.step + 1)


def _shifted(band: Band, by: int) -> Band:
    return Band(
        None if band.lo is None else band.lo + by, None if band.hi is None else band.hi + by
    )

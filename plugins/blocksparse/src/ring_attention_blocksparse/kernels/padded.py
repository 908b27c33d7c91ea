"""Lists of blocks as flash-attn-4 takes them: of equal length, in tiles of 128 rows and keys.

Where few lists are much longer than the others, as those of global tokens are, they get arrays of
their own: memory stays in proportion to the pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention_blocksparse.scene import ragged
from ring_attention_blocksparse.tables import FULL, Pieces, Tables, packed

TILE = 128
"""Rows and keys of a tile."""
_SPARE = 4
"""Entries of an array for each pair that it holds, at most."""
_SLOTS = 256
"""Slots for each pair that has a mask, at most."""


class Padded(NamedTuple):
    """What some tiles of one side meet on the other; B and H are 1 where all are alike.

    Attributes:
        rows: the tiles' rows, if they are not all of the tensor's. The others have empty lists
            where they are all.
        partial, full: int32 [B, H, tiles, most], the others that need a mask and those that do not,
            ascending. partial_count, full_count: int32 [B, H, tiles].
        slots: int32 [B, H, query tiles, 2**n]: entry y % 2**n of tile x is the number of the mask
            of tiles x and y of queries and keys, counted among those here.
    """

    rows: Tensor | None
    partial: Tensor
    partial_count: Tensor
    full: Tensor
    full_count: Tensor
    slots: Tensor


class PaddedTables(NamedTuple):
    """Tables in arrays.

    Attributes:
        by_query, by_key: together the tiles of queries and of keys.
        bits: int32 [masks, 128, 4], as :class:`~ring_attention_blocksparse.tables.Tables` has them.
    """

    by_query: tuple[Padded, ...]
    by_key: tuple[Padded, ...]
    bits: Tensor

    @staticmethod
    def of(tables: Tables) -> PaddedTables | None:
        """None where pieces are not 128 rows each, end to end, or slots would take too much."""
        q, kv = tables.q, tables.kv
        if not (_is_tiled(q) and _is_tiled(kv)):
            return None
        lists = tables.by_query
        which, _ = ragged(lists.start.diff().long())
        other, number = (x[: len(which)].long() for x in (lists.other, lists.mask))
        # Full pairs get a mask, too, where one of the two is the last tile and smaller.
        edge = 2 * (q.size[which % len(q)] < TILE) + (kv.size[other] < TILE).long()
        sizes = [(int(x), int(y)) for x in (TILE, q.size[-1]) for y in (TILE, kv.size[-1])]
        place = torch.arange(TILE, device=q.row.device)
        whole = torch.stack([(place < x)[:, None] & (place < y) for x, y in sizes])
        bits = torch.cat([tables.bits.view(-1, TILE, TILE // 32), packed(whole)])
        number = torch.where((number == FULL) & (edge > 0), len(tables.bits) + edge, number)
        pairs = _Pairs(
            (tables.batch, tables.heads),
            (len(q), len(kv)),
            which // len(q),
            (which % len(q), other),
            number,
        )
        by_query, by_key = (_side(pairs, side) for side in (0, 1))
        if by_query is None or by_key is None:
            return None
        return PaddedTables(by_query, by_key, bits)


class _Pairs(NamedTuple):
    """Pairs of tiles: of queries and of keys, in this order."""

    shape: tuple[int, int]
    tiles: tuple[int, int]
    layer: Tensor
    at: tuple[Tensor, Tensor]
    number: Tensor


def _is_tiled(pieces: Pieces) -> bool:
    if not len(pieces) or pieces.largest != TILE:
        return False
    rows = TILE * torch.arange(len(pieces), device=pieces.row.device)
    return bool((pieces.row == rows).all() and (pieces.size[:-1] == TILE).all())


def _side(pairs: _Pairs, side: int) -> tuple[Padded, ...] | None:
    """All tiles of queries (side 0) or of keys (1); None where slots take too much."""
    tiles, layers = pairs.tiles[side], pairs.shape[0] * pairs.shape[1]
    count = torch.bincount(pairs.layer * tiles + pairs.at[side], minlength=layers * tiles)
    done: list[Padded] = []
    for lines in _classes(count.view(layers, tiles).amax(0).cpu()):
        one = _padded(pairs, side, lines.to(count.device), apart=bool(done))
        if one is None:
            return None
        done.append(one)
    return tuple(done)


def _classes(count: Tensor) -> list[Tensor]:
    """Lists of so many entries each, in classes that arrays of the longest hold without much waste;
    the class of the shortest lists first."""
    lines, found = torch.arange(len(count)), []
    while len(lines) * int(count[lines].max()) > _SPARE * int(count[lines].sum()):
        short = count[lines] * len(lines) <= _SPARE * count[lines].sum()
        found.append(lines[short])
        lines = lines[~short]
    return [*found, lines]


def _padded(pairs: _Pairs, side: int, lines: Tensor, apart: bool) -> Padded | None:
    """The lists of some tiles."""
    tiles, layers = list(pairs.tiles), pairs.shape[0] * pairs.shape[1]
    place = torch.full((tiles[side],), -1, device=lines.device)
    place[lines] = torch.arange(len(lines), device=lines.device) if apart else lines
    kept = place[pairs.at[side]] >= 0
    layer, number = pairs.layer[kept], pairs.number[kept]
    at = [x[kept] for x in pairs.at]
    at[side] = place[at[side]]
    if apart:
        tiles[side] = len(lines)
    line = layer * tiles[side] + at[side]
    some, other = number >= 0, at[1 - side]
    partial, partial_count = _array(line[some], other[some], layers * tiles[side])
    full, full_count = _array(line[~some], other[~some], layers * tiles[side])
    slots = _slots((layer * tiles[0] + at[0])[some], at[1][some], number[some], layers * tiles[0])
    if slots is None:
        return None
    rows = (lines[:, None] * TILE + torch.arange(TILE, device=lines.device)).flatten()
    shape = (*pairs.shape, tiles[side])
    return Padded(
        rows if apart else None,
        partial.view(*shape, -1),
        partial_count.view(shape),
        full.view(*shape, -1),
        full_count.view(shape),
        slots.view(*pairs.shape, tiles[0], -1),
    )


def _array(line: Tensor, other: Tensor, lines: int) -> tuple[Tensor, Tensor]:
    """The others by line, ascending, int32 [lines, most]; and how many there are."""
    order = torch.argsort(line * (int(other.max()) + 1 if len(other) else 1) + other)
    line, other = line[order], other[order]
    count = torch.bincount(line, minlength=lines)
    found = other.new_zeros(lines, max(1, int(count.max())), dtype=torch.int32)
    start = count.cumsum(0) - count
    found[line, torch.arange(len(line), device=line.device) - start[line]] = other.int()
    return found, count.int()


def _slots(x: Tensor, y: Tensor, number: Tensor, lines: int) -> Tensor | None:
    """Numbers of pairs (x, y) where no two of a line x share a slot."""
    size = 1
    while len(torch.unique(x * size + y % size)) < len(x):
        size *= 2
        if size * lines > _SLOTS * (len(x) + lines):
            return None
    found = number.new_zeros(lines, size, dtype=torch.int32)
    found[x, y % size] = number.int()
    return found

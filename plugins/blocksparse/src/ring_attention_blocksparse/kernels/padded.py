"""Lists of blocks as flash-attn-4 takes them: of equal length, in tiles of 128 rows and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention_blocksparse.limits import Band, Packed
from ring_attention_blocksparse.scene import ragged
from ring_attention_blocksparse.tables import FULL, Pieces, Tables, packed

TILE = 128
"""Rows and keys of a tile."""
_SLOTS = 256
"""Slots for each pair that has a mask, at most."""


class Masks(NamedTuple):
    """A bit for each pair of rows.

    Attributes:
        slots: int32 [B, H, query tiles, 2**n]: entry y % 2**n of tile x is the first word of the
            mask of tiles x and y of queries and keys.
        bits: int32 [masks * 128 * 4], as :class:`~ring_attention_blocksparse.tables.Tables` has
            them.
    """

    slots: Tensor
    bits: Tensor


class Padded(NamedTuple):
    """What the tiles of one side meet on the other; B and H are 1 where all are alike.

    Attributes:
        partial, full: int32 [B, H, tiles, most], the others that need a mask and those that do not,
            ascending. partial_count, full_count: int32 [B, H, tiles].
        shown: what a masked pair of tiles shows.
    """

    partial: Tensor
    partial_count: Tensor
    full: Tensor
    full_count: Tensor
    shown: Band | Packed | Masks


def is_tiled(pieces: Pieces) -> bool:
    """Whether pieces are 128 rows each, but for a smaller last one, end to end."""
    if not len(pieces) or pieces.largest != TILE:
        return False
    rows = TILE * torch.arange(len(pieces), device=pieces.row.device)
    return bool((pieces.row == rows).all())


def padded(tables: Tables, side: int) -> Padded | None:
    """The lists of tiles of queries (side 0) or of keys (1), each side of which :func:`is_tiled`;
    None where masks would take too much memory."""
    q, kv, lists = tables.q, tables.kv, tables.by_query
    which, _ = ragged(lists.start.diff().long())
    layer, x = which // len(q), which % len(q)
    y, number = (z[: len(which)].long() for z in (lists.other, lists.mask))
    # Full pairs get a mask, too, where one of the two is smaller than a tile.
    edge = 2 * (q.size[x] < TILE) + (kv.size[y] < TILE).long()
    number = torch.where((number == FULL) & (edge > 0), len(tables.bits) + edge, number)
    masked, layers = number != FULL, tables.batch * tables.heads
    shown: Band | Packed | Masks | None = tables.limits.band or tables.limits.packed
    if shown is None:
        line = (layer * len(q) + x)[masked]
        shown = _masks(tables, line, y[masked], number[masked], layers)
        if shown is None:
            return None
    mine, theirs, tiles = ((x, y, len(q)), (y, x, len(kv)))[side]
    line, shape = layer * tiles + mine, (tables.batch, tables.heads, tiles)
    partial, partial_count = _array(line[masked], theirs[masked], layers * tiles)
    full, full_count = _array(line[~masked], theirs[~masked], layers * tiles)
    return Padded(
        partial.view(*shape, -1),
        partial_count.view(shape),
        full.view(*shape, -1),
        full_count.view(shape),
        shown,
    )


def _masks(tables: Tables, line: Tensor, y: Tensor, number: Tensor, layers: int) -> Masks | None:
    """Of pairs of lines and tiles of keys the masks of these numbers, behind which those stand that
    show all there is."""
    q, kv = tables.q, tables.kv
    slots = _slots(line, y, number * TILE * TILE // 32, layers * len(q))
    if slots is None:
        return None
    sizes = [(int(m), int(n)) for m in (TILE, q.size.min()) for n in (TILE, kv.size.min())]
    place = torch.arange(TILE, device=q.row.device)
    whole = torch.stack([(place < m)[:, None] & (place < n) for m, n in sizes])
    bits = torch.cat([tables.bits.view(-1, TILE, TILE // 32), packed(whole)])
    return Masks(slots.view(tables.batch, tables.heads, len(q), -1), bits.view(-1))


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
    """Numbers for pairs (x, y), where no two of a line x share a slot."""
    size = 1
    while len(torch.unique(x * size + y % size)) < len(x):
        size *= 2
        if size * lines > _SLOTS * (len(x) + lines):
            return None
    found = number.new_zeros(lines, size, dtype=torch.int32)
    found[x, y % size] = number.int()
    return found

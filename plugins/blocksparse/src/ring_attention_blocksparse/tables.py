"""Block tables: for the rows of a tile which pieces of queries meet which pieces of keys.

A *piece* is what a run of tokens has in one block of the pattern's: neighbouring rows, at most a
block of them. Pieces that see all of each other are full; for the others there is a mask of one bit
a pair, stored once however many pairs of pieces have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_attention_blocksparse.limits import Limits
from ring_attention_blocksparse.pairs import PAIRS, Span, admitted, candidates, seen
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Scene, ragged
from ring_core.order import Order
from ring_core.tiling import Run

if TYPE_CHECKING:
    from ring_attention_blocksparse.kernels.padded import Padded
    from ring_attention_blocksparse.kernels.parts import Part

FULL = -1
"""In place of a mask's number: all is seen."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of a tile's rows, ascending.

    Attributes:
        row, size: [n], a piece's first row and how many there are.
        place, step: [n], the first row's place in the sequence, and how far the next one's is.
        first, last: [n], the least and the largest of the tokens.
        block: [n], the block that the places are in.
        largest, total: of the sizes, and their sum. most: pieces that one block has.
    """

    row: Tensor
    size: Tensor
    place: Tensor
    step: Tensor
    first: Tensor
    last: Tensor
    block: Tensor
    largest: int
    total: int
    most: int

    @staticmethod
    def of(
        runs: Sequence[Run], block: int, device: torch.device, order: Order | None = None
    ) -> Pieces:
        """Cut runs of places at the borders of blocks of ``block`` places."""
        columns = [(run.row, run.tokens.start, run.tokens.step, len(run.tokens)) for run in runs]
        row, place, step, count = (
            torch.tensor(columns, dtype=torch.int64, device="cpu").view(-1, 4).unbind(1)
        )
        first, last = place // block, (place + (count - 1) * step) // block
        which, at = ragged(last - first + 1)
        index = first[which] + at
        place, step, row, count = place[which], step[which], row[which], count[which]
        # The first of the run's places that the block has, and the first behind it.
        begin = -(-(index * block - place).clamp_min(0) // step)
        end = torch.minimum(-(-((index + 1) * block - place) // step), count)
        kept = begin < end
        size, place, step = (x[kept] for x in (end - begin, place + begin * step, step))
        rows, blocks = (row + begin)[kept], index[kept]
        first, last = place, place + (size - 1) * step
        if order is not None and len(size):
            which, at = ragged(size)
            tokens = order.tokens()[place[which] + at * step[which]]
            first, last = (
                torch.segment_reduce(tokens.double(), how, lengths=size).long()
                for how in ("min", "max")
            )
        largest = int(size.max()) if len(size) else 1
        most = int(torch.unique(blocks, return_counts=True)[1].max()) if len(size) else 1
        return Pieces(
            rows.to(device),
            size.to(device),
            place.to(device),
            step.to(device),
            first.to(device),
            last.to(device),
            blocks.to(device),
            largest,
            int(size.sum()),
            most,
        )

    def __len__(self) -> int:
        return len(self.row)

    def held(self, blocks: int) -> Tensor:
        """[blocks]: how many rows each block has."""
        return self.size.new_zeros(blocks).index_add_(0, self.block, self.size)

    def rows(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """[..., largest]: the rows of some pieces, and whether they have so many: where not, the
        first one."""
        place = torch.arange(self.largest, device=which.device)
        there = place < self.size[which][..., None]
        return self.row[which][..., None] + place * there, there

    def span(self, which: Tensor) -> Span:
        """Some pieces' places."""
        first, step = self.place[which], self.step[which]
        return Span(first, first + (self.size[which] - 1) * step, self.largest, step)


@dataclass(frozen=True)
class Lists:
    """For each piece of one side those of the other; list after list.

    Attributes:
        start: int32 [lists + 1]. other: int32 [pairs], a piece. mask: int32 [pairs], a number of a
            mask, or :data:`FULL`. row: int32 [pairs], the other piece's first row.
        plain: int32 [lists], where in each list those begin that need no mask: full ones, with
            pieces as large as any.
    """

    start: Tensor
    other: Tensor
    mask: Tensor
    row: Tensor
    plain: Tensor

    @staticmethod
    def of(lists: int, which: Tensor, others: Pieces, other: Tensor, mask: Tensor) -> Lists:
        """From pairs in any order; those behind all lists are left."""
        plain = (mask == FULL) & (others.size[other] == others.largest)
        key, order = torch.sort(2 * which + plain, stable=True)
        edges = 2 * torch.arange(lists + 1, device=which.device)
        start, first = (torch.searchsorted(key, x).int() for x in (edges, edges[:-1] + 1))
        other = other[order]
        return Lists(start, other.int(), mask[order].int(), others.row[other].int(), first)


@dataclass(frozen=True)
class Tables:
    """What a kernel needs of a block-sparse tile.

    There is a list for each batch row, KV head and piece, in this order; where all batch rows or
    all heads are alike, ``batch`` or ``heads`` is 1.

    Attributes:
        q, kv: the pieces.
        by_query: for each piece of queries those of keys. by_key: the other way.
        bits: int32 [masks, q.largest, ceil(kv.largest / 32)]: bit y % 32 of word y // 32 says
            whether row x of a piece of queries sees row y of one of keys.
        limits: the same said another way, where that can be.
    """

    q: Pieces
    kv: Pieces
    batch: int
    heads: int
    by_query: Lists
    by_key: Lists
    bits: Tensor
    limits: Limits

    @staticmethod
    def of_pairs(
        q: Pieces,
        kv: Pieces,
        bits: Tensor,
        batch: int,
        heads: int,
        which: Tensor,
        other: Tensor,
        mask: Tensor,
        limits: Limits,
    ) -> Tables:
        """From pairs, sorted by list and piece.

        Args:
            which: the list, counted by pieces of queries; behind all lists what is no pair.
            other: a piece of keys. mask: the mask's number.
        """
        lists, size = batch * heads, max(1, len(q))
        back = which // size * len(kv) + other
        return Tables(
            q,
            kv,
            batch,
            heads,
            Lists.of(lists * len(q), which, kv, other, mask),
            Lists.of(lists * len(kv), back, q, which % size, mask),
            bits,
            limits,
        )

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """For each side the same in parts without long lists."""
        from ring_attention_blocksparse.kernels.parts import parts

        with torch.inference_mode(False), torch.no_grad():
            return parts(self, 0), parts(self, 1)

    @cached_property
    def padded(self) -> tuple[Padded | None, Padded | None]:
        """For each side lists of equal length, if they can have them."""
        from ring_attention_blocksparse.kernels.padded import is_tiled, padded

        with torch.inference_mode(False), torch.no_grad():
            if not (is_tiled(self.q) and is_tiled(self.kv)):
                return None, None
            return padded(self, 0), padded(self, 1)

    def unpacked(self, mask: Tensor) -> Tensor:
        """Masks of some numbers, :data:`FULL` among them: bool [..., q.largest, kv.largest]."""
        if not len(self.bits):
            shape = (*mask.shape, self.q.largest, self.kv.largest)
            return torch.ones(shape, dtype=torch.bool, device=mask.device)
        words = self.bits[mask.long().clamp_min(0)]
        place = torch.arange(32, dtype=torch.int32, device=mask.device)
        found = (words[..., None] >> place & 1).bool().flatten(-2)[..., : self.kv.largest]
        return found | (mask == FULL)[..., None, None]

    def dense(self, rows: range, nk: int) -> Tensor:
        """Which of some query rows see which of ``nk`` keys: bool [batch, heads, 1, rows, nk]."""
        device, lists = self.bits.device, self.batch * self.heads
        count = self.by_query.start.diff().long()
        which, _ = ragged(count)
        found = torch.zeros(lists * len(rows) * nk, dtype=torch.bool, device=device)
        step = max(1, PAIRS // (self.q.largest * self.kv.largest))
        for some in torch.split(torch.arange(len(which), device=device), step):
            layer, mine = which[some] // len(self.q), which[some] % len(self.q)
            theirs = self.by_query.other[some].long()
            x, there_x = self.q.rows(mine)
            y, there_y = self.kv.rows(theirs)
            there_x &= (x >= rows.start) & (x < rows.stop)
            shown = self.unpacked(self.by_query.mask[some])
            shown = shown & there_x[:, :, None] & there_y[:, None, :]
            place = (layer[:, None, None] * len(rows) + (x - rows.start)[:, :, None]) * nk
            found[(place + y[:, None, :])[shown]] = True
        return found.view(self.batch, self.heads, 1, len(rows), nk)

    def area(self) -> int:
        """Pairs of rows in the pieces of all pairs, seen or not, summed over lists."""
        return int(self._areas().sum())

    def pairs(self) -> int:
        """Visible pairs of rows, summed over lists."""
        areas = self._areas()
        if not len(self.bits):
            return int(areas.sum())
        ones = popcount(self.bits).flatten(1).sum(1)
        mask = self.by_query.mask[: len(areas)].long()
        return int(torch.where(mask == FULL, areas, ones[mask.clamp_min(0)]).sum())

    def _areas(self) -> Tensor:
        which, _ = ragged(self.by_query.start.diff().long())
        mine = self.q.size[which % max(1, len(self.q))]
        return mine * self.kv.size[self.by_query.other[: len(which)].long()]


@dataclass(frozen=True)
class Pairs:
    """Pairs of pieces for one head, sorted: places in ``q``, in ``kv``, and their mask's number."""

    q: Tensor
    kv: Tensor
    mask: Tensor


class Bits:
    """Masks of pairs of pieces, each stored once."""

    def __init__(self, q: Pieces, kv: Pieces) -> None:
        self._words = -(-kv.largest // 32)
        self._shape = (q.largest, self._words)
        device = q.row.device
        self._found = [torch.zeros(0, q.largest * self._words, dtype=torch.int32, device=device)]
        self._number = 0

    def add(self, shown: Tensor) -> Tensor:
        """Numbers [n] of the masks ``shown``, bool [n, q.largest, kv.largest]."""
        words = packed(shown).flatten(1)
        unique, which = torch.unique(words, dim=0, return_inverse=True)
        self._found.append(unique)
        number: Tensor = which + self._number
        self._number += len(unique)
        return number

    def result(self) -> tuple[Tensor, Tensor]:
        """All masks, each once: int32 [masks, *shape]; and which of them each number means."""
        unique, which = torch.unique(torch.cat(self._found), dim=0, return_inverse=True)
        return unique.view(-1, *self._shape), which


def pairs_of(
    scene: Scene, patterns: Sequence[Pattern], head: int, q: Pieces, kv: Pieces, bits: Bits
) -> Pairs:
    """Pairs of pieces that see some of each other; masks are numbered as ``bits`` does."""
    index, place = torch.unique(q.block, return_inverse=True)
    blocks = scene.blocks(index)
    found = candidates(scene, patterns, blocks, head)
    # From pairs of blocks to pairs of pieces: a block may have several on either side.
    by_place, by_block = torch.argsort(place, stable=True), torch.argsort(kv.block, stable=True)
    x, of_query = _expand(place[by_place], by_place, found.query)
    y, of_block = _expand(kv.block[by_block], by_block, found.block[of_query])
    x, which = x[of_block], of_query[of_block]
    order = torch.argsort(x * max(1, len(kv)) + y)
    x, y, whole = x[order], y[order], found.whole[which[order]]
    clear = admitted(scene, q.first[x], q.last[x], kv.first[y], kv.last[y])
    mask = torch.full_like(x, FULL)
    kept = whole & clear.whole
    looked_at = (~kept & clear.some).nonzero().squeeze(1)
    for some in torch.split(looked_at, max(1, PAIRS // (q.largest * kv.largest))):
        shown = seen(scene, patterns, q.span(x[some]), kv.span(y[some]), whole[some])
        area = q.size[x[some]] * kv.size[y[some]]
        ones = shown.flatten(1).sum(1)
        kept[some] = ones > 0
        part = (ones > 0) & (ones < area)
        mask[some[part]] = bits.add(shown[part])
    return Pairs(x[kept], y[kept], mask[kept])


def _expand(keys: Tensor, order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each wanted key all entries that have it: the entries, and for which of the wanted."""
    first = torch.searchsorted(keys, wanted)
    count = torch.searchsorted(keys, wanted, right=True) - first
    which, place = ragged(count)
    return order[first[which] + place], which


def packed(shown: Tensor) -> Tensor:
    """bool [..., y] as int32 [..., ceil(y / 32)]."""
    words = torch.nn.functional.pad(shown, (0, -shown.shape[-1] % 32))
    place = torch.arange(32, device=shown.device)
    found = (torch.unflatten(words, -1, (-1, 32)).long() << place).sum(-1)
    signed: Tensor = torch.where(found >= 1 << 31, found - (1 << 32), found)
    return signed.int()


def popcount(words: Tensor) -> Tensor:
    """How many bits of int32 words are set: int64."""
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[..., None] >> place & 1).sum(-1)

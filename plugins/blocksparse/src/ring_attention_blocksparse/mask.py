"""The mask of a block-sparse tile: a description, from which kernels get tables of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ring_attention_blocksparse.limits import Limits
from ring_attention_blocksparse.pairs import active, admitted, visible_block, visible_count
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Blocks, Reach, Scene, ragged
from ring_attention_blocksparse.tables import FULL, Bits, Pairs, Pieces, Tables, pairs_of
from ring_core.layout import Layout
from ring_core.masks import Mask
from ring_core.plan import ALL_HEADS, Rows, Tile
from ring_core.rounds import Part
from ring_core.tiling import Run, runs_of


@dataclass(frozen=True)
class Choice:
    """The key blocks that patterns chose for a rank's queries in a call.

    Attributes:
        index: int64 [n], the query blocks that the rank holds tokens of, ascending.
        blocks: for each choosing pattern int64 [B, K, n, most], -1 where there are fewer.
        first: which of all KV heads the first of the K is.
    """

    index: Tensor
    blocks: Mapping[Pattern, Tensor]
    first: int = 0


@dataclass(frozen=True, eq=False)
class KnownChoice(Choice):
    """A choice of which each rank knows what the others read: a
    :class:`ring_core.protocols.Selection`.

    Attributes:
        read: bool [world, B, K, key blocks], of which each rank reads something.
        keys: how they are dealt out. size: keys in a block.
    """

    read: Tensor = field(kw_only=True)
    keys: Layout = field(kw_only=True)
    size: int = field(kw_only=True)

    def rows(self, requester: int, owner: int, part: Part) -> Tensor:
        """Which rows of a part the requester reads: bool [B, rows, heads]."""
        blocks = _blocks_at(self.keys, self.size, owner, part.rows, self.read.device)
        read = self.read[requester]
        if part.heads != ALL_HEADS:
            heads = part.heads.indices(read.shape[1])
            assert heads[-1] - heads[0] == len(heads) - 1, "heads of one class are neighbours"
            read = read[:, heads[0] : heads[-1] + 1]
        return read[:, :, blocks].transpose(1, 2)


@lru_cache(maxsize=1024)
def _blocks_at(layout: Layout, size: int, owner: int, rows: Rows, device: torch.device) -> Tensor:
    """The block that each row of a shard lies in: int64; kept on ``device`` for a while."""
    blocks = torch.zeros(layout.size, dtype=torch.int64, device="cpu")
    for run in runs_of(layout, owner):
        tokens = torch.arange(run.tokens.start, run.tokens.stop, run.tokens.step, device="cpu")
        blocks[run.row : run.row + len(tokens)] = tokens // size
    with torch.inference_mode(False):
        return blocks[torch.tensor(rows.indices(), device="cpu")].to(device)


@dataclass(frozen=True)
class BlockMask(Mask):
    """What patterns show between the tokens in some rows of a tile and those in some keys.

    Rows and keys in no run hold nothing: they are not read, and see nothing.

    Attributes:
        patterns: those that the tile's heads have. heads: those heads, as global KV heads.
        q, kv: the tokens, or their places, by runs of the tile's rows and keys.
    """

    scene: Scene
    patterns: tuple[Pattern, ...]
    heads: range
    q: tuple[Run, ...]
    kv: tuple[Run, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: there may be thousands of runs."""
        return hash((self.scene, self.patterns, self.heads, self.q, self.kv))

    def tables(self, device: torch.device) -> Tables:
        """What a kernel needs, on ``device``; kept there for a while."""
        return _tables(self, device)

    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        return self.tables(device or torch.device("cpu")).dense(rows, nk)

    def count(self, nq: int, nk: int) -> int:
        tables = self.tables(torch.device("cpu"))
        return tables.pairs() // tables.heads

    def cost(self, nq: int, nk: int) -> tuple[str, int]:
        """Without tables: a rank needs its own alone, a prediction those of many."""
        scene = self.scene
        q = Pieces.of(self.q, scene.block_q, torch.device("cpu"), scene.order)
        kv = Pieces.of(self.kv, scene.block_kv, torch.device("cpu"), scene.order)
        limits = Limits(scene, self.patterns, q, kv)
        if limits.axes == ():
            how = "unmasked"
        elif limits.band is not None:
            how = "of a window"
        else:
            how = "by bits" if limits.packed is None else "by coordinates"
        rows, keys = q.held(scene.query_blocks), kv.held(scene.key_blocks)
        area = 0
        for head in self.apart:
            query, key = active(scene, self.patterns, head).of(rows.nonzero().squeeze(1))
            area += int((rows[rows > 0][query] * keys[key]).sum())
        return f"blocks of {scene.block_q} x {scene.block_kv}, {how}", area // len(self.apart)

    @property
    def apart(self) -> range:
        """The heads whose pairs differ; or the first one, if none do."""
        varies = any(pattern.varies for pattern in self.patterns)
        return self.heads if varies else self.heads[:1]

    def of_phases(self, phases: range) -> Mask:
        return replace(self, heads=self.heads[phases.start : phases.stop])

    def of_heads(self, held: range) -> Mask:
        return self.of_phases(held)

    def unread(self, nq: int, nk: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if all(
            sum(len(run.tokens) for run in runs) == n for runs, n in ((self.q, nq), (self.kv, nk))
        ):
            return None
        rows, keys = (torch.ones(n, dtype=torch.bool, device=device) for n in (nq, nk))
        for holding, runs in ((rows, self.q), (keys, self.kv)):
            for run in runs:
                holding[run.row : run.row + len(run.tokens)] = False
        return rows, keys

    def filled(self, choice: Choice | None, batch: range | None) -> Mask:
        if choice is None or not any(pattern.chosen for pattern in self.patterns):
            return self
        return Filled(self, choice, batch)


@dataclass(frozen=True, eq=False)
class Filled(Mask):
    """A block mask with the blocks that were chosen for a call."""

    mask: BlockMask
    choice: Choice
    batch: range | None

    def tables(self, device: torch.device) -> Tables:
        """What a kernel needs, on ``device``."""
        return self._tables  # the choice was made there

    @cached_property
    def _tables(self) -> Tables:
        mask, choice = self.mask, self.choice
        static = _static(mask, choice.index.device)
        q, kv = static.q, static.kv
        heads, lanes = len(mask.heads), []
        place = torch.searchsorted(choice.index, q.block)
        for pattern in mask.patterns:
            if pattern.chosen:
                chosen = choice.blocks[pattern]
                if self.batch is not None:
                    chosen = chosen[self.batch.start : self.batch.stop]
                first = mask.heads.start - choice.first
                chosen = chosen[:, first : first + len(mask.heads)]
                lanes.append(_pieces_of(chosen[:, :, place], kv))
        # Lists of all batch rows and heads stand end to end; behind them what is no pair. Nothing
        # here waits for a GPU to say how much there is.
        y = torch.cat(lanes, dim=-1)
        batch, nowhere = y.shape[0], y.shape[0] * heads * len(q)
        x = torch.arange(len(q), device=y.device)[:, None].expand(y.shape)
        other = y.clamp_max(max(0, len(kv) - 1))
        number = static.number(x, other)
        there = (y < len(kv)) & (number >= FULL)
        layer = torch.arange(batch * heads, device=y.device)
        which = (layer.view(batch, heads, 1, 1) * len(q) + x).where(there, nowhere)
        parts = [(which.flatten(), other.flatten(), number.flatten())]
        for n, pairs in enumerate(static.pairs):
            mine = layer if len(static.pairs) == 1 else layer.view(batch, heads)[:, n]
            shape = len(mine), len(pairs.q)
            parts.append(
                (
                    (mine[:, None] * len(q) + pairs.q).flatten(),
                    pairs.kv.expand(shape).flatten(),
                    pairs.mask.expand(shape).flatten(),
                )
            )
        which, other, number = (torch.cat(column) for column in zip(*parts, strict=True))
        # Of a pair that is chosen and seen anyway the first is kept, which shows more.
        key, order = torch.sort(which * (len(kv) + 1) + other, stable=True)
        which, other, number = which[order], other[order], number[order]
        again = torch.zeros_like(key, dtype=torch.bool)
        again[1:] = key[1:] == key[:-1]
        which = which.masked_fill(again, nowhere)
        return Tables.of_pairs(
            q, kv, static.bits, batch, heads, which, other, number, static.limits
        )

    def visible(self, rows: range, nk: int, device: torch.device | None = None) -> Tensor:
        return self._tables.dense(rows, nk)

    def unread(self, nq: int, nk: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        return self.mask.unread(nq, nk, device)

    def count(self, nq: int, nk: int) -> int:
        return self._tables.pairs() // (self._tables.heads * self._tables.batch)


class _Edges(Pattern):
    """Blocks of which the mask lets some pairs through, and maybe not all."""

    kind: str = "edges"

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        if scene.order is not None:
            return _cut(scene, q)
        each = torch.arange(len(q.index), device=q.device)
        low, high = scene.visible(q)
        last_lo, _ = scene.bounds(q.last.clamp_max(scene.stop - 1))
        _, first_hi = scene.bounds(q.first)
        size = scene.block_kv
        begin = (-(-last_lo // size)).clamp_min(low)  # the blocks that all queries see whole
        end = (first_hi + 1).div(size, rounding_mode="floor") - 1
        behind = torch.maximum(end + 1, begin)
        return Reach.together(
            [
                scene.between(q, each, low * size, begin * size - 1),
                scene.between(q, each, behind * size, (high + 1) * size - 1),
            ]
        )

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        return i == i


def _cut(scene: Scene, q: Blocks) -> Reach:
    """Of the visible blocks of an order those that the mask may cut."""
    query, place = ragged(visible_count(scene, q) if not scene.is_open else q.index * 0)
    block = visible_block(scene, q, query, place)
    clear = admitted(scene, q.first[query], q.last[query], *scene.keys(block))
    never = torch.zeros_like(clear.whole)
    return Reach(query, block, never, never).where(~clear.whole)


@dataclass(frozen=True)
class _Static:
    """What a mask's tables start from: pieces, the pairs of each head or of all alike, and where
    patterns choose, masks of all pairs that the mask cuts."""

    scene: Scene
    q: Pieces
    kv: Pieces
    pairs: tuple[Pairs, ...]
    bits: Tensor
    edges: Pairs
    limits: Limits

    def number(self, x: Tensor, y: Tensor) -> Tensor:
        """The mask's number for pairs of pieces of which a pattern shows all: :data:`FULL`, or less
        where the mask lets nothing through."""
        q, kv = self.q, self.kv
        clear = admitted(self.scene, q.first[x], q.last[x], kv.first[y], kv.last[y])
        number = torch.where(clear.whole, FULL, FULL - 1)
        if not len(self.edges.q):
            return number
        keys = self.edges.q * len(kv) + self.edges.kv
        key = x * len(kv) + y
        place = torch.searchsorted(keys, key).clamp_max(len(keys) - 1)
        return torch.where((keys[place] == key) & ~clear.whole, self.edges.mask[place], number)


@lru_cache(maxsize=256)
def _static(mask: BlockMask, device: torch.device) -> _Static:
    scene, patterns = mask.scene, mask.patterns
    q = Pieces.of(mask.q, scene.block_q, device, scene.order)
    kv = Pieces.of(mask.kv, scene.block_kv, device, scene.order)
    bits = Bits(q, kv)
    found = [pairs_of(scene, patterns, head, q, kv, bits) for head in mask.apart]
    choosing = any(pattern.chosen for pattern in patterns)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    edges = Pairs(none, none, none)
    if choosing:
        edges = pairs_of(scene, [_Edges()], 0, q, kv, bits)
    masks, which = bits.result()
    *found, edges = (_renumbered(pairs, which) for pairs in (*found, edges))
    return _Static(scene, q, kv, tuple(found), masks, edges, Limits(scene, patterns, q, kv))


def _renumbered(pairs: Pairs, which: Tensor) -> Pairs:
    if not len(which):
        return pairs
    mask = torch.where(pairs.mask == FULL, FULL, which[pairs.mask.clamp_min(0)])
    return replace(pairs, mask=mask)


@lru_cache(maxsize=256)
def _tables(mask: BlockMask, device: torch.device) -> Tables:
    with torch.inference_mode(False), torch.no_grad():
        static = _static.__wrapped__(mask, device)  # read once: it must not stay on the GPU
        q, found = static.q, static.pairs
        which = torch.cat([n * len(q) + pairs.q for n, pairs in enumerate(found)])
        other, number = (torch.cat([getattr(p, x) for p in found]) for x in ("kv", "mask"))
        return Tables.of_pairs(
            q, static.kv, static.bits, 1, len(found), which, other, number, static.limits
        )


def _pieces_of(blocks: Tensor, kv: Pieces) -> Tensor:
    """Pieces of blocks [..., n], of which -1 is none: [..., n * most], ``len(kv)`` for none."""
    order = torch.argsort(kv.block, stable=True)
    sorted_blocks = kv.block[order]
    first = torch.searchsorted(sorted_blocks, blocks.contiguous())
    stop = torch.searchsorted(sorted_blocks, blocks.contiguous(), right=True)
    place = first[..., None] + torch.arange(kv.most, device=blocks.device)
    there = place < stop[..., None]
    order = torch.cat([order, order.new_full((1,), len(kv))])
    return torch.where(there, order[place.clamp_max(len(kv))], len(kv)).flatten(-2)


def join(tiles: Sequence[Tile]) -> list[Tile]:
    """Tiles of the same heads and batch rows whose queries mostly overlap as one tile.

    One call then reads the keys of several owners, where a round brings them in one block. Tiles
    that share their keys with others stay alone: joined, they would show them to more queries.
    """
    done: list[Tile] = []
    readers = Counter(_keys_of(tile) for tile in tiles)
    for tile in sorted(tiles, key=lambda tile: (tile.q.start, tile.kv.start)):
        for at, other in enumerate(done if readers[_keys_of(tile)] == 1 else ()):
            if readers[_keys_of(other)] <= 1 and _alike(other, tile):
                done[at] = _joined(other, tile)
                break
        else:
            done.append(tile)
    return done


def _keys_of(tile: Tile) -> Hashable:
    return tile.kv, tile.block, tile.heads, tile.batch


def _alike(a: Tile, b: Tile) -> bool:
    assert isinstance(a.mask, BlockMask)
    assert isinstance(b.mask, BlockMask)
    if (a.block, a.heads, a.batch, a.mask.scene, a.mask.patterns) != (
        b.block,
        b.heads,
        b.batch,
        b.mask.scene,
        b.mask.patterns,
    ):
        return False
    first, last = min(a.q.start, b.q.start), max(x.q.start + x.q.count for x in (a, b))
    return 2 * (a.q.count + b.q.count) >= 3 * (last - first)


def _joined(a: Tile, b: Tile) -> Tile:
    sides = []
    for name in ("q", "kv"):
        mine, theirs = getattr(a, name), getattr(b, name)
        start = min(mine.start, theirs.start)
        count = max(x.start + x.count for x in (mine, theirs)) - start
        runs = [
            Run(run.row + x.start - start, run.tokens)
            for x, tile in ((mine, a), (theirs, b))
            for run in getattr(tile.mask, name)
        ]
        sides.append((replace(mine, start=start, count=count), _union(runs)))
    (q, q_runs), (kv, kv_runs) = sides
    assert isinstance(a.mask, BlockMask)
    return replace(a, q=q, kv=kv, mask=replace(a.mask, q=q_runs, kv=kv_runs))


def _union(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs of one set of rows, some of which two of them may name: each row once."""
    done: list[Run] = []
    for run in sorted(runs, key=lambda run: run.row):
        last = done[-1] if done else None
        end = last.row + len(last.tokens) if last else 0
        if last and run.row < end:
            stop = max(last.tokens.stop, run.tokens.stop)
            done[-1] = Run(last.row, range(last.tokens.start, stop, last.tokens.step))
        else:
            done.append(run)
    return tuple(done)


def of(mask: Mask) -> BlockMask | Filled:
    """The mask of a tile that a block-sparse kernel is given."""
    assert isinstance(mask, (BlockMask, Filled))
    return mask

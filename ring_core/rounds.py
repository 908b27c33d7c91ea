"""What one rank does, round by round: which rows come from whom, and the tiles that read them.

At offset t of the ring every rank computes with the keys of the rank t before it and sends its own
to the rank t after it, straight from the owner; nobody forwards. A *round* is one offset, or a few
of them whose keys then stand in one buffer: queries that see keys of several owners meet them in
one kernel call, so there are fewer tiles to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ring_core.masks import FULL, Band
from ring_core.plan import ALL_HEADS, ForHeads, Heads, Plan, Rows, Segments, Tile, check_tiles
from ring_core.tiling import hull, merge_tiles

_WAITING = 4
"""One in so many queries waits for all keys, where all see all."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of an owner's key/value shard that cross the wire together, for some heads.

    ``block`` and ``row`` say where they stand in the requester's round.
    """

    rows: Rows
    heads: Heads
    block: int
    row: int


@dataclass(frozen=True, slots=True)
class Block:
    """Fetched key rows that stand one behind the other, for some heads.

    ``parts`` are ``(step, part)``: places in the round's steps and in that step's parts.
    """

    heads: Heads
    parts: tuple[tuple[int, int], ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Step:
    """One offset of the ring: who sends what to whom; at offset 0 a rank copies to itself.

    Attributes:
        offset: alike on every rank.
        parts: rows of ``source`` that this rank fetches.
        give: rows of its own that ``requester`` fetches.
        there: the blocks of the requester's round.
        sizes: what the ranks fetch at this offset, as (rows, heads) of their parts, each once;
            nothing where one shard may be held.
        rounded: whether gradients, which take the same ways back, travel in the inputs' dtype;
            else in the accumulation dtype. Alike on every rank.
    """

    offset: int
    source: int
    parts: tuple[Part, ...]
    requester: int
    give: tuple[Part, ...]
    there: tuple[Block, ...]
    sizes: tuple[tuple[tuple[int, Heads], ...], ...]
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """Steps whose keys arrive together, and the tiles that read them.

    In round 0 the keys are the rank's own: it has no steps and no blocks. The buffer of a round
    holds its blocks one behind the other.

    Attributes:
        index: its first offset. number: among this rank's rounds.
    """

    index: int
    number: int
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...]


def rounds(plan: Plan, rank: int, shards: float, waits: bool = False) -> tuple[Round, ...]:
    """What ``rank`` does, in order.

    Args:
        shards: how many shards' worth of fetched keys may be held at a time. 1: every round is one
            offset (held while the next one arrives), and a rank leaves out rounds in which it
            neither moves nor computes anything. More: offsets share rounds as far as that goes,
            and all ranks have equally many rounds.
        waits: whether some queries wait for all keys, where all see all and one round brings all
            others': worth it for kernels that round. That round then has one more step, of offset
            0, and holds the rank's own keys too: up to one shard more.
    """
    groups = _offsets(plan, shards)
    gather = _waited_for if waits and len(groups) == 1 else _gathered
    own = gather(plan, rank, groups[0]).own if groups else tiles_of(plan, rank, rank)
    done = [Round(0, 0, (), (), own)]
    for offsets in groups:
        mine = gather(plan, rank, offsets)
        steps = []
        for place, t in enumerate(mine.offsets):
            requester = (rank + t) % plan.world
            theirs = gather(plan, requester, offsets)
            sizes = _sizes(plan, offsets, place, gather) if shards > 1 else ()
            steps.append(
                Step(
                    t,
                    (rank - t) % plan.world,
                    mine.parts[place],
                    requester,
                    theirs.parts[place],
                    theirs.blocks,
                    sizes,
                )
            )
        if shards > 1 or mine.tiles or any(step.give for step in steps):
            done.append(Round(offsets[0], len(done), tuple(steps), mine.blocks, mine.tiles))
    return tuple(done)


def check(plan: Plan, rank: int) -> None:
    """Check what the planner gives for ``rank``.

    Raises:
        PlanError: a tile has rows that its rank or the keys' owner does not hold.
    """
    for owner in range(plan.world):
        check_tiles(plan, rank, owner, tiles_of(plan, rank, owner))


def elements_fetched(plan: Plan, rank: int, kv_heads: int) -> int:
    """(Row, KV head) pairs that ``rank`` gets in one forward; their gradients go back."""
    plan = ForHeads.of(plan, kv_heads)
    return sum(_elements(plan, rank, t) for t in range(1, plan.world))


def elements_sent(plan: Plan, rank: int, kv_heads: int) -> int:
    """(Row, KV head) pairs of its own keys that ``rank`` sends in one forward.

    Times ``(D + Dv) * batch * itemsize`` this is the bytes that a communicator counts.
    """
    plan = ForHeads.of(plan, kv_heads)
    return sum(_elements(plan, (rank + t) % plan.world, t) for t in range(1, plan.world))


def _elements(plan: ForHeads, rank: int, t: int) -> int:
    """(Row, KV head) pairs that ``rank`` fetches at offset t."""
    parts = _gathered(plan, rank, (t,)).parts[0]
    return sum(len(part.rows) * part.heads.count(plan.kv_heads) for part in parts)


@lru_cache(maxsize=64)
def _offsets(plan: Plan, shards: float) -> tuple[tuple[int, ...], ...]:
    """The offsets of each round, alike on every rank."""
    each = range(1, plan.world)
    if shards == 1:
        return tuple((t,) for t in each)
    rows = {t: [_rows(plan, rank, t) for rank in range(plan.world)] for t in each}
    needed = [t for t in each if any(rows[t])]

    def fits(offsets: Sequence[int], most: float) -> bool:
        held = (sum(rows[t][rank] for t in offsets) for rank in range(plan.world))
        return max(held) <= most * plan.keys.size

    if needed and fits(needed, shards):
        return (tuple(needed),)
    grouped: list[list[int]] = []
    for t in needed:  # two rounds are held at a time: one is computed while the next arrives
        if grouped and fits([*grouped[-1], t], shards / 2):
            grouped[-1].append(t)
        else:
            grouped.append([t])
    return tuple(map(tuple, grouped))


def _sizes(
    plan: Plan,
    offsets: tuple[int, ...],
    place: int,
    gather: Callable[[Plan, int, tuple[int, ...]], _Gathered],
) -> tuple[tuple[tuple[int, Heads], ...], ...]:
    fetched = (gather(plan, rank, offsets).parts[place] for rank in range(plan.world))
    sizes = (tuple((len(part.rows), part.heads) for part in parts) for parts in fetched)
    return tuple(dict.fromkeys(sizes))


def _rows(plan: Plan, rank: int, t: int) -> float:
    """Rows that ``rank`` fetches at offset t, as if of all heads."""
    parts = _gathered(plan, rank, (t,)).parts[0]
    return float(sum(len(part.rows) * plan.share(part.heads) for part in parts))


@dataclass(frozen=True)
class _Gathered:
    """What a rank fetches at some offsets: per offset its parts; blocks; and the tiles.

    ``own`` are the tiles of its own keys.
    """

    offsets: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]
    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...]
    own: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """A tile that reads keys of the ``place``-th offset's owner."""

    tile: Tile
    place: int
    source: int


@lru_cache(maxsize=4096)
def _gathered(plan: Plan, rank: int, offsets: tuple[int, ...]) -> _Gathered:
    reads = [
        _Read(tile, place, source)
        for place, t in enumerate(offsets)
        for source in [(rank - t) % plan.world]
        for tile in tiles_of(plan, rank, source)
    ]
    parts: list[list[Part]] = [[] for _ in offsets]
    blocks: list[Block] = []
    tiles: list[Tile] = []
    for heads in dict.fromkeys(read.tile.heads for read in reads):
        mine = [read for read in reads if read.tile.heads == heads]
        members: list[tuple[int, int]] = []
        placed: list[tuple[_Read, Rows]] = []
        row = 0
        for place, rows, readers in _pieces(mine):
            members.append((place, len(parts[place])))
            parts[place].append(Part(rows, heads, len(blocks), row))
            placed += [(read, _counted_from(read.tile.kv, rows, row)) for read in readers]
            row += len(rows)
        found = [replace(read.tile, kv=kv, block=len(blocks)) for read, kv in placed]
        tiles += merge_tiles(found) if len(offsets) > 1 else found
        blocks.append(Block(heads, tuple(members), row))
    own = tiles_of(plan, rank, rank)
    return _Gathered(offsets, tuple(map(tuple, parts)), tuple(blocks), tuple(tiles), own)


@lru_cache(maxsize=1024)
def tiles_of(plan: Plan, rank: int, owner: int) -> tuple[Tile, ...]:
    """The plan's tiles, but those without rows; kept."""
    return tuple(tile for tile in plan.tiles(rank, owner) if len(tile.q) and len(tile.kv))


@lru_cache(maxsize=1024)
def _waited_for(plan: Plan, rank: int, offsets: tuple[int, ...]) -> _Gathered:
    """As :func:`_gathered`; but where all queries see all keys, some of them wait and meet their
    rank's own keys and the fetched ones in one call. That is one tile less to merge, and with
    rounded tiles so much less error.

    Their own keys come with the others, as a step from the rank to itself (offset 0), which then
    every rank has.
    """
    plain = _gathered(plan, rank, offsets)
    if not any(_all_see_all(_gathered(plan, peer, offsets)) for peer in range(plan.world)):
        return plain
    offsets = (*offsets, 0)
    if not _all_see_all(plain):
        return replace(plain, offsets=offsets, parts=(*plain.parts, ()))
    (near,), (far,), (block,) = plain.own, plain.tiles, plain.blocks
    part = Part(near.kv, ALL_HEADS, 0, block.rows)
    waiting = near.q.count // _WAITING
    soon = Rows(near.q.start, near.q.count - waiting)
    late = Rows(near.q.start + soon.count, waiting)
    rows = block.rows + len(near.kv)
    return _Gathered(
        offsets,
        (*plain.parts, (part,)),
        (Block(ALL_HEADS, (*block.parts, (len(plain.parts), 0)), rows),),
        (replace(far, q=soon), replace(far, q=late, kv=Rows(0, rows))),
        (replace(near, q=soon),),
    )


def _all_see_all(found: _Gathered) -> bool:
    """Whether the same queries see all of their rank's keys and all of the fetched ones."""
    if not len(found.own) == len(found.tiles) == 1:
        return False
    (near,), (far,), (block,) = found.own, found.tiles, found.blocks
    dense = all(
        tile.mask == FULL
        and tile.heads == ALL_HEADS
        and tile.batch is None
        and _is_plain_band(tile)
        for tile in (near, far)
    )
    same = near.q == far.q and far.kv == Rows(0, block.rows)
    return dense and same and near.q.count >= _WAITING


def _pieces(reads: Iterable[_Read]) -> list[tuple[int, Rows, list[_Read]]]:
    """The rows that ``reads`` need, each once, in an order in which tiles can be merged.

    Rows that the same queries see stand together, by owner. Rows of one lattice (all unit-step
    rows, say) that overlap, or that touch and stay neighbours in that order, are one piece;
    repeated rows and segments are pieces as they are, once for each tile that names others.
    """
    pieces: list[tuple[int, Rows, list[_Read]]] = []
    alike: dict[tuple[int, tuple[int, int, int]], list[_Read]] = {}
    alone: dict[tuple[int, Rows], list[_Read]] = {}
    for read in reads:
        if read.tile.kv.repeat == 1 and not isinstance(read.tile.kv, Segments):
            alike.setdefault((read.place, read.tile.kv.lattice), []).append(read)
        else:
            alone.setdefault((read.place, read.tile.kv), []).append(read)
    for (place, _), members in alike.items():
        first = len(pieces)
        for read in sorted(members, key=lambda read: read.tile.kv):
            rows = read.tile.kv
            last = pieces[-1] if len(pieces) > first else None
            if last and rows.start < _end(last[1]):
                pieces[-1] = (place, hull(last[1], rows), [*last[2], read])
            else:
                pieces.append((place, rows, [read]))
    pieces += [(place, rows, members) for (place, rows), members in alone.items()]
    pieces.sort(key=_order)
    joined: list[tuple[int, Rows, list[_Read]]] = []
    for place, rows, members in pieces:
        if joined and joined[-1][0] == place and _touch(joined[-1][1], rows):
            joined[-1] = (place, hull(joined[-1][1], rows), [*joined[-1][2], *members])
        else:
            joined.append((place, rows, members))
    return joined


def _order(piece: tuple[int, Rows, list[_Read]]) -> tuple[int, ...]:
    _, rows, reads = piece
    first = min(read.tile.q.start for read in reads)
    return first, reads[0].source, rows.start, rows.count, rows.step


def _counted_from(kv: Rows, piece: Rows, row: int) -> Rows:
    """A tile's rows, given in the owner's shard, counted in the block where ``piece`` is at row."""
    if isinstance(kv, Segments):
        return Rows(row, kv.count)
    if kv.repeat == 1:
        return Rows(row + (kv.start - piece.start) // piece.step, kv.count)
    return Rows(row, kv.count, 1, kv.repeat, kv.count)


def _is_plain_band(tile: Tile) -> bool:
    """Whether a tile is a rectangle of neighbouring rows under a band."""
    return isinstance(tile.mask, Band) and tile.q.is_run and tile.kv.is_run


def _touch(a: Rows, b: Rows) -> bool:
    if isinstance(a, Segments) or isinstance(b, Segments):
        return False
    return a.repeat == b.repeat == 1 and a.lattice == b.lattice and _end(a) == b.start


def _end(rows: Rows) -> int:
    """The row that would be next on their lattice."""
    return rows.start + rows.count * rows.step

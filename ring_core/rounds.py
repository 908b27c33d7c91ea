"""What one rank does, round by round: which rows come from whom, and the tiles that read them.

At offset t of the ring every rank computes with the keys of the rank t before it and sends its own
to the rank t after it, straight from the owner; nobody forwards. A *round* is one offset, or a few
of them whose keys then stand in one buffer: queries that see keys of several owners meet them in
one kernel call, so there are fewer tiles to merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ring_core.masks import FULL, Band
from ring_core.plan import ALL_HEADS, Heads, Plan, Rows, Tile
from ring_core.tiling import merge_tiles

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
class Step:
    """One offset of the ring: who sends what to whom; at offset 0 a rank copies to itself.

    Attributes:
        offset: alike on every rank.
        parts: rows of ``source`` that this rank fetches.
        give: rows of its own that ``requester`` fetches.
        sizes: what the ranks fetch at this offset, as (rows, heads) of their parts, each once;
            nothing where every round is one offset.
        rounded: whether gradients, which take the same ways back, travel in the inputs' dtype;
            else in the accumulation dtype. Alike on every rank.
    """

    offset: int
    source: int
    parts: tuple[Part, ...]
    requester: int
    give: tuple[Part, ...]
    sizes: tuple[tuple[tuple[int, Heads], ...], ...]
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Fetched key rows that stand one behind the other, for some heads.

    ``parts`` are ``(step, part)``: places in the round's steps and in that step's parts.
    """

    heads: Heads
    parts: tuple[tuple[int, int], ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Round:
    """Steps whose keys arrive together, and the tiles that read them.

    In round 0 the keys are the rank's own: it has no steps and no blocks. The buffer of a round
    holds its blocks one behind the other.

    Attributes:
        index: its first offset. number: among this rank's rounds; ``is_last`` of them.
    """

    index: int
    number: int
    is_last: bool
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...]


def rounds(plan: Plan, rank: int, shards: int) -> tuple[Round, ...]:
    """What ``rank`` does, in order.

    Args:
        shards: how many shards' worth of fetched keys may be held at a time. 1: every round is one
            offset (held while the next one arrives), and a rank leaves out rounds in which it
            neither moves nor computes anything. More: offsets share rounds as far as that goes,
            and all ranks have equally many rounds.
    """
    done = [Round(0, 0, True, (), (), tuple(plan.tiles(rank, rank)))]
    for offsets in _offsets(plan, shards):
        steps = []
        mine = _gathered(plan, rank, offsets)
        for place, t in enumerate(offsets):
            source, requester = (rank - t) % plan.world, (rank + t) % plan.world
            give = _gathered(plan, requester, offsets).parts[place]
            sizes = _sizes(plan, t) if shards > 1 else ()
            steps.append(Step(t, source, mine.parts[place], requester, give, sizes))
        if shards > 1 or mine.tiles or any(step.give for step in steps):
            done[-1] = replace(done[-1], is_last=False)
            done.append(Round(offsets[0], len(done), True, tuple(steps), mine.blocks, mine.tiles))
    if shards > 1 and len(done) > 1:
        done[:2] = _some_wait(plan, rank, _offsets(plan, shards)[0], done[0], done[1])
    return tuple(done)


def elements_fetched(plan: Plan, rank: int, kv_heads: int) -> int:
    """(Row, KV head) pairs that ``rank`` gets in one forward; their gradients go back."""
    return sum(
        len(part.rows) * part.heads.count(kv_heads)
        for t in range(1, plan.world)
        for part in _gathered(plan, rank, (t,)).parts[0]
    )


def elements_sent(plan: Plan, rank: int, kv_heads: int) -> int:
    """(Row, KV head) pairs of its own keys that ``rank`` sends in one forward.

    Times ``(D + Dv) * batch * itemsize`` this is the bytes that a communicator counts.
    """
    return sum(
        len(part.rows) * part.heads.count(kv_heads)
        for t in range(1, plan.world)
        for part in _gathered(plan, (rank + t) % plan.world, (t,)).parts[0]
    )


def _some_wait(
    plan: Plan, rank: int, offsets: tuple[int, ...], own: Round, first: Round
) -> tuple[Round, Round]:
    """Where all queries see all keys, let some wait and meet their rank's own keys and the first
    fetched ones in one call: one tile less to merge, and with rounded tiles so much less error.

    Their own keys come with the others, as a step from the rank to itself (offset 0).
    """
    fetched = [_own_part(plan, peer, offsets) for peer in range(plan.world)]
    if not any(fetched):
        return own, first
    sizes = tuple(dict.fromkeys(tuple((len(p.rows), p.heads) for p in parts) for parts in fetched))
    mine = fetched[rank]
    step = Step(0, rank, mine, rank, mine, sizes)
    if not mine:
        return own, replace(first, steps=(*first.steps, step))
    (near,), (far,), (block,) = own.tiles, first.tiles, first.blocks
    soon = Rows(near.q.start, near.q.count - near.q.count // _WAITING)
    late = Rows(near.q.start + soon.count, near.q.count // _WAITING)
    rows = block.rows + len(near.kv)
    blocks = (replace(block, parts=(*block.parts, (len(first.steps), 0)), rows=rows),)
    tiles = replace(far, q=soon), replace(far, q=late, kv=Rows(0, rows))
    return (
        replace(own, tiles=(replace(near, q=soon),)),
        replace(first, steps=(*first.steps, step), blocks=blocks, tiles=tiles),
    )


@lru_cache(maxsize=1024)
def _own_part(plan: Plan, rank: int, offsets: tuple[int, ...]) -> tuple[Part, ...]:
    """The rank's own keys as a part behind those fetched at ``offsets``, if some queries wait."""
    own, fetched = plan.tiles(rank, rank), _gathered(plan, rank, offsets)
    if len(own) != 1 or len(fetched.tiles) != 1:
        return ()
    (near,), (far,), (block,) = own, fetched.tiles, fetched.blocks
    dense = all(
        tile.mask == FULL and tile.heads == ALL_HEADS and tile.batch is None and is_plain_band(tile)
        for tile in (near, far)
    )
    same = near.q == far.q and far.kv == Rows(0, block.rows) and near.q.count >= _WAITING
    return (Part(near.kv, ALL_HEADS, 0, block.rows),) if dense and same else ()


@lru_cache(maxsize=64)
def _offsets(plan: Plan, shards: int) -> tuple[tuple[int, ...], ...]:
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


@lru_cache(maxsize=1024)
def _sizes(plan: Plan, t: int) -> tuple[tuple[tuple[int, Heads], ...], ...]:
    fetched = (_gathered(plan, rank, (t,)).parts[0] for rank in range(plan.world))
    sizes = (tuple((len(part.rows), part.heads) for part in parts) for parts in fetched)
    return tuple(dict.fromkeys(sizes))


def _rows(plan: Plan, rank: int, t: int) -> float:
    """Rows that ``rank`` fetches at offset t, as if of all heads."""
    return sum(len(part.rows) / part.heads.step for part in _gathered(plan, rank, (t,)).parts[0])


@dataclass(frozen=True)
class _Gathered:
    """What ``rank`` fetches at some offsets: per offset its parts; blocks; and the tiles."""

    parts: tuple[tuple[Part, ...], ...]
    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...]


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
        for tile in plan.tiles(rank, source)
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
        tiles += _merged(found) if len(offsets) > 1 else found
        blocks.append(Block(heads, tuple(members), row))
    return _Gathered(tuple(map(tuple, parts)), tuple(blocks), tuple(tiles))


def _pieces(reads: Iterable[_Read]) -> list[tuple[int, Rows, list[_Read]]]:
    """The rows that ``reads`` need, each once, in an order in which tiles can be merged.

    Rows that the same queries see stand together, by owner. Unit-step rows that overlap, or that
    touch and stay neighbours in that order, are one piece; strided and repeated rows are pieces as
    they are.
    """
    pieces: list[tuple[int, Rows, list[_Read]]] = []
    solid: dict[int, list[_Read]] = {}
    packed: dict[tuple[int, Rows], list[_Read]] = {}
    for read in reads:
        if _is_solid(read.tile.kv):
            solid.setdefault(read.place, []).append(read)
        else:
            packed.setdefault((read.place, read.tile.kv), []).append(read)
    for place, members in solid.items():
        for read in sorted(members, key=lambda read: read.tile.kv):
            rows = Rows(read.tile.kv.start, read.tile.kv.count)
            last = pieces[-1] if pieces and pieces[-1][0] == place else None
            if last and rows.start < last[1].start + last[1].count:
                pieces[-1] = (place, _span(last[1], rows), [*last[2], read])
            else:
                pieces.append((place, rows, [read]))
    pieces += [(place, rows, members) for (place, rows), members in packed.items()]
    pieces.sort(key=lambda one: (min(r.tile.q.start for r in one[2]), one[2][0].source, one[1]))
    joined: list[tuple[int, Rows, list[_Read]]] = []
    for place, rows, members in pieces:
        if joined and joined[-1][0] == place and _touch(joined[-1][1], rows):
            joined[-1] = (place, _span(joined[-1][1], rows), [*joined[-1][2], *members])
        else:
            joined.append((place, rows, members))
    return joined


def _counted_from(kv: Rows, piece: Rows, row: int) -> Rows:
    """A tile's rows, given in the owner's shard, counted in the block where ``piece`` is at row."""
    if _is_solid(kv):
        return Rows(row + kv.start - piece.start, kv.count)
    return Rows(row, kv.count, 1, kv.repeat, kv.count)


def _merged(tiles: Sequence[Tile]) -> list[Tile]:
    """Tiles of one block, neighbours joined where their union is a band."""
    plain = [tile for tile in tiles if is_plain_band(tile)]
    done = [tile for tile in tiles if not is_plain_band(tile)]
    for batch in dict.fromkeys(tile.batch for tile in plain):
        done += merge_tiles([tile for tile in plain if tile.batch == batch])
    return done


def is_plain_band(tile: Tile) -> bool:
    """Whether a tile is a rectangle of neighbouring rows under a band."""
    return isinstance(tile.mask, Band) and _is_solid(tile.q) and _is_solid(tile.kv)


def _is_solid(rows: Rows) -> bool:
    return rows.repeat == 1 and (rows.step == 1 or rows.count == 1)


def _touch(a: Rows, b: Rows) -> bool:
    return _is_solid(a) and _is_solid(b) and a.start + a.count == b.start


def _span(a: Rows, b: Rows) -> Rows:
    stop = max(a.start + a.count, b.start + b.count)
    return Rows(a.start, stop - a.start)

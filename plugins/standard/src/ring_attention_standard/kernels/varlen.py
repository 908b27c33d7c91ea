"""Several tiles in one call of a kernel that takes sequences of different lengths side by side.

Starting a kernel takes the processor 0.1 ms and more. Packed documents are many small tiles, which
the GPU would compute in less.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ring_core.masks import Band, Diagonal
from ring_core.plan import Rows, Tile


def joined(tiles: Iterable[Tile], kind: Callable[[int, int, Band], Hashable | None]) -> list[Tile]:
    """Tiles that one call can compute, as one under a :class:`Diagonal`; the others as they are.

    Args:
        kind: what (rows, keys, band) of one call's tiles must have in common; None: alone.
    """
    done: list[Tile] = []
    alike: dict[Hashable, list[Tile]] = {}
    for tile in tiles:
        what = None
        if isinstance(tile.mask, Band) and tile.q.is_run and tile.kv.is_run:
            what = kind(tile.q.count, tile.kv.count, tile.mask)
        if what is None:
            done.append(tile)
        else:
            alike.setdefault((what, tile.block, tile.heads, tile.batch), []).append(tile)
    for members in alike.values():
        calls: list[list[Tile]] = []
        for tile in sorted(members, key=lambda tile: (tile.q.start, tile.kv.start)):
            open_calls = (call for call in calls if _is_behind(call[-1], tile))
            call = next(open_calls, None)
            if call is None:
                calls.append([tile])
            else:
                call.append(tile)
        done += map(_one, calls)
    return done


@dataclass(frozen=True)
class Ends:
    """Where the sequences of one call end: int32 [sequences + 1] on the GPU, and the longest.

    Rows and keys outside of a mask's pieces are sequences too, with nothing on the other side.
    """

    q: Tensor
    kv: Tensor
    longest_q: int
    longest_kv: int
    some_see_nothing: bool


@lru_cache(maxsize=256)
def ends_of(mask: Diagonal, nq: int, nk: int, device: torch.device) -> Ends:
    """The sequences of ``nq`` rows and ``nk`` keys under ``mask``."""
    q_ends, kv_ends = [0], [0]
    for q, kv, _ in (*mask.pieces, (range(nq, nq), range(nk, nk), None)):
        if q.start > q_ends[-1] or kv.start > kv_ends[-1]:
            # First rows without keys, then keys without rows.
            q_ends += [q.start, q.start]
            kv_ends += [kv_ends[-1], kv.start]
        if q:
            q_ends.append(q.stop)
            kv_ends.append(kv.stop)
    on_gpu = (torch.tensor(x, dtype=torch.int32, device=device) for x in (q_ends, kv_ends))
    longest = (max(b - a for a, b in pairwise(x)) for x in (q_ends, kv_ends))
    return Ends(*on_gpu, *longest, sum(len(q) for q, _, _ in mask.pieces) < nq)


def row_by_row(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``call`` on each batch row of tensors [B, ...], its results put together again."""
    rows = [call(*(x[b] for x in tensors)) for b in range(tensors[0].shape[0])]
    if len(rows) == 1:
        return tuple(x.unsqueeze(0) for x in rows[0])
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _is_behind(a: Tile, b: Tile) -> bool:
    return a.q.start + a.q.count <= b.q.start and a.kv.start + a.kv.count <= b.kv.start


def _one(call: list[Tile]) -> Tile:
    if len(call) == 1:
        return call[0]
    q, kv = (
        Rows(first.start, last.start + last.count - first.start)
        for first, last in ((call[0].q, call[-1].q), (call[0].kv, call[-1].kv))
    )
    pieces = tuple(
        (_counted(tile.q, q), _counted(tile.kv, kv), tile.mask)
        for tile in call
        if isinstance(tile.mask, Band)
    )
    return replace(call[0], q=q, kv=kv, mask=Diagonal(pieces))


def _counted(rows: Rows, whole: Rows) -> range:
    return range(rows.start - whole.start, rows.start - whole.start + rows.count)

"""Several tiles in one call of a kernel that takes sequences of different lengths side by side.

Starting a kernel takes the processor 0.1 ms and more. Packed documents are many small tiles, which
the GPU would compute in less. Such a call takes one batch row; where there are more of those than
tiles, the tiles are computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ring_attention_standard.kernels.heads import ready
from ring_core.errors import KernelError
from ring_core.masks import Band, Diagonal, Mask
from ring_core.plan import ALL_HEADS, Rows, Segments, Tile
from ring_core.protocols import AttentionKernel

Kind = Callable[[int, int, Band], Hashable | None]


def joined(tiles: Iterable[Tile], kind: Kind) -> list[Tile]:
    """Tiles that one call can compute, as one under a :class:`Diagonal`; the others as they are.

    Args:
        kind: what (rows, keys, band) of one call's tiles must have in common; None: alone.
    """
    done: list[Tile] = []
    runs: list[Tile] = []
    strided: list[Tile] = []
    for tile in tiles:
        if _what(tile, kind) is None:
            done.append(tile)
        else:
            as_they_lie = tile.q.is_run and tile.kv.is_run and tile.heads == ALL_HEADS
            (runs if as_they_lie else strided).append(tile)
    done += (_hull(call) for call in _calls(runs, kind, _near))
    # Documents begin anywhere, so what their segments keep lies on no common lattice, and seldom
    # do all phases of heads keep equally many rows.
    apart = _calls((one for tile in strided for one in _phases(tile)), kind, _behind)
    return [*done, *(strided if len(strided) <= len(apart) else map(_gathered, apart))]


def _what(tile: Tile, kind: Kind) -> Hashable | None:
    if not isinstance(tile.mask, Band) or tile.q.repeat != 1 or tile.kv.repeat != 1:
        return None
    return kind(tile.q.count, tile.kv.count, tile.mask)


def _phases(tile: Tile) -> Iterable[Tile]:
    """A tile of several phases of heads by phase, where its keys are this rank's too: in what was
    fetched, a block has the heads that the tile names."""
    if tile.q.slant != tile.kv.slant:
        return (tile,)
    return (tile.only(range(p, p + 1)) for p in range(tile.heads.phases))


def _calls(
    tiles: Iterable[Tile], kind: Kind, goes_on: Callable[[Sequence[Tile], Tile], bool]
) -> list[list[Tile]]:
    """Which tiles one call each can compute, in ascending order."""
    alike: dict[Hashable, list[Tile]] = {}
    for tile in tiles:
        key = _what(tile, kind), tile.block, tile.heads, tile.batch, tile.q.slant, tile.kv.slant
        alike.setdefault(key, []).append(tile)
    found = []
    for members in alike.values():
        calls: list[list[Tile]] = []
        for tile in sorted(members, key=lambda tile: (tile.q.start, tile.kv.start)):
            call = next((call for call in calls if goes_on(call, tile)), None)
            if call is None:
                calls.append([tile])
            else:
                call.append(tile)
        found += calls
    return found


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


def ends_of(mask: Diagonal, nq: int, nk: int, device: torch.device) -> Ends:
    """The sequences of ``nq`` rows and ``nk`` keys under ``mask``.

    Raises:
        KernelError: a CUDA graph is being captured, and they are asked for for the first time.
    """
    ends = _ends(mask, nq, nk, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(ends)  # replays read them, whatever the cache forgets
    return ends


_captured: list[Ends] = []


@lru_cache(maxsize=256)
def _ends(mask: Diagonal, nq: int, nk: int, device: torch.device) -> Ends:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "the ends of these documents must be copied to the GPU, which cannot be done while a "
            "CUDA graph is captured: run one forward and backward with the same plan first"
        )
    q_ends, kv_ends = [0], [0]
    for q, kv, _ in (*mask.pieces, (range(nq, nq), range(nk, nk), None)):
        if q.start > q_ends[-1] or kv.start > kv_ends[-1]:
            # First rows without keys, then keys without rows.
            q_ends += [q.start, q.start]
            kv_ends += [kv_ends[-1], kv.start]
        if q:
            q_ends.append(q.stop)
            kv_ends.append(kv.stop)
    q_there, kv_there = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (q_ends, kv_ends)
    )
    longest_q, longest_kv = (max(b - a for a, b in pairwise(x)) for x in (q_ends, kv_ends))
    see_nothing = sum(len(q) for q, _, _ in mask.pieces) < nq
    return Ends(q_there, kv_there, longest_q, longest_kv, see_nothing)


def forward(
    kernel: AttentionKernel,
    call: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What ``kernel.forward`` gives for a tile, under a band or under a :class:`Diagonal`.

    Args:
        call: ``call(q, k, v, ends)`` for heads of ``size``: tensors [B, rows, heads, D] and None,
            or [rows, heads, D] of sequences side by side and their :class:`Ends`.
    """
    if isinstance(mask, Diagonal) and q.shape[0] > len(mask.pieces):
        return _forward_apart(kernel, q, k, v, mask, scale)
    out, lse = _call(call, mask, q.shape[1], k.shape[1], *(ready(x, size) for x in (q, k, v)))
    return out[..., : v.shape[-1]], lse


def backward(
    kernel: AttentionKernel,
    call: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``kernel.backward`` gives; ``call(dout, q, k, v, out, lse, ends)`` as above."""
    if isinstance(mask, Diagonal) and q.shape[0] > len(mask.pieces):
        return _backward_apart(kernel, dout, q, k, v, out, lse, mask, scale, deterministic)
    inputs = (ready(x, size) for x in (dout, q, k, v, out))
    dq, dk, dv = _call(call, mask, q.shape[1], k.shape[1], *inputs, lse.contiguous())
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _call(
    call: Callable[..., tuple[Tensor, ...]], mask: Mask, nq: int, nk: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    if not isinstance(mask, Diagonal):
        return call(*tensors, None)
    ends = ends_of(mask, nq, nk, tensors[0].device)
    return _row_by_row(lambda *row: call(*row, ends), *tensors)


def _forward_apart(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, mask: Diagonal, scale: float
) -> tuple[Tensor, Tensor]:
    """``kernel.forward`` under ``mask``, piece by piece."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
    for rows, keys, band in mask.pieces:
        x, y = _slice(rows), _slice(keys)
        out[:, x], lse[:, :, x] = kernel.forward(
            q[:, x], k[:, y], v[:, y], band, scale=scale, dropout=None
        )
    return out, lse


def _backward_apart(
    kernel: AttentionKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Diagonal,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kernel.backward`` under ``mask``, piece by piece."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for rows, keys, band in mask.pieces:
        x, y = _slice(rows), _slice(keys)
        dq[:, x], dk[:, y], dv[:, y] = kernel.backward(
            dout[:, x],
            q[:, x],
            k[:, y],
            v[:, y],
            out[:, x],
            lse[:, :, x],
            band,
            scale=scale,
            dropout=None,
            deterministic=deterministic,
        )
    return dq, dk, dv


def _row_by_row(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``call`` on each batch row of tensors [B, ...], its results put together again."""
    rows = [call(*(x[b] for x in tensors)) for b in range(tensors[0].shape[0])]
    if len(rows) == 1:
        return tuple(x.unsqueeze(0) for x in rows[0])
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _near(call: Sequence[Tile], tile: Tile) -> bool:
    """Whether ``tile`` lies behind a call's tiles, and not so far that most rows would be empty."""
    for first, rows, held in (
        (call[0].q, tile.q, sum(one.q.count for one in call)),
        (call[0].kv, tile.kv, sum(one.kv.count for one in call)),
    ):
        if rows.start + rows.count - first.start > 2 * (held + rows.count):
            return False
    return _behind(call, tile)


def _behind(call: Sequence[Tile], tile: Tile) -> bool:
    """Whether ``tile`` shares no row or key with a call's tiles, for no head."""
    return not (tile.q.slant or tile.kv.slant) and all(
        last.extent(1).stop <= rows.start
        for last, rows in ((call[-1].q, tile.q), (call[-1].kv, tile.kv))
    )


def _hull(call: Sequence[Tile]) -> Tile:
    """Tiles of neighbouring rows as one, with what lies between them."""
    if len(call) == 1:
        return call[0]
    q, kv = (
        Rows(first.start, last.start + last.count - first.start)
        for first, last in ((call[0].q, call[-1].q), (call[0].kv, call[-1].kv))
    )
    starts = [(tile.q.start - q.start, tile.kv.start - kv.start) for tile in call]
    return _as_one(call, q, kv, starts)


def _gathered(call: Sequence[Tile]) -> Tile:
    """Tiles of any rows as one, without what lies between them."""
    if len(call) == 1:
        return call[0]
    sides = [tile.q for tile in call], [tile.kv for tile in call]
    q, kv = (
        Segments.of([range(one.start, one.extent(1).stop, one.step) for one in side])
        for side in sides
    )
    rows, keys = (accumulate((one.count for one in side), initial=0) for side in sides)
    return _as_one(call, q, kv, zip(rows, keys, strict=True))


def _as_one(call: Sequence[Tile], q: Rows, kv: Rows, starts: Iterable[tuple[int, int]]) -> Tile:
    """Tiles of a call as one of rows ``q`` and ``kv``, among which each's start there."""
    pieces = tuple(
        (range(row, row + tile.q.count), range(key, key + tile.kv.count), tile.mask)
        for tile, (row, key) in zip(call, starts, strict=False)
        if isinstance(tile.mask, Band)
    )
    return replace(call[0], q=q, kv=kv, mask=Diagonal(pieces))


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)

"""The engine: runs any plan, forward and backward. It knows tiles, and nothing of masks or layouts.

Forward: fetch the next round's keys while this round's tiles are computed.
Backward: the same rounds again; each tile's gradient is a flash backward given the merged ``out``
and ``lse``, and gradients of fetched keys go straight home to their owner, who adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ring_core.accumulation import Merge, Place, Sum
from ring_core.copying import shaped
from ring_core.dropout import Dropout
from ring_core.plan import ALL_HEADS, Tile
from ring_core.program import Program
from ring_core.protocols import Communicator, Pending
from ring_core.rounds import Round
from ring_core.rows import grouped, window
from ring_core.softmax import gradient_dtype


@dataclass(frozen=True)
class Settings:
    """What a call fixes beside its tensors."""

    scale: float
    overlap: bool
    deterministic: bool
    dropout: float = 0.0
    seed: int = 0
    first_head: int = 0
    """Which of all query heads the tensors' first one is."""
    tag: int = 0
    """Of this call's messages, forward or backward; see :func:`ring_core.agreement.tag`."""


def forward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    *,
    choice: Any = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries.

    Args:
        q: [B, S, H, D]. k: [B, Skv, K, D]. v: [B, Skv, K, Dv]: this rank's shards.
        communicator: None where the plan fetches nothing (one rank).
        choice: what masks are filled with for this call, if anything.

    Returns:
        out [B, S, H, Dv] in q's dtype and lse [B, H, S] in the accumulation dtype.
    """
    merged = Merge(q, v.shape[-1], k.shape[2])
    attend_into(merged, program, q, k, v, communicator, settings, choice=choice)
    return merged.result()


def attend_into(
    merged: Merge,
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    *,
    choice: Any = None,
) -> None:
    """Merge attention of this rank's queries over the program's keys; see :func:`forward`."""
    for one, keys, values in with_keys(program.rounds, k, v, communicator, settings):
        for tile in one.tiles:
            at = _At(tile, one, k.shape[2])
            with torch.profiler.record_function(f"ring/forward/{at.name}"):
                out, lse = program.kernel.forward(
                    at.q(q),
                    at.kv(keys[tile.block]),
                    at.kv(values[tile.block]),
                    tile.mask.filled(choice, tile.batch),
                    scale=settings.scale,
                    dropout=_dropout(program, one, tile, q, k, settings),
                )
                merged.add(at.queries, out, lse)
                del out  # the next tile's must not be made beside it


def backward(
    program: Program,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    *,
    dlse: Tensor | None = None,
    need_kv: bool = True,
    kv_dtype: torch.dtype | None = None,
    choice: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's shards, in their dtype.

    Args:
        dout: [B, S, H, Dv]. out, lse: what :func:`forward` gave.
        dlse: [B, H, S], gradient of lse, if it was used.
        need_kv: False where keys and values are frozen on every rank: nothing goes home.
        kv_dtype: of dk and dv, where they are still to be added up.
        choice: as in :func:`forward`.
    """
    dout, out = with_column(dout, out, dlse)
    dq, dk, dv = (Sum.of(x, k.shape[2]) for x in (q, k, v))
    homeward = differentiate_into(
        (dq, dk, dv),
        program,
        dout,
        q,
        k,
        v,
        out,
        lse,
        communicator,
        settings,
        need_kv=need_kv,
        choice=choice,
    )
    own = dq.result()  # while the last gradients are on their way
    if homeward:
        homeward.add_to(dk, dv)
    gradients = own, dk.result(kv_dtype), dv.result(kv_dtype)
    if homeward:
        homeward.pending.release()
    return gradients


def with_column(dout: Tensor, out: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dout`` and ``out`` by which a flash backward goes through lse as well."""
    if dlse is not None:
        # dS = P * (dout.v - dout.out + dlse): one more column, dout = dlse, out = -1, v = 0. Not by
        # way of v: dropout drops what comes from there, and lse is what it is before that.
        dout = torch.cat([dout, dlse.to(dout.dtype).transpose(1, 2).unsqueeze(-1)], dim=-1)
        out = F.pad(out, (0, 1), value=-1.0)
    return dout, out


def differentiate_into(
    sums: tuple[Sum, Sum, Sum],
    program: Program,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    *,
    need_kv: bool = True,
    choice: Any = None,
) -> Homeward | None:
    """Add the gradients of the program's tiles to those of this rank's q, k and v.

    Args:
        dout, out: of :func:`with_column`.

    Returns:
        Gradients of k and v that are still on their way here, if any.
    """
    dq, dk, dv = sums
    kv_heads, columns = k.shape[2], out.shape[-1] - v.shape[-1]
    homeward: Homeward | None = None
    walk = with_keys(program.rounds, k, v, communicator, settings, gives_back=need_kv)
    for one, keys, values in walk:
        found = _Gradients(one, k, v)
        for tile in one.tiles:
            at = _At(tile, one, kv_heads)
            with torch.profiler.record_function(f"ring/backward/{at.name}"):
                value = at.kv(values[tile.block])
                tile_dq, tile_dk, tile_dv = program.kernel.backward(
                    at.q(dout),
                    at.q(q),
                    at.kv(keys[tile.block]),
                    F.pad(value, (0, columns)) if columns else value,
                    at.q(out),
                    at.q(lse.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2),
                    tile.mask.filled(choice, tile.batch),
                    scale=settings.scale,
                    dropout=_dropout(program, one, tile, q, k, settings),
                    deterministic=settings.deterministic,
                )
                dq.add(at.queries, tile_dq)
                if need_kv and one.index == 0:
                    dk.add(at.keys, tile_dk)
                    dv.add(at.keys, tile_dv[..., : v.shape[-1]])
                elif need_kv:
                    found.add(at, tile_dk, tile_dv[..., : v.shape[-1]])
                del tile_dq, tile_dk, tile_dv  # the next tile's must not be made beside them
        if need_kv and one.index != 0:
            assert communicator is not None
            if homeward:  # it came while this round was computed
                homeward.add_to(dk, dv)
                dk.settle()
                dv.settle()
                homeward.pending.release()
            pending = communicator.give_back(one, found.for_owners(), (k, v), settings.tag)
            homeward = Homeward(one, pending)
        del found  # what is not on its way must not stand beside the next round's
    return homeward


class _Gradients:
    """Gradients of a round's fetched keys and values: for each block the sum over tiles."""

    def __init__(self, one: Round, k: Tensor, v: Tensor) -> None:
        self._round, self._like = one, (k, v)
        self._sums = [
            [
                Sum((x.shape[0], block.rows, heads, x.shape[3]), x.dtype, x.device, heads)
                for x in (k, v)
            ]
            for block in one.blocks
            for heads in [block.heads.count(k.shape[2])]
        ]

    def add(self, at: _At, dk: Tensor, dv: Tensor) -> None:
        """Add a tile's gradients, as the kernel gave them."""
        for total, gradient in zip(self._sums[at.tile.block], (dk, dv), strict=True):
            total.add(at.keys, gradient)

    def for_owners(self) -> list[list[tuple[Tensor, ...]]]:
        """For each step and each of its parts: dk and dv [B, rows, heads, D]."""
        return [
            [
                tuple(
                    total.rows(range(part.row, part.row + len(part.rows)), dtype)
                    for total in self._sums[part.block]
                )
                for part in step.parts
            ]
            for step in self._round.steps
            for dtype in [gradient_dtype(self._like[0].dtype, step.rounded)]
        ]


@dataclass
class Homeward:
    """Gradients on their way: ours to the owners, others' for our keys to us."""

    one: Round
    pending: Pending

    def add_to(self, dk: Sum, dv: Sum) -> None:
        for step, received in zip(self.one.steps, self.pending.wait(), strict=True):
            for part, (part_dk, part_dv) in zip(step.give, received, strict=True):
                place = Place(part.rows, part.heads)
                dk.add(place, part_dk, borrowed=True)
                dv.add(place, part_dv, borrowed=True)


def with_keys(
    rounds: Sequence[Round],
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    gives_back: bool = False,
) -> Iterator[tuple[Round, Sequence[Tensor], Sequence[Tensor]]]:
    """Each round with its keys and values, block by block; the next ones are already on their way.

    Transports match messages in the order in which they were started, so all ranks keep to one
    order, whichever rounds they leave out: keys of the next offset, then gradients of this one.
    Where gradients go back, keys of an offset further away therefore start only after them.
    """

    def fetch(one: Round) -> Pending:
        assert communicator is not None
        return communicator.fetch(one, (k, v), settings.tag)

    ahead: Pending | None = None
    reached = 0  # the last offset of this round
    for one, following in zip_longest(rounds, rounds[1:]):
        reached = max([reached, *(step.offset for step in one.steps)])
        early = (
            settings.overlap and following and not (gives_back and following.index > reached + 1)
        )
        pending = None if one.index == 0 else ahead or fetch(one)
        ahead = None
        received = pending.wait() if pending else [(k, v)]
        if early:
            ahead = fetch(following)
        yield one, [block[0] for block in received], [block[1] for block in received]
        if pending:
            pending.release()
        if settings.overlap and following and not early:
            ahead = fetch(following)


class _At:
    """Where a tile's rows lie in tensors [B, S, H, D] and [B, S, K, D]."""

    def __init__(self, tile: Tile, one: Round, kv_heads: int) -> None:
        self.tile, self._kv_heads = tile, kv_heads
        self.name = f"round{one.index}/{len(tile.q)}x{len(tile.kv)}"
        self.queries = Place(tile.q, tile.heads, tile.batch)
        # blocks hold only their heads
        self.keys = Place(tile.kv, tile.heads if one.index == 0 else ALL_HEADS, tile.batch)

    def q(self, x: Tensor) -> Tensor:
        """The tile's query rows as a kernel takes them: [b*repeat, count, k*G, D]."""
        run = self.queries.run
        if run is not None:
            return _apart(x[:, run.start : run.stop], self.tile.q.repeat)
        found = _window(grouped(x, self._kv_heads), self.queries)
        return shaped(found, (-1, self.tile.q.count, prod(found.shape[3:6]), x.shape[-1]))

    def kv(self, x: Tensor) -> Tensor:
        """The tile's key rows as a kernel takes them: [b*repeat, count, k, D]."""
        run = self.keys.run
        if run is not None:
            return _apart(x[:, run.start : run.stop], self.tile.kv.repeat)
        found = _window(x, self.keys)
        return shaped(found, (-1, self.tile.kv.count, prod(found.shape[3:5]), x.shape[-1]))


def _apart(x: Tensor, repeat: int) -> Tensor:
    """[b, repeat*count, ...] as [b*repeat, count, ...]."""
    return x if repeat == 1 else torch.unflatten(x, 1, (repeat, -1)).flatten(0, 1)


def _window(x: Tensor, place: Place) -> Tensor:
    return window(x, place.rows, place.heads, place.batch)


def _dropout(
    program: Program, one: Round, tile: Tile, q: Tensor, k: Tensor, settings: Settings
) -> Dropout | None:
    """The tile's global coordinates, where the call drops weights."""
    if not settings.dropout:
        return None
    plan, device = program.plan, q.device
    own = plan.queries.positions(program.rank)
    if one.index == 0:
        theirs = plan.keys.positions(program.rank)
    else:
        found = []
        for place, part in one.blocks[tile.block].parts:
            step = one.steps[place]
            found.append(plan.keys.positions(step.source)[step.parts[part].rows.indices()])
        theirs = torch.cat(found)
    batch = tile.batch if tile.batch is not None else range(q.shape[0])
    kv_heads = tile.heads.indices(k.shape[2])
    group = q.shape[2] // k.shape[2]
    repeats = (len(batch), tile.q.repeat)
    return Dropout(
        settings.dropout,
        settings.seed,
        batch=torch.tensor(batch, device=device).repeat_interleave(tile.q.repeat),
        heads=torch.tensor(
            [settings.first_head + h * group + g for h in kv_heads for g in range(group)],
            device=device,
        ),
        q=own[tile.q.indices()]
        .to(device)
        .view(1, tile.q.repeat, -1)
        .expand(*repeats, -1)
        .flatten(0, 1),
        kv=theirs[tile.kv.indices()]
        .to(device)
        .view(1, tile.kv.repeat, -1)
        .expand(*repeats, -1)
        .flatten(0, 1),
    )


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Arithmetic in the dtypes that the engine chose, whatever autocast says."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield

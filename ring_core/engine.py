"""The engine: runs any plan, forward and backward. It knows tiles, and nothing of masks or layouts.

Forward: fetch the next step's keys while this step's tiles are computed and merged.
Backward: the same steps again; each tile's gradient is a flash backward given the merged ``out``
and ``lse``, and gradients of fetched keys go straight home to their owner, who adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

from ring_core.dropout import Dropout
from ring_core.plan import Plan, Rows, Step, Tile
from ring_core.protocols import AttentionKernel, Communicator, Pending
from ring_core.rows import add_parts_, flat_zeros, grouped, part_views, select
from ring_core.softmax import accumulation_dtype, merge_


@dataclass(frozen=True)
class Program:
    """A rank's steps with its tiles lowered to what one kernel computes directly."""

    plan: Plan
    rank: int
    kernel: AttentionKernel
    steps: tuple[Step, ...]

    @staticmethod
    def build(plan: Plan, rank: int, steps: Sequence[Step], kernel: AttentionKernel) -> Program:
        """Lower every tile of the rank's ``steps``."""
        lowered = tuple(
            replace(step, tiles=tuple(piece for tile in step.tiles for piece in kernel.lower(tile)))
            for step in steps
        )
        return Program(plan, rank, kernel, lowered)


@dataclass(frozen=True)
class Settings:
    """What a call fixes beside its tensors."""

    scale: float
    overlap: bool
    deterministic: bool
    dropout: float = 0.0
    seed: int = 0
    tag: int = 0
    """Of this call's messages, forward or backward; see :func:`ring_core.agreement.tag`."""


def forward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries.

    Args:
        q: [B, S, H, D]. k: [B, Skv, K, D]. v: [B, Skv, K, Dv]: this rank's shards.
        communicator: None where the plan fetches nothing (one rank).

    Returns:
        out [B, S, H, Dv] and lse [B, H, S], both in the accumulation dtype.
    """
    batch, rows, heads, _ = q.shape
    kv_heads = k.shape[2]
    wide = accumulation_dtype(q.dtype)
    out = torch.zeros(batch, rows, heads, v.shape[-1], dtype=wide, device=q.device)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=wide, device=q.device)
    # One form for all: [B, S, K, H/K, D], with D = 1 for lse.
    q_, out_ = grouped(q, kv_heads), grouped(out, kv_heads)
    lse_ = grouped(lse.transpose(1, 2).unsqueeze(-1), kv_heads)
    for step, keys, values in _with_keys(program.steps, k, v, communicator, settings):
        for tile in step.tiles:
            at = _At(tile)
            with torch.profiler.record_function(f"ring/forward/step{step.index}"):
                tile_out, tile_lse = program.kernel.forward(
                    at.q(q_),
                    at.kv(keys[tile.part], step),
                    at.kv(values[tile.part], step),
                    tile.mask,
                    scale=settings.scale,
                    dropout=_dropout(program, step, tile, q, k, settings),
                )
                target = at.window(out_)
                merge_(
                    target,
                    at.window(lse_),
                    at.back(tile_out, target),
                    at.back(tile_lse.transpose(1, 2).unsqueeze(-1), at.window(lse_)),
                )
                del tile_out  # the next tile's must not be made beside it
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's shards, in the accumulation dtype.

    Args:
        dout: [B, S, H, Dv]. out, lse: what :func:`forward` gave, out in q's dtype or wider.
        dlse: [B, H, S], gradient of lse, if it was used.
        need_kv: False where keys and values are frozen on every rank: nothing goes home.
    """
    if dlse is not None:
        # dS = P * (dout.v - dout.out + dlse): one more column, v = 1, dout = dlse, out = 0.
        dout = torch.cat([dout, dlse.to(dout.dtype).transpose(1, 2).unsqueeze(-1)], dim=-1)
        out = F.pad(out, (0, 1))
    kv_heads = k.shape[2]
    wide = accumulation_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    q_, dq_, out_, dout_ = (grouped(x, kv_heads) for x in (q, dq, out, dout))
    lse_ = grouped(lse.transpose(1, 2).unsqueeze(-1), kv_heads)
    homeward: _Homeward | None = None
    walk = _with_keys(program.steps, k, v, communicator, settings, gives_back=need_kv)
    for step, keys, values in walk:
        sums = _Gradients(step, k, wide, own=dk), _Gradients(step, v, wide, own=dv)
        for tile in step.tiles:
            at = _At(tile)
            with torch.profiler.record_function(f"ring/backward/step{step.index}"):
                value = at.kv(values[tile.part], step)
                tile_dq, tile_dk, tile_dv = program.kernel.backward(
                    at.q(dout_),
                    at.q(q_),
                    at.kv(keys[tile.part], step),
                    value if dlse is None else F.pad(value, (0, 1), value=1.0),
                    at.q(out_),
                    at.q(lse_).squeeze(-1).transpose(1, 2),
                    tile.mask,
                    scale=settings.scale,
                    dropout=_dropout(program, step, tile, q, k, settings),
                    deterministic=settings.deterministic,
                )
                target = at.window(dq_)
                target.add_(at.back(tile_dq, target).to(wide))
                if need_kv:
                    sums[0].add(at, tile_dk)
                    sums[1].add(at, tile_dv[..., : v.shape[-1]])
                del tile_dq, tile_dk, tile_dv  # the next tile's must not be made beside them
        if need_kv and step.index != 0:
            assert communicator is not None
            if homeward:  # it came while this step was computed
                homeward.add_to(dk, dv)
            flat = [one.flat for one in sums]
            homeward = _Homeward(step, communicator.give_back(step, flat, (k, v), settings.tag))
            del flat
        del sums  # what is not on its way must not stand beside the next step's
    if homeward:
        homeward.add_to(dk, dv)
    return dq, dk, dv


class _Gradients:
    """Gradients of a step's keys, or of its values: the rank's own, or a flat buffer of the parts.

    The first tile's result becomes the buffer where it is laid out like it.
    """

    def __init__(self, step: Step, like: Tensor, dtype: torch.dtype, own: Tensor) -> None:
        self._step, self._like, self._dtype = step, like, dtype
        self._own = own if step.index == 0 else None
        self._flat: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """The parts' gradients end to end."""
        if self._flat is None:
            self._flat = flat_zeros(self._step.parts, self._like, self._dtype)
        return self._flat

    def add(self, at: _At, gradient: Tensor) -> None:
        """Add a tile's gradient, as the kernel gave it, to the rows that the tile read."""
        if self._own is None and self._flat is None and self._is_whole(at.tile, gradient):
            self._flat = gradient.reshape(-1)
            return
        if self._own is not None:
            sums = self._own
        else:
            sums = part_views(self.flat, self._step.parts, self._like)[at.tile.part]
        window = at.kv_window(sums, self._step)
        window.add_(gradient.reshape(window.shape).to(self._dtype))

    def _is_whole(self, tile: Tile, gradient: Tensor) -> bool:
        parts = self._step.parts
        return (
            len(parts) == 1
            and tile.batch is None
            and tile.kv == Rows(0, len(parts[0].rows))
            and gradient.dtype == self._dtype
            and gradient.is_contiguous()
        )


@dataclass
class _Homeward:
    """Gradients on their way: ours to the owner, others' for our keys to us."""

    step: Step
    pending: Pending

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        received = self.pending.wait()
        add_parts_(dk, self.step.give, [one[0] for one in received])
        add_parts_(dv, self.step.give, [one[1] for one in received])
        self.pending.release()


def _with_keys(
    steps: Sequence[Step],
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    settings: Settings,
    gives_back: bool = False,
) -> Iterator[tuple[Step, list[Tensor], list[Tensor]]]:
    """Each step with its keys and values, part by part; the next ones are already on their way.

    Transports match messages in the order in which they were started, so all ranks keep to one
    order, whichever steps they drop: keys of step t+1, then gradients of step t. Where gradients go
    back, keys of a step further away therefore start only after them.
    """

    def fetch(step: Step) -> Pending:
        assert communicator is not None
        return communicator.fetch(step, (k, v), settings.tag)

    ahead: Pending | None = None
    for step, following in zip_longest(steps, steps[1:]):
        early = (
            settings.overlap and following and not (gives_back and following.index > step.index + 1)
        )
        pending = None if step.index == 0 else ahead or fetch(step)
        ahead = None
        received = pending.wait() if pending else [(k, v)]
        if early:
            ahead = fetch(following)
        yield step, [part[0] for part in received], [part[1] for part in received]
        if pending:
            pending.release()
        if settings.overlap and following and not early:
            ahead = fetch(following)


class _At:
    """Where a tile's rows lie in tensors of the form [B, S, K, G, D]."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile

    def window(self, x: Tensor) -> Tensor:
        """View [b, repeat, count, k, G, D] of the tile's query rows."""
        return select(x, self.tile.q, self.tile.heads, self.tile.batch)

    def q(self, x: Tensor) -> Tensor:
        """The tile's query rows as a kernel takes them: [b*repeat, count, k*G, D]."""
        return self.window(x).flatten(0, 1).flatten(2, 3)

    def kv_window(self, x: Tensor, step: Step) -> Tensor:
        """View [b, repeat, count, k, D] of the tile's key rows; parts hold only their heads."""
        own = step.index == 0
        heads = self.tile.heads if own else replace(self.tile.heads, start=0, step=1)
        return select(x, self.tile.kv, heads, self.tile.batch)

    def kv(self, x: Tensor, step: Step) -> Tensor:
        """The tile's key rows as a kernel takes them: [b*repeat, count, k, D]."""
        return self.kv_window(x, step).flatten(0, 1)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """A kernel's result for query rows in the form of :meth:`window`."""
        return x.reshape(*like.shape[:-1], x.shape[-1])


def _dropout(
    program: Program, step: Step, tile: Tile, q: Tensor, k: Tensor, settings: Settings
) -> Dropout | None:
    """The tile's global coordinates, where the call drops weights."""
    if not settings.dropout:
        return None
    plan, device = program.plan, q.device
    own = plan.queries.positions(program.rank)
    theirs = plan.keys.positions(step.source)
    if step.index != 0:
        theirs = theirs[step.parts[tile.part].rows.indices()]
    batch = tile.batch if tile.batch is not None else range(q.shape[0])
    kv_heads = range(k.shape[2])[tile.heads.start :: tile.heads.step]
    group = q.shape[2] // k.shape[2]
    repeats = (len(batch), tile.q.repeat)
    return Dropout(
        settings.dropout,
        settings.seed,
        batch=torch.tensor(batch, device=device).repeat_interleave(tile.q.repeat),
        heads=torch.tensor([h * group + g for h in kv_heads for g in range(group)], device=device),
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

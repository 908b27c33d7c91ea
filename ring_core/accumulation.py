"""What tiles give for rows of one shard, put together: attention is merged, gradients add.

On a GPU tiles' results are kept as the kernel gave them, and a few of them are put together in one
pass that writes the final dtype; see :mod:`ring_core.fused`. Elsewhere, and for tiles of strided
rows or of some heads, each is put into a state of the accumulation dtype as it comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ring_core import copying
from ring_core.plan import ALL_HEADS, Heads, Rows, Segments
from ring_core.rows import add_segments, grouped, put, select, window
from ring_core.softmax import accumulation_dtype, merge_

_SOURCES = 4
"""Most tensors that one pass reads for a row."""
_SHARDS = 3
"""How many shards' worth of rows wait to be put together, at most; then a state holds them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a shard, for some KV heads and batch rows (None: all)."""

    rows: Rows
    heads: Heads = ALL_HEADS
    batch: range | None = None

    @property
    def run(self) -> range | None:
        """The place as neighbouring rows of all heads and batch rows, if it is that."""
        return self.rows.span if self.heads == ALL_HEADS and self.batch is None else None


class Sum:
    """A gradient [B, S, H, D] while its parts come in.

    Args:
        shape: of the whole. dtype, device: of what it is the gradient of.
        kv_heads: into how many groups the H heads fall, as places count them.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, kv_heads: int
    ) -> None:
        self._shape, self._dtype, self._device, self._kv_heads = shape, dtype, device, kv_heads
        self._wide = accumulation_dtype(dtype)
        self._state: Tensor | None = None
        self._waiting: list[tuple[range, Tensor, bool]] = []

    @staticmethod
    def of(x: Tensor, kv_heads: int) -> Sum:
        """For the gradient of a shard ``x`` [B, S, H, D]."""
        return Sum(x.shape, x.dtype, x.device, kv_heads)

    def add(self, place: Place, x: Tensor, borrowed: bool = False) -> None:
        """Add a gradient of the rows at ``place``; its elements in the order of those rows.

        ``x`` may be read until :meth:`settle` or :meth:`result`, and becomes part of the sum itself
        unless it is only ``borrowed``.
        """
        run = place.run
        if run is not None:
            x = x.reshape(self._shape[0], len(run), *x.shape[2:])
        if run is not None and copying.is_fused(x.device):
            self._waiting.append((run, x, borrowed))
            if _too_many(tuple(one for one, _, _ in self._waiting), self._shape[1]):
                self.settle()
        elif not borrowed and self._state is None and _is_whole(run, x, self._shape, self._wide):
            self._state = x
        else:
            self.settle()  # or what waits and the state would both be held
            if self._state is None:
                self._state = torch.zeros(self._shape, dtype=self._wide, device=self._device)
            state = grouped(self._state, self._kv_heads)
            if isinstance(place.rows, Segments):
                add_segments(state, place.rows, place.heads, place.batch, x)
                return
            target = select(state, place.rows, place.heads, place.batch)
            x = x.reshape(target.shape)
            if copying.pays(x):
                from ring_core.fused import sum_into

                sum_into(target, [target, x])
            else:
                target.add_(x)

    def settle(self) -> None:
        """Put together what waits: nothing that was added is read any more."""
        if self._waiting:
            self._state = self._write(self._new(self._wide) if self._state is None else self._state)
            self._waiting.clear()

    def result(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of everything added, in ``dtype`` or that of the whole; 0 where nothing was.

        Once: it takes the sum's memory.
        """
        dtype = dtype or self._dtype
        if self._waiting:
            return self._write(self._first(dtype))
        if self._state is None:
            return self._new(dtype).zero_()
        state, self._state = self._state, None
        return state.to(dtype)

    def rows(self, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of the result in ``dtype``: of the one tensor that gives them, where it is one."""
        giving = [
            (run, x)
            for run, x, _ in self._waiting
            if run.start < rows.stop and rows.start < run.stop
        ]
        if self._state is None and len(giving) == 1:
            run, x = giving[0]
            if run.start <= rows.start and rows.stop <= run.stop and x.dtype == dtype:
                return _rows(x, run, slice(rows.start, rows.stop))
        self.settle()
        if self._state is None:
            return self.result(dtype)[:, rows.start : rows.stop]
        return self._state[:, rows.start : rows.stop].to(dtype)

    def _first(self, dtype: torch.dtype) -> Tensor:
        """Where the result is written: over the first tile's, where that has the whole shape."""
        run, x, borrowed = self._waiting[0]
        return x if not borrowed and _is_whole(run, x, self._shape, dtype) else self._new(dtype)

    def _new(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._shape, dtype=dtype, device=self._device)

    def _write(self, target: Tensor) -> Tensor:
        from ring_core.fused import sum_into

        for rows, members in cells(tuple(run for run, _, _ in self._waiting), self._shape[1]):
            found = [self._waiting[i] for i in members]
            if self._state is None and len(found) == 1 and found[0][1] is target:
                continue  # it stands there already
            if not found and self._state is target:
                continue
            sources = [_rows(x, run, rows) for run, x, _ in found]
            if self._state is not None:
                sources.append(self._state[:, rows])
            if len(sources) > 1:
                sum_into(target[:, rows], sources)
            elif sources:
                copying.copy(target[:, rows], sources[0])
            else:
                target[:, rows] = 0
        return target


class Merge:
    """A shard's attention, out [B, S, H, Dv] and lse [B, H, S], while its tiles come in."""

    def __init__(self, q: Tensor, value_dim: int, kv_heads: int) -> None:
        self._like, self._kv_heads = q, kv_heads
        self._shape = (*q.shape[:3], value_dim)
        self._wide = accumulation_dtype(q.dtype)
        self._state: tuple[Tensor, Tensor] | None = None
        self._waiting: list[tuple[range, Tensor, Tensor]] = []

    def add(self, place: Place, out: Tensor, lse: Tensor) -> None:
        """Merge attention of the rows at ``place`` over further keys.

        Args:
            out: [b*repeat, count, k*G, Dv], lse: [b*repeat, k*G, count], as a kernel gives them.
        """
        run = place.run
        if run is not None and copying.is_fused(out.device):
            batch = self._shape[0]
            lse = torch.unflatten(lse, 0, (batch, -1)).transpose(1, 2).flatten(2)
            self._waiting.append((run, out.reshape(batch, len(run), *out.shape[2:]), lse))
            if _too_many(tuple(one for one, _, _ in self._waiting), self._shape[1]):
                self._put_together()
            return
        if self._waiting:  # or what waits and the state would both be held
            self._put_together()
        if self._state is None:
            self._state = self._empty()
        state_out, state_lse = (grouped(x, self._kv_heads) for x in _beside(*self._state))
        where = place.rows, place.heads, place.batch
        target, target_lse = window(state_out, *where), window(state_lse, *where)
        out, lse = (_like(x, target) for x in _beside(out, lse))
        if copying.is_fused(out.device):
            from ring_core.fused import merge_into

            pair = [target, out], [target_lse.squeeze(-1), lse.squeeze(-1)]
            merge_into(target, target_lse.squeeze(-1), *pair)
        else:
            merge_(target, target_lse, out, lse)
        if isinstance(place.rows, Segments):
            put(state_out, place.rows, place.heads, place.batch, target)
            put(state_lse, place.rows, place.heads, place.batch, target_lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Out in q's dtype and lse in the accumulation dtype; 0 and -inf where no key was seen."""
        if self._waiting:
            return self._write(*self._first())
        out, lse = self._state or self._empty()
        return out.to(self._like.dtype), lse

    def _first(self) -> tuple[Tensor, Tensor]:
        """Where the result is written: over the first tile's, where that has the whole shape."""
        run, out, lse = self._waiting[0]
        dtype, wide = self._like.dtype, self._wide
        if _is_whole(run, out, self._shape, dtype) and lse.dtype == wide and lse.is_contiguous():
            return out, lse
        return torch.empty(self._shape, dtype=dtype, device=self._like.device), self._lse()

    def _lse(self) -> Tensor:
        batch, rows, heads, _ = self._shape
        return torch.empty(batch, heads, rows, dtype=self._wide, device=self._like.device)

    def _empty(self) -> tuple[Tensor, Tensor]:
        out = torch.zeros(self._shape, dtype=self._wide, device=self._like.device)
        return out, self._lse().fill_(-torch.inf)

    def _put_together(self) -> None:
        if self._state is None:
            out = torch.empty(self._shape, dtype=self._wide, device=self._like.device)
            self._state = self._write(out, self._lse())
        else:
            self._write(*self._state)
        self._waiting.clear()

    def _write(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        from ring_core.fused import merge_into

        for rows, members in cells(tuple(run for run, _, _ in self._waiting), self._shape[1]):
            found = [self._waiting[i] for i in members]
            if self._state is None and len(found) == 1 and found[0][1] is out:
                continue  # it stands there already
            if not found and self._state is not None and self._state[0] is out:
                continue
            outs = [_rows(x, run, rows) for run, x, _ in found]
            lses = [_rows(x.transpose(1, 2), run, rows) for run, _, x in found]
            if self._state is not None:
                outs.append(self._state[0][:, rows])
                lses.append(self._state[1].transpose(1, 2)[:, rows])
            if outs:
                merge_into(out[:, rows], lse.transpose(1, 2)[:, rows], outs, lses)
            else:
                out[:, rows], lse[:, :, rows] = 0, -torch.inf
        return out, lse


@lru_cache(maxsize=1024)
def cells(runs: tuple[range, ...], rows: int) -> tuple[tuple[slice, tuple[int, ...]], ...]:
    """Cut ``rows`` rows where a run begins or ends; each piece with the runs that cover it."""
    ends = sorted({0, rows, *(run.start for run in runs), *(run.stop for run in runs)})
    return tuple(
        (
            slice(start, stop),
            tuple(i for i, run in enumerate(runs) if run.start <= start and stop <= run.stop),
        )
        for start, stop in itertools.pairwise(ends)
    )


def _too_many(runs: tuple[range, ...], rows: int) -> bool:
    if sum(map(len, runs)) > _SHARDS * rows:
        return True
    if len(runs) < _SOURCES:
        return False
    return any(len(members) >= _SOURCES for _, members in cells(runs, rows))


def _rows(x: Tensor, run: range, rows: slice) -> Tensor:
    """Rows of the shard out of a tensor that holds those of ``run``."""
    return x[:, rows.start - run.start : rows.stop - run.start]


def _is_whole(run: range | None, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether ``x`` can be the state itself."""
    return run == range(shape[1]) and x.shape == shape and x.dtype == dtype and x.is_contiguous()


def _like(x: Tensor, window: Tensor) -> Tensor:
    """A view [b*repeat, count, k*G, D] as [b, repeat, count, k/phases, phases, G, D], as ``window``
    has them."""
    return torch.unflatten(torch.unflatten(x, 2, window.shape[3:6]), 0, window.shape[:2])


def _beside(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one form: [B, S, H, Dv] and [B, S, H, 1]."""
    return out, lse.transpose(1, 2).unsqueeze(-1)

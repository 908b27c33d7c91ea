"""FlashAttention-2 as torch ships it (arXiv 2307.08691): half precision, any window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ring_attention_standard.kernels import varlen
from ring_attention_standard.kernels.bands import rows_apart
from ring_attention_standard.kernels.heads import common_size
from ring_attention_standard.kernels.varlen import Ends, joined
from ring_core.dropout import Dropout
from ring_core.masks import FULL, Band, Diagonal, Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

HALF = (torch.float16, torch.bfloat16)


class CudaFlash:
    """Any band in one call; head sizes up to 256; grouped heads."""

    name = "flash"
    priority = 10
    supports_dropout = False
    rounds = True

    def refuse(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return "CUDA only"
        if problem.dtype not in HALF:
            return "float16 and bfloat16 only"
        if problem.dropout:
            return "cannot repeat a dropout mask on other tiles"
        if not problem.masks <= {Band}:
            return f"band masks only, not {sorted(m.__name__ for m in problem.masks - {Band})}"
        if max(problem.head_dim, problem.value_dim) > 256:
            return "head sizes up to 256 only"
        if torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs compute capability 8.0 (Ampere) or newer"
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return joined((piece for tile in tiles for piece in _direct(tile)), _sides)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        sides = _sides_of(mask, q.shape[1], k.shape[1])
        size = common_size(q.shape[-1], v.shape[-1], multiple=8)
        return varlen.forward(
            self, lambda *x: _attend(*x, sides=sides, scale=scale), q, k, v, mask, size, scale
        )

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: Dropout | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sides = _sides_of(mask, q.shape[1], k.shape[1])
        size = common_size(q.shape[-1], v.shape[-1], multiple=8)
        with _deterministic(deterministic):
            return varlen.backward(
                self,
                lambda *x: _gradients(*x, sides=sides, scale=scale),
                dout,
                q,
                k,
                v,
                out,
                lse,
                mask,
                size,
                scale,
                deterministic,
            )


def _direct(tile: Tile) -> Iterator[Tile]:
    """Cut tiles of more rows than keys where the kernel's window cannot say what they see.

    Counted from aligned ends, it takes a right side of nk or more for an open one, and makes of an
    open one nk: both are right only while there are no more rows than keys.
    """
    nq, nk, band = tile.q.count, tile.kv.count, tile.mask
    parts = [tile]
    if isinstance(band, Band) and band != FULL:
        if band.hi is not None and band.hi + nq - nk >= nk:
            parts = rows_apart(tile, nk - band.hi)  # from there on the right side is open
        elif band.hi is None and band.lo is not None and nq > nk:
            parts = rows_apart(tile, 1 - band.lo)  # up to there rows see all keys
    for part in parts:
        yield from (part,) if part == tile else _direct(part)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, ends: Ends | None, *, sides: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(
        q,
        k,
        v,
        *_lengths(q, k, ends),
        0.0,
        False,
        False,
        scale=scale,
        window_size_left=sides[0],
        window_size_right=sides[1],
    )
    if ends is not None and ends.some_see_nothing:
        lse.masked_fill_(lse == torch.inf, -torch.inf)  # what it writes for them
    return out, lse


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Ends | None,
    *,
    sides: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # the state of a dropout of 0
    dq, dk, dv = _backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *_lengths(q, k, ends),
        0.0,
        False,
        unused,
        unused,
        scale=scale,
        window_size_left=sides[0],
        window_size_right=sides[1],
    )
    return dq, dk, dv


def _lengths(
    q: Tensor, k: Tensor, ends: Ends | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    if ends is None:
        return None, None, q.shape[1], k.shape[1]
    # Where no sequence has more than one query, it would take as many rows as there are sequences.
    return ends.q, ends.kv, max(2, ends.longest_q), ends.longest_kv


def _sides(nq: int, nk: int, mask: Mask) -> tuple[int, int]:
    """The band as the kernel's window, which is counted from aligned ends; -1 is open.

    A trimmed tile's band reaches both its corners, so neither side can be negative.
    """
    assert isinstance(mask, Band)
    ends = nk - nq
    return (-1 if mask.lo is None else ends - mask.lo, -1 if mask.hi is None else mask.hi - ends)


def _sides_of(mask: Mask, nq: int, nk: int) -> tuple[int, int]:
    """The window of a tile; of all its pieces, which :func:`joined` put together by it."""
    if isinstance(mask, Diagonal):
        q, kv, band = mask.pieces[0]
        return _sides(len(q), len(kv), band)
    return _sides(nq, nk, mask)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """The kernel reads torch's global switch, and only the strict one; it is put back as it was."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)

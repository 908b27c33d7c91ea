"""Kernels that know rectangles and triangles only; windows' edges go to FlashAttention-2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ring_attention_standard.kernels import varlen
from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.varlen import Ends, joined
from ring_core.dropout import Dropout
from ring_core.masks import FULL, Band, Diagonal, Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem

_flash = CudaFlash()


class Rectangles(ABC):
    """Half precision on Hopper and newer. All give out and lse of the same meaning: tiles merge."""

    name: str
    priority: int
    supports_dropout = False
    rounds = True

    head_sizes: ClassVar[Sequence[int]]
    """What the kernel is asked for, ascending; others are padded to the next one."""
    least: ClassVar[int]
    """Tiles of fewer rows or keys than this go to FlashAttention-2 too."""
    joins: ClassVar[bool] = False
    """Whether one call takes sequences of different lengths, however short."""
    few: ClassVar[int] = 0
    """Of tiles of fewer rows and keys than this, FlashAttention-2 computes several in a call."""

    def refuse(self, problem: Problem) -> str | None:
        if reason := _flash.refuse(problem):
            return reason
        if max(problem.head_dim, problem.value_dim) > self.head_sizes[-1]:
            return f"head sizes up to {self.head_sizes[-1]} only"
        if torch.cuda.get_device_capability(problem.device) < (9, 0):
            return "needs compute capability 9.0 (Hopper) or newer"
        return None

    @abstractmethod
    def is_triangle(self, nq: int, nk: int, band: Band) -> bool:
        """Whether the kernel's own causal mask is this band."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Ends | None, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The forward, for one head size: out and lse as :class:`AttentionKernel` has them.

        With ``ends``, which come where the kernel ``joins``, tensors have no batch dimension.
        """

    @abstractmethod
    def gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        ends: Ends | None,
        *,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward, for one head size."""

    @abstractmethod
    def pieces(self, tile: Tile) -> Sequence[Tile]:
        """Rectangles and the kernel's triangles that are a tile which is open to the left."""

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        small = [tile for tile in tiles if self._is_small(tile)]
        together = _flash.lower(small)
        if small and len(together) <= len(small) // 2:
            return [*self._lower([one for one in tiles if not self._is_small(one)]), *together]
        return self._lower(tiles)

    def _is_small(self, tile: Tile) -> bool:
        return tile.q.repeat == 1 and max(tile.q.count, tile.kv.count) < self.few

    def _lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        pieces = [piece for tile in tiles for piece in self._cut(tile)]
        if self.joins:
            pieces = joined(pieces, self._kind)
        known = [self._knows(piece.q.count, piece.kv.count, piece.mask) for piece in pieces]
        others = [piece for piece, direct in zip(pieces, known, strict=True) if not direct]
        direct = [piece for piece, direct in zip(pieces, known, strict=True) if direct]
        return [*direct, *_flash.lower(others)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        if not self._knows(q.shape[1], k.shape[1], mask):
            return _flash.forward(q, k, v, mask, scale=scale, dropout=dropout)
        causal = _is_causal(mask)
        return varlen.forward(
            self,
            lambda *x: self.attend(*x, causal=causal, scale=scale),
            q,
            k,
            v,
            mask,
            self._size(q, v),
            scale,
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
        if not self._knows(q.shape[1], k.shape[1], mask):
            return _flash.backward(
                dout,
                q,
                k,
                v,
                out,
                lse,
                mask,
                scale=scale,
                dropout=dropout,
                deterministic=deterministic,
            )
        causal = _is_causal(mask)
        return varlen.backward(
            self,
            lambda *x: self.gradients(*x, causal=causal, scale=scale, deterministic=deterministic),
            dout,
            q,
            k,
            v,
            out,
            lse,
            mask,
            self._size(q, v),
            scale,
            deterministic,
        )

    def _size(self, q: Tensor, v: Tensor) -> int:
        wanted = max(q.shape[-1], v.shape[-1])
        return next(size for size in self.head_sizes if size >= wanted)

    def _cut(self, tile: Tile) -> Sequence[Tile]:
        mask = tile.mask
        is_open = isinstance(mask, Band) and mask.lo is None and mask != FULL
        return self.pieces(tile) if is_open else (tile,)

    def _kind(self, nq: int, nk: int, band: Band) -> str | None:
        if band == FULL:
            return "rectangle"
        return "triangle" if self.is_triangle(nq, nk, band) else None

    def _knows(self, nq: int, nk: int, mask: Mask) -> bool:
        if isinstance(mask, Diagonal):
            return self.joins and _is_of_one_kind(self, mask)
        assert isinstance(mask, Band)
        return min(nq, nk) >= self.least and self._kind(nq, nk, mask) is not None


@lru_cache(maxsize=256)
def _is_of_one_kind(kernel: Rectangles, mask: Diagonal) -> bool:
    """Whether the kernel knows all pieces, and as one kind."""
    kinds = {kernel._kind(len(q), len(kv), band) for q, kv, band in mask.pieces}
    return len(kinds) == 1 and None not in kinds


def _is_causal(mask: Mask) -> bool:
    return (mask.pieces[0][2] if isinstance(mask, Diagonal) else mask) != FULL

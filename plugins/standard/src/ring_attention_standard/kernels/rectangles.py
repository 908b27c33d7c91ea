"""Kernels that know rectangles and triangles only; windows' edges go to FlashAttention-2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.heads import ready
from ring_core.dropout import Dropout
from ring_core.masks import FULL, Band, Mask
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
    """Fewer rows or keys than this go to FlashAttention-2 too."""

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
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The forward, for one head size: out and lse as :class:`AttentionKernel` has them."""

    @abstractmethod
    def gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward, for one head size."""

    @abstractmethod
    def pieces(self, tile: Tile) -> Sequence[Tile]:
        """Rectangles and the kernel's triangles that are a tile which is open to the left."""

    def lower(self, tile: Tile) -> Sequence[Tile]:
        pieces: Sequence[Tile] = (tile,)
        if isinstance(tile.mask, Band) and tile.mask.lo is None and tile.mask != FULL:
            pieces = self.pieces(tile)
        return [
            part
            for piece in pieces
            for part in (
                (piece,)
                if self._knows(piece.q.count, piece.kv.count, piece.mask)
                else _flash.lower(piece)
            )
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        if not self._knows(q.shape[1], k.shape[1], mask):
            return _flash.forward(q, k, v, mask, scale=scale, dropout=dropout)
        size = self._size(q, v)
        out, lse = self.attend(*(ready(x, size) for x in (q, k, v)), mask != FULL, scale)
        return out[..., : v.shape[-1]], lse

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
        size = self._size(q, v)
        inputs = (ready(x, size) for x in (dout, q, k, v, out))
        dq, dk, dv = self.gradients(*inputs, lse.contiguous(), mask != FULL, scale, deterministic)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    def _size(self, q: Tensor, v: Tensor) -> int:
        wanted = max(q.shape[-1], v.shape[-1])
        return next(size for size in self.head_sizes if size >= wanted)

    def _knows(self, nq: int, nk: int, mask: Mask) -> bool:
        assert isinstance(mask, Band)
        return min(nq, nk) >= self.least and (mask == FULL or self.is_triangle(nq, nk, mask))

"""cuDNN's attention as torch calls it: the fastest that ships with torch on Hopper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attention_standard.kernels.bands import cut
from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.heads import common_size, padded
from ring_core.dropout import Dropout
from ring_core.masks import CAUSAL, FULL, Band, Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

_flash = CudaFlash()

_LEAST = 64
"""Fewer rows or keys than this fill no block of cuDNN's kernels."""


class Cudnn:
    """Rectangles and causal triangles go to cuDNN; small tiles and windows' edges to CudaFlash.

    Both give out and lse of the same meaning, so their tiles merge.
    """

    name = "cudnn"
    priority = 20
    supports_dropout = False

    def refuse(self, problem: Problem) -> str | None:
        if reason := _flash.refuse(problem):
            return reason
        if problem.deterministic:
            return "its backward is not bitwise repeatable"
        if common_size(problem.head_dim, problem.value_dim, multiple=8) > 128:
            return "head sizes up to 128 only"
        if torch.cuda.get_device_capability(problem.device) < (9, 0):
            return "needs compute capability 9.0 (Hopper) or newer"
        return None

    def lower(self, tile: Tile) -> Sequence[Tile]:
        pieces: Sequence[Tile] = (tile,)
        if isinstance(tile.mask, Band) and tile.mask.lo is None:
            pieces = cut(tile, lambda nq, nk, band: band in (FULL, CAUSAL), block=1)
        return [
            part
            for piece in pieces
            for part in (
                (piece,)
                if _ours(piece.q.count, piece.kv.count, piece.mask)
                else _flash.lower(piece)
            )
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        if not _ours(q.shape[1], k.shape[1], mask):
            return _flash.forward(q, k, v, mask, scale=scale, dropout=dropout)
        size = common_size(q.shape[-1], v.shape[-1], multiple=8)
        q_, k_, v_ = (_ready(x, size) for x in (q, k, v))
        out, lse, *_ = _forward(q_, k_, v_, None, True, 0.0, mask == CAUSAL, False, scale=scale)
        return out.transpose(1, 2)[..., : v.shape[-1]], lse.reshape(lse.shape[:3])

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
        if not _ours(q.shape[1], k.shape[1], mask):
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
        size = common_size(q.shape[-1], v.shape[-1], multiple=8)
        dout_, q_, k_, v_, out_ = (_ready(x, size) for x in (dout, q, k, v, out))
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        dq, dk, dv = _backward(
            dout_,
            q_,
            k_,
            v_,
            out_,
            lse.contiguous().unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            mask == CAUSAL,
            scale=scale,
        )
        dq, dk, dv = (g.transpose(1, 2) for g in (dq, dk, dv))
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _ours(nq: int, nk: int, mask: Mask) -> bool:
    """Whether cuDNN computes the tile: its backward has no plan for single rows."""
    return mask in (FULL, CAUSAL) and min(nq, nk) >= _LEAST


def _ready(x: Tensor, size: int) -> Tensor:
    x = padded(x, size)
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)

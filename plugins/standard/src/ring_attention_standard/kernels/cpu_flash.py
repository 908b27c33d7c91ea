"""torch's flash attention for CPUs: without a mask array it knows full and causal tiles only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ring_attention_standard.kernels.bands import cut, is_mirrored_causal
from ring_attention_standard.kernels.heads import common_size, padded
from ring_core.dropout import Dropout
from ring_core.masks import CAUSAL, FULL, Band, Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem
from ring_core.softmax import accumulation_dtype

_BLOCK = 256
"""Rows and band width up to which an additive mask costs less than more calls."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlash:
    """Any head size, any band, grouped heads; exact in float64. No dropout.

    Half precision is computed in float32, so that tiles are not rounded to 16 bits before they are
    merged: sharding then adds no error.
    """

    name = "cpu_flash"
    priority = 10
    supports_dropout = False
    rounds = False

    def refuse(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return "CPU only"
        if problem.dropout:
            return "cannot repeat a dropout mask"
        if not problem.masks <= {Band}:
            return f"band masks only, not {sorted(m.__name__ for m in problem.masks - {Band})}"
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return [piece for tile in tiles for piece in cut(tile, _direct, _BLOCK)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(mask, Band)
        flip, causal, bias = _native(q, k, mask)
        size = common_size(q.shape[-1], v.shape[-1])
        args = [_ready(x, size, flip) for x in (q, k, v)]
        out, lse = _forward(*args, 0.0, causal, attn_mask=bias, scale=scale)
        out = out.transpose(1, 2)[..., : v.shape[-1]]
        return (out.flip(1), lse.flip(2)) if flip else (out, lse)

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
        assert isinstance(mask, Band)
        flip, causal, bias = _native(q, k, mask)
        size = common_size(q.shape[-1], v.shape[-1])
        dout_, q_, k_, v_, out_ = (_ready(x, size, flip) for x in (dout, q, k, v, out))
        lse_ = (lse.flip(2) if flip else lse).contiguous()
        gradients = _backward(
            dout_, q_, k_, v_, out_, lse_, 0.0, causal, attn_mask=bias, scale=scale
        )
        dq, dk, dv = (g.transpose(1, 2).flip(1) if flip else g.transpose(1, 2) for g in gradients)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _direct(nq: int, nk: int, band: Band) -> bool:
    if band in (FULL, CAUSAL) or is_mirrored_causal(nq, nk, band):
        return True
    return nq <= _BLOCK and nk <= 2 * _BLOCK


def _native(q: Tensor, k: Tensor, band: Band) -> tuple[bool, bool, Tensor | None]:
    """Whether to read rows and keys backwards, whether causal does, and else the bias."""
    nq, nk = q.shape[1], k.shape[1]
    if band in (FULL, CAUSAL):
        return False, band == CAUSAL, None
    if is_mirrored_causal(nq, nk, band):
        return True, True, None
    return False, False, _bias(nq, nk, band, accumulation_dtype(q.dtype))


@lru_cache(maxsize=16)
def _bias(nq: int, nk: int, band: Band, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: [1, 1, nq, nk]. All blocks of one window share it."""
    bias = torch.zeros(nq, nk, dtype=dtype).masked_fill_(~band.visible(range(nq), nk), -torch.inf)
    return bias[None, None]


def _ready(x: Tensor, size: int, flip: bool) -> Tensor:
    """[B, H, S, size], last dimension dense, as the kernel reads it."""
    x = padded(x.flip(1) if flip else x, size).to(accumulation_dtype(x.dtype))
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.transpose(1, 2)

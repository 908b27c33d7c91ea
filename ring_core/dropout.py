"""Dropout whose mask is a function of global indices: no rank, tile or world size changes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Odd 64-bit multipliers, as signed integers: the finaliser of SplitMix64 (Steele, Lea and Flood,
# OOPSLA 2014), and a distinct odd step per coordinate.
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_STEPS = (
    0x9E3779B97F4A7C15 - (1 << 64),
    0xD1B54A32D192ED03 - (1 << 64),
    0x8CB92BA72F3D8DD7 - (1 << 64),
)
_UNIT = 2.0**-53


@dataclass(frozen=True)
class Dropout:
    """Attention dropout of one tile.

    Attributes:
        p: probability of dropping a weight.
        seed: of the call, the same in forward and backward.
        batch: int64 [B], batch row of each entry. heads: int64 [H], query heads.
        q: int64 [B, Sq], kv: int64 [B, Sk], global token indices.
    """

    p: float
    seed: int
    batch: Tensor
    heads: Tensor
    q: Tensor
    kv: Tensor

    def factor(self, rows: slice = slice(None)) -> Tensor:
        """What each attention weight is multiplied by: float64 [B, H, rows, Sk], 0 or 1/(1-p)."""
        state = _mix(torch.tensor(self.seed, dtype=torch.int64, device=self.q.device))
        state = _mix(state + (self.batch + 1) * _STEPS[0])[:, None]
        state = _mix(state + (self.heads + 1) * _STEPS[1])[:, :, None]
        state = _mix(state + (self.q[:, None, rows] + 1) * _STEPS[2])[..., None]
        state = _mix(state + (self.kv[:, None, None, :] + 1) * _STEPS[0])
        uniform = _shift(state, 11).double() * _UNIT
        return (uniform >= self.p).double() / (1 - self.p)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)

"""Dropout whose mask is a function of global indices: no rank, tile or world size changes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ring_core.hashing import mix, mixed, shifted

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
        state = mix(torch.tensor(self.seed, dtype=torch.int64, device=self.q.device))
        state = mixed(state, self.batch, 0)[:, None]
        state = mixed(state, self.heads, 1)[:, :, None]
        state = mixed(state, self.q[:, None, rows], 2)[..., None]
        state = mixed(state, self.kv[:, None, None, :], 0)
        uniform = shifted(state, 11).double() * _UNIT
        return (uniform >= self.p).double() / (1 - self.p)

"""What a backward starts from: one value, since it passes through several hands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Given:
    """What a backward starts from.

    Attributes:
        dout: [B, S, H, Dv]. dlse: [B, H, S], if lse was used. q, k, v: of the forward. out, lse:
            what it gave.
    """

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

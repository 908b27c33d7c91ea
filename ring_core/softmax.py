"""The merge that makes everything exact: attention over two sets of keys from each one's."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype lse, merges and gradients of ``dtype`` inputs are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Merge a tile into ``(out, lse)`` in place.

    ``lse = logaddexp(lse_a, lse_b)``; ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``
    (Flash Attention, arXiv 2205.14135, section 3.1). Rows that saw no key yet have lse -inf and
    out 0; two such rows merge to another one.

    Args:
        out: [..., D], the accumulation dtype, may be a view.
        lse: [..., 1], same dtype, may be a view.
        tile_out: [..., D]. tile_lse: [..., 1].
    """
    merged = torch.logaddexp(lse, tile_lse)
    # exp(-inf - -inf) is NaN; against 0 it is the 0 that an empty row weighs
    pivot = merged.masked_fill(merged == -torch.inf, 0)
    out.mul_(torch.exp(lse - pivot)).addcmul_(tile_out.to(out.dtype), torch.exp(tile_lse - pivot))
    lse.copy_(merged)


class RingAttentionState:
    """The running ``(out, lse)`` of a set of queries while keys arrive tile by tile.

    Args:
        batch, rows, heads, value_dim: sizes of ``out`` [B, S, H, Dv].
        dtype: of the inputs; the state is float32, float64 for float64.
    """

    def __init__(
        self,
        batch: int,
        rows: int,
        heads: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.dtype = dtype
        wide = accumulation_dtype(dtype)
        self.out = torch.zeros(batch, rows, heads, value_dim, dtype=wide, device=device)
        self.lse = torch.full((batch, heads, rows), -torch.inf, dtype=wide, device=device)

    def update(self, out: Tensor, lse: Tensor) -> None:
        """Merge attention of these queries over further keys: out [B, S, H, Dv], lse [B, H, S]."""
        merge_(
            self.out,
            self.lse.transpose(1, 2).unsqueeze(-1),
            out,
            lse.to(self.lse.dtype).transpose(1, 2).unsqueeze(-1),
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """``out`` in the inputs' dtype and ``lse``; rows that saw no key: out 0, lse -inf."""
        return self.out.to(self.dtype), self.lse

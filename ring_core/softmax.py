"""The merge that makes everything exact: attention over two sets of keys from each one's."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.errors import InputError

# Under load, the first exp of a process was seen to be off by 1e-9 in float64, in rows of one of
# its threads, and no later one was (torch 2.13 with MKL). Here one thread makes the first one.
torch.exp(torch.zeros(1, dtype=torch.float64, device="cpu"))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype lse, merges and gradients of ``dtype`` inputs are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype, rounded: bool) -> torch.dtype:
    """In which dtype gradients of ``dtype`` keys travel; see :class:`ring_core.rounds.Step`."""
    return dtype if rounded else accumulation_dtype(dtype)


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
    merged, kept, added = _weights(lse, tile_lse)
    out.mul_(kept).addcmul_(tile_out.to(out.dtype), added)
    lse.copy_(merged)


def _weights(lse: Tensor, tile_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The merged lse, and what each side's output weighs in the merged one."""
    merged = torch.logaddexp(lse, tile_lse)
    # exp(-inf - -inf) is NaN; against 0 it is the 0 that an empty row weighs
    pivot = merged.masked_fill(merged == -torch.inf, 0)
    return merged, torch.exp(lse - pivot), torch.exp(tile_lse - pivot)


class RingAttentionState:
    """The running ``(out, lse)`` of a set of queries while keys arrive tile by tile.

    The first update fixes shapes and dtype; merging is done in float32, float64 for float64. ::

        state = RingAttentionState()
        for keys, values in tiles:
            state.update(*attend(q, keys, values))
        out, lse = state.result()
    """

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._dtype: torch.dtype | None = None

    def update(self, out: Tensor, lse: Tensor) -> None:
        """Merge attention of these queries over further keys, none of which was merged before.

        Args:
            out: [B, S, H, Dv]. lse: [B, H, S], natural log; -inf where a query saw no key.

        Raises:
            InputError: the shapes do not fit each other or the first update's.
        """
        batch, rows, heads = out.shape[:3] if out.ndim == 4 else (None, None, None)
        if tuple(lse.shape) != (batch, heads, rows):
            raise InputError(
                f"out {tuple(out.shape)} and lse {tuple(lse.shape)}: expected [B, S, H, Dv] and "
                "[B, H, S]"
            )
        if self._out is not None and out.shape != self._out.shape:
            raise InputError(
                f"out {tuple(out.shape)} after an update with {tuple(self._out.shape)}: one state "
                "holds one set of queries"
            )
        self._dtype = self._dtype or out.dtype
        wide = accumulation_dtype(self._dtype)
        # What stands in out where no key was seen is the kernel's own business, and may be NaN.
        out = out.to(wide).masked_fill(_beside(lse) == -torch.inf, 0)
        lse = lse.to(wide)
        if self._out is None or self._lse is None:
            self._out, self._lse = out, lse
            return
        merged, kept, added = _weights(self._lse, lse)
        # Not in place: earlier results stay what they were, and autograd can follow.
        self._out = self._out * _beside(kept) + out * _beside(added)
        self._lse = merged

    def result(self) -> tuple[Tensor, Tensor]:
        """``out`` in the first update's dtype, and ``lse``; rows that saw no key: 0 and -inf.

        Raises:
            InputError: nothing was merged yet.
        """
        if self._out is None or self._lse is None or self._dtype is None:
            raise InputError("no update yet: there is nothing to give a result of")
        return self._out.to(self._dtype), self._lse


def _beside(lse: Tensor) -> Tensor:
    """[B, H, S] as a factor of [B, S, H, D]."""
    return lse.transpose(1, 2).unsqueeze(-1)

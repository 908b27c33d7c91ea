"""FlashAttention-4 (package ``flash-attn-4``, an extra): the fastest on Hopper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ring_attention_standard.kernels.bands import rows_apart
from ring_attention_standard.kernels.rectangles import Rectangles
from ring_attention_standard.kernels.varlen import Ends
from ring_core.masks import Band
from ring_core.plan import Tile
from ring_core.protocols import Problem


class Flash4(Rectangles):
    """Triangles with aligned last corners, of no more rows than keys."""

    name = "flash4"
    priority = 30
    head_sizes = (64, 128)  # its gradients at 72 are wrong, 4.0.0b36
    least = 64
    joins = True

    def refuse(self, problem: Problem) -> str | None:
        return missing("standard") or super().refuse(problem)

    def is_triangle(self, nq: int, nk: int, band: Band) -> bool:
        return band.lo is None and band.hi == nk - nq

    def pieces(self, tile: Tile) -> Sequence[Tile]:
        nq, nk, band = tile.q.count, tile.kv.count, tile.mask
        if not isinstance(band, Band) or band.hi is None or self.is_triangle(nq, nk, band):
            return (tile,)
        return rows_apart(tile, nk - band.hi)  # from there on rows see all keys

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Ends | None, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_lengths(ends)
        )
        return out, lse

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
        dq, dk, dv = interface()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=scale,
            causal=causal,
            deterministic=deterministic,
            **_lengths(ends),
        )
        return dq, dk, dv


def _lengths(ends: Ends | None) -> dict[str, Any]:
    if ends is None:
        return {}
    return {
        "cu_seqlens_q": ends.q,
        "cu_seqlens_k": ends.kv,
        "max_seqlen_q": ends.longest_q,
        "max_seqlen_k": ends.longest_kv,
    }


@cache
def missing(plugin: str) -> str | None:
    """What to do about the package if it is not there, for the extra of a plugin."""
    try:
        found = find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    return None if found else f"needs flash-attn-4: pip install ring-attention-{plugin}[flash4]"


@cache
def interface() -> Any:
    """The package's functions."""
    return import_module("flash_attn.cute.interface")

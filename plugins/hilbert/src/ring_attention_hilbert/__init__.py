"""Hilbert-ordered ring attention: neighbourhoods of pictures and videos in few blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_attention_hilbert.config import HilbertConfig

if TYPE_CHECKING:
    from ring_attention_hilbert.attention import HilbertRingAttention

__all__ = ["HilbertConfig", "HilbertRingAttention"]


def __getattr__(name: str) -> object:
    if name == "HilbertRingAttention":  # needs torch, which listing plugins must not import
        from ring_attention_hilbert.attention import HilbertRingAttention

        return HilbertRingAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

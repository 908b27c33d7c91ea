"""Exact ring attention, dense and dilated; the communicators and kernels that all variants use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_attention_standard.config import StandardConfig

if TYPE_CHECKING:
    from ring_attention_standard.attention import StandardRingAttention

__all__ = ["StandardConfig", "StandardRingAttention"]


def __getattr__(name: str) -> object:
    if name == "StandardRingAttention":  # needs torch, which listing plugins must not import
        from ring_attention_standard.attention import StandardRingAttention

        return StandardRingAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

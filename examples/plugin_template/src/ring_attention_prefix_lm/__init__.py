"""Prefix language model attention over sharded sequences: variant ``prefix_lm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_attention_prefix_lm.config import PrefixLMConfig

if TYPE_CHECKING:
    from ring_attention_prefix_lm.attention import PrefixLMAttention

__all__ = ["PrefixLMAttention", "PrefixLMConfig"]


def __getattr__(name: str) -> object:
    if name == "PrefixLMAttention":  # needs torch, which listing plugins must not import
        from ring_attention_prefix_lm.attention import PrefixLMAttention

        return PrefixLMAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Block-sparse ring attention: only what a pattern needs is computed and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_attention_blocksparse.config import BlockSparseConfig
from ring_attention_blocksparse.patterns import Pattern

if TYPE_CHECKING:
    from ring_attention_blocksparse.attention import BlockSparseRingAttention

__all__ = ["BlockSparseConfig", "BlockSparseRingAttention", "Pattern"]


def __getattr__(name: str) -> object:
    if name == "BlockSparseRingAttention":  # needs torch, which listing plugins must not import
        from ring_attention_blocksparse.attention import BlockSparseRingAttention

        return BlockSparseRingAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

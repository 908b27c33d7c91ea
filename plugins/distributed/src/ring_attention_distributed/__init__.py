"""Any ring attention on a mesh of ranks: heads exchanged (Ulysses) times a ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_attention_distributed.config import DistributedConfig

if TYPE_CHECKING:
    from ring_attention_distributed.alike import check_alike
    from ring_attention_distributed.attention import DistributedRingAttention

__all__ = ["DistributedConfig", "DistributedRingAttention", "check_alike"]


def __getattr__(name: str) -> object:
    if name == "DistributedRingAttention":  # needs torch, which listing plugins must not import
        from ring_attention_distributed.attention import DistributedRingAttention

        return DistributedRingAttention
    if name == "check_alike":
        from ring_attention_distributed.alike import check_alike

        return check_alike
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

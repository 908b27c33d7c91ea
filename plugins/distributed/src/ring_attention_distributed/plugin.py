"""The hooks of this plugin."""

from __future__ import annotations

from ring_attention_distributed.config import DistributedConfig
from ring_core import Variant, hookimpl

RING_HOOK_API = 1


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=DistributedConfig,
        attention="ring_attention_distributed.attention:DistributedRingAttention",
        summary="any variant on a mesh of ranks: heads exchanged among neighbours (Ulysses) times "
        "rings",
    )

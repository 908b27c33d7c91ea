"""The hooks of this plugin."""

from __future__ import annotations

from collections.abc import Sequence

from ring_core import Observer, RingAttentionConfig, Variant, hookimpl

from ring_attention_prefix_lm.config import PrefixLMConfig

RING_HOOK_API = 1


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=PrefixLMConfig,
        attention="ring_attention_prefix_lm.attention:PrefixLMAttention",
        summary="prefix language models: each document's start is seen by all of its tokens",
    )


@hookimpl
def ring_observers(config: RingAttentionConfig) -> Sequence[Observer] | None:
    if not isinstance(config, PrefixLMConfig) or not config.log_transfers:
        return None  # hooks are asked for every attention that is built, of any variant
    from ring_attention_prefix_lm.transfers import TransferLog

    return [TransferLog()]

"""The hooks of this plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ring_attention_distributed.config import DistributedConfig
from ring_core import Observer, Preset, RingAttentionConfig, Variant, hookimpl

RING_HOOK_API = 1


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=DistributedConfig,
        attention="ring_attention_distributed.attention:DistributedRingAttention",
        summary="any variant on a mesh of ranks: heads exchanged among neighbours (Ulysses) times "
        "rings",
    )


@hookimpl
def ring_presets() -> Mapping[str, Preset]:
    return {
        "production": Preset(
            "distributed",
            {
                "segment_lengths": (2048, 4096, 8192),
                "dilation_rates": (1, 2, 4),
                "retries": 3,
                "check_finite": True,
            },
            "dilated attention; failed calls are tried again, results are checked",
        ),
        "large_scale": Preset(
            "distributed",
            {
                "segment_lengths": (4096, 8192, 16384, 32768),
                "dilation_rates": (1, 2, 4, 8),
                "monitor": True,
            },
            "dilated attention for long sequences, monitored",
        ),
    }


@hookimpl
def ring_commands() -> Mapping[str, str]:
    return {"top": "ring_attention_distributed.top"}


@hookimpl
def ring_observers(config: RingAttentionConfig) -> Sequence[Observer] | None:
    if not isinstance(config, DistributedConfig) or not config.monitored:
        return None
    from ring_attention_distributed.watching import Watching

    return [Watching()]

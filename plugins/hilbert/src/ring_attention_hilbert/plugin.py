"""The hooks of this plugin."""

from __future__ import annotations

from collections.abc import Mapping

from ring_attention_hilbert.config import HilbertConfig
from ring_core import Preset, Variant, hookimpl

RING_HOOK_API = 1


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=HilbertConfig,
        attention="ring_attention_hilbert.attention:HilbertRingAttention",
        summary="attention over pictures, videos and segments laid out on a Hilbert curve: "
        "neighbourhoods in few blocks",
    )


@hookimpl
def ring_presets() -> Mapping[str, Preset]:
    return {
        "hilbert_optimized": Preset(
            "hilbert",
            {
                "segment_lengths": (2048, 4096, 8192),
                "dilation_rates": (1, 2, 4),
                "segment_length": 2048,
            },
            "dilated attention over segments of 2,048 tokens",
        )
    }

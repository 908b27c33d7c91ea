"""The hooks of this plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ring_attention_standard.config import StandardConfig
from ring_core import Preset, Variant, hookimpl

RING_HOOK_API = 1


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=StandardConfig,
        attention="ring_attention_standard.attention:StandardRingAttention",
        summary="exact attention, dense and dilated: causal, windows, packed documents, "
        "cross-attention",
    )


@hookimpl
def ring_presets() -> Mapping[str, Preset]:
    return {
        "development": Preset(
            "standard",
            {"segment_lengths": (2048, 4096), "dilation_rates": (1, 2), "deterministic": True},
            "dilated attention, bitwise repeatable",
        )
    }


@hookimpl
def ring_kernels() -> list[Any]:
    from ring_attention_standard.kernels import KERNELS

    return list(KERNELS)


@hookimpl
def ring_communicators() -> list[Any]:
    from ring_attention_standard.point_to_point import PointToPoint
    from ring_attention_standard.symmetric_memory import SymmetricMemory

    return [PointToPoint, SymmetricMemory]

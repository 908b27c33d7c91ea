"""Exact attention over sequences too long for one device: plans, one engine, and plugins.

``from ring_core import registry; registry.create("standard", causal=True)`` is the way in.
Importing this package imports no torch; names that need it are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ring_core.config import RingAttentionConfig
from ring_core.hookspecs import HOOK_API, Observer, Preset, Variant, hookimpl, hookspec
from ring_core.registry import (
    Registry,
    create_ring_attention,
    create_ring_attention_from_preset,
    registry,
)

if TYPE_CHECKING:
    from ring_core.attention import BaseRingAttention
    from ring_core.communication import RingCommunicationMixin
    from ring_core.softmax import RingAttentionState
    from ring_core.wrapping import WrappedCommunicator, WrappedKernel

_NEED_TORCH = {
    "BaseRingAttention": "ring_core.attention",
    "RingCommunicationMixin": "ring_core.communication",
    "RingAttentionState": "ring_core.softmax",
    "WrappedCommunicator": "ring_core.wrapping",
    "WrappedKernel": "ring_core.wrapping",
}

__all__ = [
    "HOOK_API",
    "BaseRingAttention",
    "Observer",
    "Preset",
    "Registry",
    "RingAttentionConfig",
    "RingAttentionState",
    "RingCommunicationMixin",
    "Variant",
    "WrappedCommunicator",
    "WrappedKernel",
    "create_ring_attention",
    "create_ring_attention_from_preset",
    "hookimpl",
    "hookspec",
    "registry",
]


def __getattr__(name: str) -> object:
    if name in _NEED_TORCH:
        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

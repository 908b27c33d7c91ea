"""The schema of variant ``standard``: the common fields."""

from __future__ import annotations

from ring_core.config import RingAttentionConfig


class StandardConfig(RingAttentionConfig):
    """Exact attention, dense or dilated; the common fields and nothing else."""

    variant: str = "standard"
    """Name under which the registry knows this variant."""

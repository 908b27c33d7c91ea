"""The schema of variant ``standard``: the common fields."""

from __future__ import annotations

from pydantic import field_validator

from ring_core.config import RingAttentionConfig


class StandardConfig(RingAttentionConfig):
    """Exact dense attention; the common fields and nothing else."""

    variant: str = "standard"
    """Name under which the registry knows this variant."""

    @field_validator("segment_lengths", "dilation_rates")
    @classmethod
    def _not_yet(cls, numbers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if numbers is not None:
            raise ValueError(
                "dilated attention is not in this version of ring-attention-standard; leave "
                "segment_lengths and dilation_rates out for dense attention"
            )
        return numbers

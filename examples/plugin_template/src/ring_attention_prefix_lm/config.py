"""The schema of variant ``prefix_lm``: the common fields, a prefix, and a log of transfers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from ring_core import RingAttentionConfig

_NOT_DILATED = "a dilated prefix is not defined; leave it out, or take variant 'standard'"


class PrefixLMConfig(RingAttentionConfig):
    """Prefix language model attention, as in UniLM (arXiv 1905.03197) and T5 (arXiv 1910.10683).

    Query i sees key j if ``j <= i or j < prefix_length``, both counted within their document, and
    if ``window`` lets it.

    Raises:
        ConfigError: a field is unknown, out of range, or means nothing for a prefix.
    """

    refused: ClassVar = {
        "causal": "it would hide what the prefix is there to show; leave it out: tokens behind the "
        "prefix see no later ones in any case",
        "segment_lengths": _NOT_DILATED,
        "dilation_rates": _NOT_DILATED,
    }
    unplanned = ("log_transfers",)

    variant: str = "prefix_lm"
    """Name under which the registry knows this variant."""

    prefix_length: int = Field(ge=0)
    """Tokens at the start of each document that every token of the document sees; of a shorter
    document all tokens."""

    log_transfers: bool = False
    """Whether every rank logs, at INFO, how many bytes of keys and values its calls fetch."""

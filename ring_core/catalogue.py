"""Which pip name brings which variant: data for messages; nowhere else the core names a plugin."""

from __future__ import annotations

PIP_NAMES = {
    "standard": "ring-attention-standard",
    "blocksparse": "ring-attention-blocksparse",
    "hilbert": "ring-attention-hilbert",
    "distributed": "ring-attention-distributed",
}

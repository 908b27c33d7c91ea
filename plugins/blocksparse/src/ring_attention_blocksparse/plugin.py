"""The hooks of this plugin."""

from __future__ import annotations

from typing import Any

from ring_attention_blocksparse import hookspecs
from ring_attention_blocksparse.config import BlockSparseConfig
from ring_core import Variant, hookimpl

RING_HOOK_API = 1


@hookimpl
def ring_hookspecs() -> object:
    return hookspecs


@hookimpl
def ring_variant() -> Variant:
    return Variant(
        config=BlockSparseConfig,
        attention="ring_attention_blocksparse.attention:BlockSparseRingAttention",
        summary="block-sparse attention: windows, sinks, global tokens, grids, random and chosen "
        "blocks; only what is needed is computed and sent",
    )


@hookimpl
def ring_kernels() -> list[Any]:
    from ring_attention_blocksparse.kernels import KERNELS

    return list(KERNELS)

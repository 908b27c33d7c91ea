"""Block-sparse attention through the conformance kit, against the definitions of its patterns."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from ring_attention_blocksparse import reference as patterns_reference
from ring_attention_blocksparse.config import BlockSparseConfig

from ring_core.testing import Case, Conformance
from ring_core.testing.case import visible_of


def shown(case: Case) -> torch.Tensor:
    """bool [B, H, S, S]: the patterns' own reference, batch row by batch row."""
    config = BlockSparseConfig(**case.fields)
    mask = visible_of(case).expand(case.batch, 1, case.q_len, case.k_len)[:, 0]
    if config.patterns is None:
        return mask[:, None]
    q, k, *_ = case.tensors()
    starts = case.cu_seqlens[:-1] if case.cu_seqlens is not None else (0,)
    rows = [
        patterns_reference.shown(
            config.patterns,
            mask[b],
            case.kv_heads,
            block_q=config.block_q,
            block_kv=config.block_kv,
            starts=[start for start in starts if start < case.q_len],
            q=q[b],
            k=k[b],
        )
        for b in range(case.batch)
    ]
    return torch.stack(rows).repeat_interleave(case.heads // case.kv_heads, dim=1)


def small(*patterns: dict[str, Any], block_q: int = 4, block_kv: int = 4, **fields: Any) -> Any:
    return {"patterns": patterns, "block_q": block_q, "block_kv": block_kv, **fields}


LOCAL = {"kind": "local", "left": 6, "right": 2}
SINK = {"kind": "sink", "n": 3}
RANDOM = {"kind": "random", "blocks": 2, "seed": 7}


class TestBlockSparse(Conformance):
    variant = "blocksparse"
    fields = (
        small(LOCAL, causal=True),
        small(SINK, {**LOCAL, "heads": [0]}, RANDOM, causal=True, window=(19, None)),
        small({"kind": "topk", "blocks": 2}, {**RANDOM, "heads": [0]}, block_kv=8),
        small(
            {"kind": "global_tokens", "ids": [0, 13]},
            {"kind": "dilated", "window": 2, "rate": 5},
            block_q=8,
            layout="zigzag",
        ),
    )
    sequences: ClassVar = {
        name: Conformance.sequences[name]
        for name in (
            "odd",
            "shorter than the group",
            "one token",
            "batch",
            "many queries per key",
            "packed batch",
            "padded",
        )
    }
    half: ClassVar = {**Conformance.half, "seq_len": 256}

    def visible(self, case: Case) -> torch.Tensor:
        return shown(case)

    def hidden(self, case: Case) -> torch.Tensor:
        """Where blocks are chosen, all tokens of visible blocks have a say in it."""
        config = BlockSparseConfig(**case.fields)
        if not any(pattern.chosen for pattern in config.patterns):
            return super().hidden(case)
        mask = visible_of(case).expand(case.batch, 1, case.q_len, case.k_len)[:, 0]
        size_q, size_kv = config.block_q, config.block_kv
        first = case.q_len // 2 // size_q * size_q
        seen = mask[:, first : first + size_q].any(1)
        blocks = torch.nn.functional.pad(seen, (0, -case.k_len % size_kv)).unflatten(
            1, (-1, size_kv)
        )
        return ~blocks.any(2).repeat_interleave(size_kv, dim=1)[:, : case.k_len]

"""What queries see under patterns of blocks, from their reference: for the kit's tests."""

from __future__ import annotations

from typing import Any

import torch
from ring_attention_blocksparse import reference
from torch import Tensor

from ring_core import reference as by_fields
from ring_core.order import Order
from ring_core.testing import Case
from ring_core.testing.case import visible_of


def shown(
    case: Case, config: Any, patterns: Any, order: Order | None = None, prefix: int = 0
) -> Tensor:
    """bool [B, H, S, S], or what broadcasts to it where there are no ``patterns``."""
    if patterns is None:
        return visible_of(case)
    q, k, *_ = case.tensors()
    starts = case.cu_seqlens[:-1] if case.cu_seqlens is not None else (0,)
    mask = _mask(case)
    rows = [
        reference.shown(
            patterns,
            mask[b],
            case.kv_heads,
            block_q=config.block_q,
            block_kv=config.block_kv,
            starts=[start for start in starts if start < case.q_len],
            q=q[b],
            k=k[b],
            tokens=None if order is None else order.tokens(),
            prefix=prefix,
        )
        for b in range(case.batch)
    ]
    return torch.stack(rows).repeat_interleave(case.heads // case.kv_heads, dim=1)


def chooses(config: Any) -> bool:
    """Whether tensors have a say in what is seen."""
    return any(pattern.chosen for pattern in config.patterns or ())


def out_of_sight(case: Case, config: Any, order: Order | None = None) -> Tensor:
    """Tokens in no block that the middle query's block sees: bool [B, S]. Where blocks are chosen,
    all tokens of visible blocks have a say in it."""
    tokens = torch.arange(case.q_len) if order is None else order.tokens()
    places = torch.argsort(tokens)
    along = _mask(case)[:, tokens][:, :, tokens]
    first = int(places[case.q_len // 2]) // config.block_q * config.block_q
    seen = along[:, first : first + config.block_q].any(1)
    blocks = torch.nn.functional.pad(seen, (0, -case.k_len % config.block_kv)).unflatten(
        1, (-1, config.block_kv)
    )
    visible = blocks.any(2).repeat_interleave(config.block_kv, dim=1)[:, : case.k_len]
    return ~visible[:, places]


def _mask(case: Case) -> Tensor:
    return visible_of(case).expand(case.batch, 1, case.q_len, case.k_len)[:, 0]


def defined(
    config: Any,
    length: int,
    ends: Any,
    kv_heads: int,
    q: Tensor | None = None,
    k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the definitions show, bool [kv_heads, length, length], and the mask [length, length]."""
    mask = by_fields.visible(
        length, length, causal=config.causal, window=config.window, cu_seqlens=ends
    )
    shown = reference.shown(
        config.patterns,
        mask,
        kv_heads,
        block_q=config.block_q,
        block_kv=config.block_kv,
        starts=ends[:-1],
        q=q,
        k=k,
    )
    return shown, mask

"""Block-sparse attention by FlashAttention-4 (package ``flash-attn-4``, an extra)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from ring_attention_standard.kernels import flash4
from torch import Tensor

from ring_attention_blocksparse.kernels.padded import TILE, Padded, PaddedTables
from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks
from ring_attention_blocksparse.mask import of
from ring_core.dropout import Dropout
from ring_core.masks import Mask
from ring_core.protocols import Problem


class Flash4Blocks(TritonBlocks):
    """Head sizes 64 and 128, half precision, on Hopper.

    It knows tiles of 128 rows. Where the pieces of a tile are others (blocks of other sizes, ranks
    that hold no whole blocks), and where a backward must be bitwise repeatable, the Triton programs
    compute.
    """

    name = "flash4_blocks"
    priority = 30

    def refuse(self, problem: Problem) -> str | None:
        if reason := super().refuse(problem):
            return reason
        if reason := flash4.missing():
            return reason
        if torch.cuda.get_device_capability(problem.device) != (9, 0):
            return "needs compute capability 9.0 (Hopper)"
        if problem.dtype == torch.float32:
            return "float16 and bfloat16 only"
        if problem.head_dim != problem.value_dim or problem.head_dim not in (64, 128):
            return "head sizes 64 and 128 only, of keys and values alike"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        tables = _padded(q, k, mask)
        if tables is None:
            return super().forward(q, k, v, mask, scale=scale, dropout=dropout)
        first, *rest = tables.by_query
        out, lse = self._attend(q, k, v, first, tables.bits, scale)
        for one in rest:
            rows = _inside(one, q)
            out[:, rows], lse[:, :, rows] = self._attend(q[:, rows], k, v, one, tables.bits, scale)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: Dropout | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tables = None if deterministic else _padded(q, k, mask)
        if tables is None:
            return super().backward(
                dout,
                q,
                k,
                v,
                out,
                lse,
                mask,
                scale=scale,
                dropout=dropout,
                deterministic=deterministic,
            )
        first, *rest = tables.by_key
        dq, dk, dv = self._gradients(dout, q, k, v, out, lse, first, tables.bits, scale)
        for one in rest:
            rows = _inside(one, k)
            more, dk[:, rows], dv[:, rows] = self._gradients(
                dout, q, k[:, rows], v[:, rows], out, lse, one, tables.bits, scale
            )
            dq += more
        return dq, dk, dv

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, one: Padded, bits: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash4.interface()._flash_attn_fwd(
            q,
            k,
            v,
            softmax_scale=scale,
            return_lse=True,
            pack_gqa=False,
            **_sparse(one, bits, q, k),
        )
        return out, lse

    def _gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        one: Padded,
        bits: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = flash4.interface()._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, **_sparse(one, bits, q, k)
        )
        return dq, dk, dv


def _padded(q: Tensor, k: Tensor, mask: Mask) -> PaddedTables | None:
    tables = of(mask).tables(q.device)
    if tables.q.total != q.shape[1] or tables.kv.total != k.shape[1]:
        return None  # some rows hold nothing
    return tables.padded


def _inside(one: Padded, x: Tensor) -> Tensor:
    """The rows that x has: its last tile may be smaller."""
    assert one.rows is not None
    return one.rows[one.rows < x.shape[1]]


def _sparse(one: Padded, bits: Tensor, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What the package is told of the lists, for each head of queries."""
    group = q.shape[2] // k.shape[2]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if x.shape[1] > 1 else x

    lists = _lists()(
        spread(one.partial_count),
        spread(one.partial),
        spread(one.full_count),
        spread(one.full),
        block_size=(TILE, TILE),
    )
    slots = spread(one.slots).expand(q.shape[0], q.shape[2], -1, -1)
    return {
        "block_sparse_tensors": lists,
        "mask_mod": _mask(),
        "aux_tensors": [slots, bits.view(-1)],
    }


@cache
def _lists() -> Any:
    return import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch


@cache
def _mask() -> Any:
    from ring_attention_blocksparse.kernels.flash4_mask import shown

    return shown

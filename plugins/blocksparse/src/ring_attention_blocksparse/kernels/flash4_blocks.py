"""Block-sparse attention by FlashAttention-4 (package ``flash-attn-4``, an extra)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from ring_attention_standard.kernels import flash4
from torch import Tensor

from ring_attention_blocksparse.kernels.padded import TILE, Masks, Padded
from ring_attention_blocksparse.kernels.parts import Copies
from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks
from ring_attention_blocksparse.limits import Band, Packed
from ring_attention_blocksparse.mask import of
from ring_attention_blocksparse.tables import Tables
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
        if reason := super().refuse(problem) or flash4.missing("blocksparse"):
            return reason
        if torch.cuda.get_device_capability(problem.device) != (9, 0):
            return "needs compute capability 9.0 (Hopper)"
        if problem.dtype == torch.float32:
            return "float16 and bfloat16 only"
        if problem.head_dim != problem.value_dim or problem.head_dim not in (64, 128):
            return "head sizes 64 and 128 only, of keys and values alike"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float
    ) -> tuple[Tensor, Tensor]:
        padded = _padded(tables, 0, q.shape[1], k.shape[1])
        if padded is None:
            return super().attend(q, k, v, tables, scale)
        out, lse, *_ = flash4.interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, return_lse=True, pack_gqa=False, **_sparse(padded, q, k)
        )
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
        parts = None if deterministic else _parts(of(mask).tables(q.device), q, k)
        if parts is None:
            options: Any = {"scale": scale, "dropout": dropout, "deterministic": deterministic}
            return super().backward(dout, q, k, v, out, lse, mask, **options)

        def gradients(k: Tensor, v: Tensor, lists: Padded) -> list[Tensor]:
            found = flash4.interface()._flash_attn_bwd(
                q, k, v, out, dout, lse, softmax_scale=scale, **_sparse(lists, q, k)
            )
            return list(found)

        (first, _), *cut = parts
        dq, dk, dv = gradients(k, v, first)
        for lists, copies in cut:
            assert copies is not None
            more, *found = gradients(k[:, copies.rows], v[:, copies.rows], lists)
            dq += more
            for x, into in zip(found, (dk, dv), strict=True):
                copies.put(x, 1, into)
        return dq, dk, dv


def _parts(tables: Tables, q: Tensor, k: Tensor) -> list[tuple[Padded, Copies | None]] | None:
    """The lists of keys, if the package takes all of them."""
    found = []
    for part, copies in tables.parts[1]:
        keys = k.shape[1] if copies is None else len(copies.rows)
        padded = _padded(part, 1, q.shape[1], keys)
        if padded is None:
            return None
        found.append((padded, copies))
    return found


def _padded(tables: Tables, side: int, nq: int, nk: int) -> Padded | None:
    if (tables.q.total, tables.kv.total) != (nq, nk):
        return None  # some rows are in no piece
    return tables.padded[side]


def _sparse(lists: Padded, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What the package is told of the lists, for each head of queries."""
    group = q.shape[2] // k.shape[2]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if x.shape[1] > 1 else x

    return {
        "block_sparse_tensors": _lists()(
            spread(lists.partial_count),
            spread(lists.partial),
            spread(lists.full_count),
            spread(lists.full),
            block_size=(TILE, TILE),
        ),
        **_shown(lists.shown, lambda x: spread(x).expand(*q.shape[:3:2], -1, -1)),
    }


def _shown(shown: Band | Packed | Masks, spread: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What a masked pair of tiles shows, as the package asks for it.

    Args:
        spread: to every batch row and head of queries.
    """
    masks, number = _modules()
    if isinstance(shown, Band):
        numbers = (number(-shown.low), number(shown.high - shown.low))
        return {"mask_mod": masks.in_band, "aux_scalars": numbers}
    if isinstance(shown, Packed):
        guards = number(shown.guards)
        if shown.reach is not None:
            tensors, numbers = [shown.at, shown.low], (guards, number(shown.reach))
            return {"mask_mod": masks.reached, "aux_tensors": tensors, "aux_scalars": numbers}
        tensors = [shown.at, shown.low, shown.high]
        return {"mask_mod": masks.within, "aux_tensors": tensors, "aux_scalars": (guards,)}
    return {"mask_mod": masks.by_bit, "aux_tensors": [spread(shown.slots), shown.bits]}


@cache
def _lists() -> Any:
    return import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch


@cache
def _modules() -> tuple[Any, Any]:
    """The masks, and the package's type of whole numbers."""
    from ring_attention_blocksparse.kernels import flash4_mask

    return flash4_mask, import_module("cutlass").Int32

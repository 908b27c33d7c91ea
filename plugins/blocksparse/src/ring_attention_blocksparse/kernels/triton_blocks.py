"""Block-sparse attention on GPUs: Triton programs that go through lists of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_attention_blocksparse.kernels.parts import Part
from ring_attention_blocksparse.mask import BlockMask, join, of
from ring_attention_blocksparse.tables import Lists, Pieces, Tables
from ring_core.dropout import Dropout
from ring_core.masks import Mask
from ring_core.plan import Tile
from ring_core.protocols import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBlocks:
    """Head sizes up to 256, grouped heads, any block size; bitwise repeatable."""

    name = "triton_blocks"
    priority = 20
    supports_dropout = False
    rounds = True

    def refuse(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return "CUDA only"
        if not _is_installed():
            return "needs triton, as torch's CUDA builds for Linux bring it"
        if problem.masks != {BlockMask}:
            return "block-sparse masks only"
        if problem.dtype not in DTYPES:
            return "float16, bfloat16 and float32 only"
        if problem.dropout:
            return "cannot repeat a dropout mask"
        if max(problem.head_dim, problem.value_dim) > 256:
            return "head sizes up to 256 only"
        return None

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return join(tiles)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense(x) for x in (q, k, v))
        (first, _), *cut = _parts(mask, q.device, 0)
        out, lse = self.attend(q, k, v, first, scale)
        for tables, copies in cut:
            assert copies is not None
            copies.merge(out, lse, *self.attend(q[:, copies.rows], k, v, tables, scale))
        return out, lse

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse by the lists of queries."""
        from ring_attention_blocksparse.kernels import programs

        # Rows in no piece see nothing.
        fresh = torch.empty if _covers(tables.q, q.shape[1]) else torch.zeros
        out = fresh(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
        if fresh is torch.zeros:
            lse.fill_(-torch.inf)
        sizes = _Sizes.of(tables, q, k, v).forward
        with _on(q.device):
            programs.forward[sizes.grid(tables.q, sizes.rows_q, q.shape[0] * q.shape[2])](
                q,
                k,
                v,
                out,
                lse,
                *(x.stride() for x in (q, k, v, out, lse)),
                *_tables(tables, tables.by_query),
                len(tables.q),
                q.shape[2],
                q.shape[2] // k.shape[2],
                *_layers(tables),
                scale,
                **sizes.constants,
                **sizes.options,
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
        dout, q, k, v, out = (_dense(x) for x in (dout, q, k, v, out))
        delta = _deltas(dout, out)
        (first, _), *cut = _parts(mask, q.device, 0)
        dq = self._of_queries(dout, q, k, v, lse, delta, first, scale)
        for tables, copies in cut:
            assert copies is not None
            rows = copies.rows
            some = dout[:, rows], q[:, rows], k, v, lse[:, :, rows], delta[:, :, rows]
            copies.put(self._of_queries(*some, tables, scale), 1, dq)
        (first, _), *cut = _parts(mask, q.device, 1)
        dk, dv = self._of_keys(dout, q, k, v, lse, delta, first, scale)
        for tables, copies in cut:
            assert copies is not None
            rows = copies.rows
            found = self._of_keys(dout, q, k[:, rows], v[:, rows], lse, delta, tables, scale)
            for x, into in zip(found, (dk, dv), strict=True):
                copies.put(x, 1, into)
        return dq, dk, dv

    def _of_queries(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tables: Tables,
        scale: float,
    ) -> Tensor:
        """dq by the lists of queries."""
        from ring_attention_blocksparse.kernels import programs

        inputs, by = (dout, q, k, v, lse, delta), _Sizes.of(tables, q, k, v).queries
        dq = _fresh(q, tables.q)
        with _on(q.device):
            programs.query_gradients[by.grid(tables.q, by.rows_q, q.shape[0] * q.shape[2])](
                *inputs,
                dq,
                *(x.stride() for x in (*inputs, dq)),
                *_tables(tables, tables.by_query),
                len(tables.q),
                q.shape[2],
                q.shape[2] // k.shape[2],
                *_layers(tables),
                scale,
                **by.constants,
                **by.options,
            )
        return dq

    def _of_keys(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tables: Tables,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """dk and dv by the lists of keys."""
        from ring_attention_blocksparse.kernels import programs

        inputs, by = (dout, q, k, v, lse, delta), _Sizes.of(tables, q, k, v).keys
        dk, dv = (_fresh(x, tables.kv) for x in (k, v))
        with _on(q.device):
            programs.key_gradients[by.grid(tables.kv, by.rows_kv, q.shape[0] * k.shape[2])](
                *inputs,
                dk,
                dv,
                *(x.stride() for x in (*inputs, dk, dv)),
                *_tables(tables, tables.by_key),
                len(tables.kv),
                k.shape[2],
                q.shape[2] // k.shape[2],
                *_layers(tables),
                scale,
                **by.constants,
                **by.options,
            )
        return dk, dv


def _parts(mask: Mask, device: torch.device, side: int) -> tuple[Part, ...]:
    tables = of(mask).tables(device)
    if isinstance(mask, BlockMask):
        return tables.parts[side]
    return (Part(tables, None),)  # to look for long lists would be to wait for what was chosen


def _deltas(dout: Tensor, out: Tensor) -> Tensor:
    """Sums of dout * out over the head size: float32 [B, H, S]."""
    from ring_attention_blocksparse.kernels import programs

    batch, rows, heads, size = out.shape
    delta = torch.empty(batch, heads, rows, device=out.device)
    with _on(out.device):
        programs.deltas[(-(-rows // 64), batch * heads)](
            dout, out, delta, dout.stride(), out.stride(), rows, heads, size, _power(size), 64
        )
    return delta


@dataclass(frozen=True)
class Shape:
    """What one program holds: rows of queries and of keys; its warps, and stages of its loads."""

    rows_q: int
    rows_kv: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shapes:
    """Of the programs of the forward, of the gradients of queries, and of those of keys."""

    forward: Shape
    queries: Shape
    keys: Shape


def shapes_for(dtype: torch.dtype, head_size: int, block: int, large: bool) -> Shapes:
    """Programs that the shared memory and the registers of a GPU hold; the fastest measured.

    Args:
        block: rows that the largest pieces have on both sides.
        large: whether it has 227 KiB for a program, as Hopper has; else up to 139 KiB are used.
    """
    if dtype != torch.float32 and head_size <= 128 and large:
        if block >= 128:
            return Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 8, 3), Shape(64, 128, 8, 3))
        return Shapes(Shape(64, 64, 4, 3), Shape(64, 64, 4, 2), Shape(32, 64, 4, 3))
    least = 32 if dtype == torch.float32 and head_size > 128 else 64
    return Shapes(*[Shape(least, 32, 4, 2)] * 3)


class _Sizes:
    """What a program is compiled for: the sizes of heads and blocks."""

    @staticmethod
    def of(tables: Tables, q: Tensor, k: Tensor, v: Tensor) -> _AllSizes:
        """For each program."""
        head_size = max(q.shape[-1], v.shape[-1])
        block = min(tables.q.largest, tables.kv.largest)
        shapes = shapes_for(q.dtype, head_size, block, _is_large(q.device))
        return _AllSizes(
            *(_Sizes(x, tables, q, v) for x in (shapes.forward, shapes.queries, shapes.keys))
        )

    def __init__(self, shape: Shape, tables: Tables, q: Tensor, v: Tensor) -> None:
        largest_q, largest_kv = tables.q.largest, tables.kv.largest
        self.rows_q = min(shape.rows_q, _power(largest_q))
        self.rows_kv = min(shape.rows_kv, _power(largest_kv))
        self.constants: dict[str, Any] = {
            "D": q.shape[-1],
            "DV": v.shape[-1],
            "PD": _power(q.shape[-1]),
            "PDV": _power(v.shape[-1]),
            "LARGEST_Q": largest_q,
            "LARGEST_KV": largest_kv,
            "WORDS": -(-largest_kv // 32),
            "LIMITED": tables.limits.packed is not None,
            "BM": self.rows_q,
            "BN": self.rows_kv,
        }
        self.options = {
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }

    def grid(self, pieces: Pieces, rows: int, heads: int) -> tuple[int, int]:
        """Programs for all parts of all pieces, for so many heads."""
        return len(pieces) * -(-pieces.largest // rows), heads


class _AllSizes(NamedTuple):
    forward: _Sizes
    queries: _Sizes
    keys: _Sizes


def _tables(tables: Tables, lists: Lists) -> tuple[Any, ...]:
    bits = tables.bits if len(tables.bits) else tables.bits.new_zeros(1)
    packed = tables.limits.packed
    *limits, guard = (bits, bits, bits, 0) if packed is None else packed[:4]
    pieces = ((x.row, x.size) for x in (tables.q, tables.kv))
    found = lists.start, lists.plain, lists.other, lists.mask, lists.row
    return found, (bits, *limits), guard, *pieces


def _layers(tables: Tables) -> tuple[int, int]:
    """How many layers of lists lie between batch rows, and between heads."""
    return tables.heads if tables.batch > 1 else 0, int(tables.heads > 1)


def _covers(pieces: Pieces, rows: int) -> bool:
    return pieces.total == rows


def _fresh(x: Tensor, pieces: Pieces) -> Tensor:
    """Memory like x; 0 where rows are in no piece."""
    make = torch.empty if _covers(pieces, x.shape[1]) else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def _dense(x: Tensor) -> Tensor:
    """Elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@cache
def _is_large(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= 227 * 1024)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None

"""Merging and adding tiles' results in one pass over memory: a Triton kernel.

Each row of the result is read from every source once and written once, in the result's own dtype;
in between stand float32 registers (float64 for float64). That is the least traffic there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
"""(Row, head) pairs of a program; with D = 128 that keeps 16-byte loads for 4 warps busy."""


def merge_into(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Write the merge of attention over disjoint sets of keys; see :mod:`ring_core.softmax`.

    Args:
        out: [B, S, H, D], elements of a row side by side. lse: [B, H, S], natural log. May be one
            of the sources.
        outs, lses: the sources, shaped alike; where a source's lse is -inf its out is not read.
    """
    _launch(out, lse, outs, lses)


def sum_into(out: Tensor, sources: Sequence[Tensor]) -> None:
    """Write the sum of ``sources``, all [B, S, H, D] like ``out``, which may be one of them."""
    if len(sources) == 2 and all(x.dtype == out.dtype for x in sources):
        torch.add(*sources, out=out)  # in float32 inside, and sooner started
    else:
        _launch(out, None, sources, ())


def _launch(
    out: Tensor, lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> None:
    batch, rows, heads, dim = out.shape
    outs = [x if x.stride(-1) == 1 else x.contiguous() for x in outs]
    programs = triton.cdiv(batch * rows * heads, _ROWS)
    wide = tl.float64 if outs[0].dtype == torch.float64 else tl.float32
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _combine[(programs,)](
            out,
            out.stride()[:3],
            lse,
            () if lse is None else lse.stride(),
            tuple(outs),
            tuple(x.stride()[:3] for x in outs),
            tuple(lses),
            tuple(x.stride() for x in lses),
            batch * rows * heads,
            rows,
            heads,
            dim,
            wide,
            len(outs),
            lse is not None,
            _ROWS,
            triton.next_power_of_2(dim),
        )


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    out,
    out_strides,
    lse,
    lse_strides,
    outs,
    outs_strides,
    lses,
    lses_strides,
    pairs,
    rows,
    heads,
    dim,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    MERGE: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    head = pair % heads
    row = pair // heads % rows
    b = pair // heads // rows
    inside = pair < pairs
    column = tl.arange(0, D)
    box = inside[:, None] & (column < dim)[None, :]
    largest = tl.full([PAIRS], float("-inf"), WIDE)
    if MERGE:
        for i in tl.static_range(N):
            at = b * lses_strides[i][0] + head * lses_strides[i][1] + row * lses_strides[i][2]
            largest = tl.maximum(
                largest, tl.load(lses[i] + at, inside, other=float("-inf")).to(WIDE)
            )
        # exp(-inf - -inf) is NaN; against 0 it is the 0 that an empty row weighs.
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([PAIRS], WIDE)
    summed = tl.zeros([PAIRS, D], WIDE)
    for i in tl.static_range(N):
        strides = outs_strides[i]
        at = (b * strides[0] + row * strides[1] + head * strides[2])[:, None]
        at += column[None, :]
        if MERGE:
            where = b * lses_strides[i][0] + head * lses_strides[i][1] + row * lses_strides[i][2]
            weight = tl.exp(tl.load(lses[i] + where, inside, other=float("-inf")).to(WIDE) - pivot)
            read = box & (weight > 0)[:, None]
            summed += tl.load(outs[i] + at, read, other=0.0).to(WIDE) * weight[:, None]
            total += weight
        else:
            summed += tl.load(outs[i] + at, box, other=0.0).to(WIDE)
    if MERGE:
        seen = total > 0
        summed = summed / tl.where(seen, total, 1.0)[:, None]
        merged = tl.where(seen, pivot + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
        at = b * lse_strides[0] + head * lse_strides[1] + row * lse_strides[2]
        # lse may be a source too, and other warps load it for themselves.
        tl.debug_barrier()
        tl.store(lse + at, merged, inside)
    at = (b * out_strides[0] + row * out_strides[1] + head * out_strides[2])[:, None]
    at += column[None, :]
    tl.store(out + at, summed.to(out.dtype.element_ty), box)

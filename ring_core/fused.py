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

_ELEMENTS = 2048
"""That a program takes of each source: 16-byte loads for the threads of 4 warps."""
MANY = 1 << 24
"""Elements from which on this kernel copies strided rows instead of torch: it is faster, and takes
the processor longer to start. Chosen, not tuned; what it gains stands in benchmarks/tries.md."""


def merge_into(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Write the merge of attention over disjoint sets of keys; see :mod:`ring_core.softmax`.

    Args:
        out: [..., D] of up to six dimensions before the last, elements of a row side by side.
            lse: [...], natural log. Both may be views, and one of the sources.
        outs, lses: the sources, shaped alike; where a source's lse is -inf its out is not read.
    """
    _launch(out, lse, outs, lses)


def sum_into(out: Tensor, sources: Sequence[Tensor]) -> None:
    """Write the sum of ``sources``, shaped like ``out`` [..., D], which may be one of them."""
    if len(sources) == 2 and all(x.dtype == out.dtype for x in sources):
        torch.add(*sources, out=out)  # in float32 inside, and sooner started
    else:
        _launch(out, None, sources, ())


def copy_into(out: Tensor, x: Tensor) -> None:
    """Copy ``x`` [..., D] to ``out``: views of up to six dimensions before the last, any dtypes."""
    _launch(out, None, [x], ())


def copy_chosen_into(out: Tensor, x: Tensor, chosen: Tensor) -> None:
    """Copy those rows of ``x`` [..., D] to ``out`` that ``chosen`` [...] names; the others are
    neither read nor written. Views of up to six dimensions before the last, one dtype."""
    sizes, dim = _indexed(out.shape[:-1], 1), out.shape[-1]
    pairs, columns = out.numel() // dim, triton.next_power_of_2(dim)
    rows = max(1, _ELEMENTS // columns)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _pick[(triton.cdiv(pairs, rows),)](
            out,
            _indexed(out.stride()[:-1], 0),
            x,
            _indexed(x.stride()[:-1], 0),
            chosen,
            _indexed(chosen.stride(), 0),
            pairs,
            sizes,
            x.stride(-1),
            dim,
            pairs > 2**31 - rows,
            rows,
            columns,
        )


def _launch(
    out: Tensor, lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> None:
    sizes, dim = _indexed(out.shape[:-1], 1), out.shape[-1]
    pairs, columns = out.numel() // dim, triton.next_power_of_2(dim)
    rows = max(1, _ELEMENTS // columns)
    outs = [x if x.stride(-1) == 1 else x.contiguous() for x in outs]
    wide = tl.float64 if outs[0].dtype == torch.float64 else tl.float32
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _combine[(triton.cdiv(pairs, rows),)](
            out,
            _indexed(out.stride()[:-1], 0),
            lse,
            () if lse is None else _indexed(lse.stride(), 0),
            tuple(outs),
            tuple(_indexed(x.stride()[:-1], 0) for x in outs),
            tuple(lses),
            tuple(_indexed(x.stride(), 0) for x in lses),
            pairs,
            sizes,
            dim,
            wide,
            len(outs),
            lse is not None,
            pairs > 2**31 - rows,
            rows,
            columns,
        )


def _indexed(sizes: Sequence[int], first: int) -> tuple[int, ...]:
    """Sizes or strides of up to six dimensions as those of six; ``first`` where none is."""
    assert len(sizes) <= 6
    return (first,) * (6 - len(sizes)) + tuple(sizes)


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
    sizes,
    dim,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    MERGE: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64 if WIDE_INDEX else tl.int32) * PAIRS
    pair = first + tl.arange(0, PAIRS)
    inside = pair < pairs
    column = tl.arange(0, D)
    box = inside[:, None] & (column < dim)[None, :]
    largest = tl.full([PAIRS], float("-inf"), WIDE)
    if MERGE:
        for i in tl.static_range(N):
            at = _place(pair, sizes, lses_strides[i])
            largest = tl.maximum(
                largest, tl.load(lses[i] + at, inside, other=float("-inf")).to(WIDE)
            )
        # exp(-inf - -inf) is NaN; against 0 it is the 0 that an empty row weighs.
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([PAIRS], WIDE)
    summed = tl.zeros([PAIRS, D], WIDE)
    for i in tl.static_range(N):
        at = _place(pair, sizes, outs_strides[i])[:, None] + column[None, :]
        if MERGE:
            where = _place(pair, sizes, lses_strides[i])
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
        at = _place(pair, sizes, lse_strides)
        # lse may be a source too, and other warps load it for themselves.
        tl.debug_barrier()
        tl.store(lse + at, merged, inside)
    at = _place(pair, sizes, out_strides)[:, None] + column[None, :]
    tl.store(out + at, summed.to(out.dtype.element_ty), box)


@triton.jit  # type: ignore[untyped-decorator]
def _pick(  # type: ignore[no-untyped-def]
    out,
    out_strides,
    x,
    x_strides,
    chosen,
    chosen_strides,
    pairs,
    sizes,
    x_step,
    dim,
    WIDE_INDEX: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64 if WIDE_INDEX else tl.int32) * PAIRS
    pair = first + tl.arange(0, PAIRS)
    named = tl.load(chosen + _place(pair, sizes, chosen_strides), pair < pairs, other=0) != 0
    column = tl.arange(0, D)
    box = named[:, None] & (column < dim)[None, :]
    at = _place(pair, sizes, x_strides)[:, None] + (column * x_step)[None, :]
    rows = tl.load(x + at, box)
    tl.store(out + _place(pair, sizes, out_strides)[:, None] + column[None, :], rows, box)


@triton.jit
def _place(pair, sizes, strides):  # type: ignore[no-untyped-def]
    """Where elements lie that are counted over six dimensions, the last one fastest."""
    at = (pair % sizes[5]).to(tl.int64) * strides[5]
    rest = pair // sizes[5]
    for i in tl.static_range(4, -1, -1):
        at += (rest % sizes[i]).to(tl.int64) * strides[i]
        rest = rest // sizes[i]
    return at

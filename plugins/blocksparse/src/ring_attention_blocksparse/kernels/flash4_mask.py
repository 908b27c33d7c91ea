"""Masks of tiles in flash-attn-4's language. Importing this needs the package.

Each is asked for one pair of rows. What it costs is what it reads and computes for a pair, which
may be as much as the scores themselves: the order of preference is that of the functions.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def in_band(batch, head, q_row, kv_row, lengths, tensors, numbers):  # type: ignore[no-untyped-def]
    """0 <= y - x + numbers[0] <= numbers[1], in one unsigned comparison."""
    apart = utils.scalar_to_ssa(cutlass.Uint32(kv_row[0] - q_row[0] + numbers[0]), cutlass.Uint32)
    return apart <= utils.scalar_to_ssa(cutlass.Uint32(numbers[1]), cutlass.Uint32)


@cute.jit
def reached(batch, head, q_row, kv_row, lengths, tensors, numbers):  # type: ignore[no-untyped-def]
    """:func:`within` where all queries reach equally far: ``tensors`` are at and low, ``numbers``
    the guards and the reach."""
    at, low = tensors[0][kv_row[0]], tensors[1][q_row[0]]
    return _all_set((at - low) & (low + numbers[1] - at), numbers[0])


@cute.jit
def within(batch, head, q_row, kv_row, lengths, tensors, numbers):  # type: ignore[no-untyped-def]
    """:class:`ring_attention_blocksparse.limits.Packed`: ``tensors`` are at, low and high,
    ``numbers`` the guards."""
    at, low, high = tensors[0][kv_row[0]], tensors[1][q_row[0]], tensors[2][q_row[0]]
    return _all_set((at - low) & (high - at), numbers[0])


@cute.jit
def _all_set(found, guards):  # type: ignore[no-untyped-def]
    clear = utils.scalar_to_ssa(found & guards ^ guards, cutlass.Int32)
    return clear == utils.scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)


@cute.jit
def by_bit(batch, head, q_row, kv_row, lengths, tensors):  # type: ignore[no-untyped-def]
    """:class:`ring_attention_blocksparse.kernels.padded.Masks`: ``tensors`` are slots and bits."""
    slots, bits = tensors[0], tensors[1]
    x, y = q_row[0], kv_row[0]
    first = slots[batch[0], head[0], x >> 7, (y >> 7) & (slots.shape[3] - 1)]
    word = bits[first + ((x & 127) << 2) + ((y & 127) >> 5)]
    one = utils.scalar_to_ssa(word & (1 << (y & 31)), cutlass.Int32)
    return one != utils.scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)

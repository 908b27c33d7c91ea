"""The mask of a tile in flash-attn-4's language. Importing this needs the package."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def shown(batch, head, q_row, kv_row, lengths, tensors):  # type: ignore[no-untyped-def]
    """Whether a query sees a key; ``tensors`` are the slots and the bits of
    :mod:`ring_attention_blocksparse.kernels.padded`. The bits' first stride is 512 words."""
    slots, bits = tensors[0], tensors[1]
    x, y = q_row[0], kv_row[0]
    number = slots[batch[0], head[0], x >> 7, (y >> 7) & (slots.shape[3] - 1)]
    word = bits[number * 512 + ((x & 127) << 2) + ((y & 127) >> 5)]
    one = utils.scalar_to_ssa((word >> (y & 31)) & 1, cutlass.Int32)
    return one > utils.scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)

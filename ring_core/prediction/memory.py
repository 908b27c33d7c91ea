"""What a call holds on one rank at its peak, from its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ring_core.plan import Plan
from ring_core.rounds import Round


@dataclass(frozen=True)
class Sizes:
    """Of a call: heads, head sizes, batch rows, and numbers."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def wide(self) -> int:
        """Bytes of a number of the accumulation dtype."""
        return max(4, self.itemsize)

    @property
    def key_row(self) -> int:
        """Numbers in a row of one KV head, of keys and values, in all batch rows."""
        return (self.head_dim + self.value_dim) * self.batch


def peak_bytes(
    plan: Plan, rounds: Sequence[Round], sizes: Sizes, narrow: bool, overlap: bool
) -> int:
    """Bytes beyond inputs that a rank holds at most, in forward and backward.

    Results, the states that they are put together in, keys that are read and those that arrive
    meanwhile, and their gradients on the way home.

    Args:
        narrow: whether tiles' results come in the inputs' dtype.
    """
    queries = plan.queries.size * sizes.q_heads * sizes.batch
    keys = plan.keys.size * sizes.kv_heads * sizes.key_row
    held = [
        sum(block.rows * block.heads.count(sizes.kv_heads) for block in one.blocks) * sizes.key_row
        for one in rounds
    ]
    following = [*held[1:], 0] if overlap else [0] * len(held)
    arriving = sizes.itemsize * max(a + b for a, b in zip(held, following, strict=True))
    states = not narrow or sum(len(one.tiles) for one in rounds) > 1
    result = queries * (sizes.value_dim * sizes.itemsize + sizes.wide)  # out and lse
    forward = result + arriving + queries * sizes.value_dim * sizes.wide * states
    gradients = queries * sizes.head_dim + keys
    backward = result + arriving + gradients * (sizes.itemsize + sizes.wide * states)
    backward += 2 * max(held) * (sizes.itemsize if narrow else sizes.wide)
    return int(max(forward, backward))

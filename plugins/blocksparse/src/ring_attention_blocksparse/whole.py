"""Patterns of whole blocks: drawn, given as a table, or chosen in each call by the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ring_attention_blocksparse.patterns import Pattern, Positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ring_attention_blocksparse.scene import Blocks, Reach, Scene

_ROUNDS = 4

Table = tuple[tuple[bool, ...], ...]


class Random(Pattern):
    """Distinct visible blocks, drawn for each KV head and query block (BigBird, arXiv
    2007.14062)."""

    kind: Literal["random"] = "random"
    blocks: Positive
    """How many; all, where fewer are visible."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Of the draw: a hash of it, the KV head and the query block, at any world size the same."""

    @property
    def varies(self) -> bool:
        return True

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        from ring_attention_blocksparse.pairs import visible_block, visible_count
        from ring_attention_blocksparse.scene import ragged

        visible = visible_count(scene, q)
        query, place = ragged(visible.clamp_max(self.blocks))
        drawn = _permuted(place, visible[query], self.seed, head, q.index[query])
        return _whole(query, visible_block(scene, q, query, drawn))


class GivenBlocks(Pattern):
    """A table says which query block sees which key block."""

    kind: Literal["blocks"] = "blocks"
    table: Table | tuple[Table, ...]
    """True where a query block sees a key block: a row for each query block; or such a table for
    each KV head. A list or tensor; it may be larger than a sequence needs."""

    @field_validator("table", mode="before")
    @classmethod
    def _listed(cls, table: Any) -> Any:
        table = table.tolist() if hasattr(table, "tolist") else table
        bad = next((one for one in _entries(table) if one not in (0, 1)), None)
        if bad is not None:  # one message, not one for each entry
            raise ValueError(f"entries must be true or false, and one is {bad!r}")
        return table

    @field_validator("table")
    @classmethod
    def _rectangular(cls, table: Any) -> Any:
        tables = table if _depth(table) == 3 else (table,)
        if not tables or len({(len(one), *map(len, one)) for one in tables}) != 1:
            raise ValueError("tables of all heads must be of one size")
        if not tables[0] or len({len(row) for row in tables[0]}) != 1 or not tables[0][0]:
            raise ValueError("every row must have an entry for each key block")
        return table

    @property
    def varies(self) -> bool:
        return _depth(self.table) == 3

    def check(self, scene: Scene) -> str | None:
        rows, columns = self._tensor("cpu").shape[1:]
        if rows >= scene.query_blocks and columns >= scene.key_blocks:
            return None
        return (
            f"the table has {rows} x {columns} blocks, and a sequence of {scene.length} tokens has "
            f"{scene.query_blocks} query blocks of {scene.block_q} and {scene.key_blocks} key "
            f"blocks of {scene.block_kv}"
        )

    @property
    def kv_heads(self) -> int | None:
        return len(self.table) if self.varies else None

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        table = self._tensor(q.device)[head if self.varies else 0]
        query, block = table[q.index].nonzero(as_tuple=True)
        return _whole(query, block)

    def _tensor(self, device: torch.device | str) -> Tensor:
        """bool [heads or 1, query blocks, key blocks]."""
        return _as_tensor(self.table if self.varies else (self.table,), str(device))


class TopK(Pattern):
    """The blocks whose mean keys have the largest products with the mean queries of a block
    (mixture of block attention, arXiv 2502.13189).

    Chosen in each call among the visible blocks, by float32 scores (float64 for float64 inputs);
    the mean is over a block's tokens, and for queries over the heads that a KV head serves. Ties go
    to the lower index. No gradient goes through the choice.
    """

    kind: Literal["topk"] = "topk"
    blocks: Positive
    """How many, those among them that hold the query block's own tokens; all, where fewer are
    visible."""

    @property
    def chosen(self) -> int:
        return self.blocks

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        """What is seen however the choice falls: a block's own tokens."""
        from ring_attention_blocksparse.scene import ragged

        first, last = scene.own(q)
        query, place = ragged(last - first + 1)
        return _whole(query, first[query] + place)


def _whole(query: Tensor, block: Tensor) -> Reach:
    import torch

    from ring_attention_blocksparse.scene import Reach

    sure = torch.ones_like(query, dtype=torch.bool)
    return Reach(query, block, sure, sure)


def _permuted(place: Tensor, size: Tensor, seed: int, head: int, block: Tensor) -> Tensor:
    """Item ``place`` of a permutation of ``size`` numbers that hangs on the other arguments.

    A Feistel network over the next even number of bits, walked until it hits a number below
    ``size`` (Black and Rogaway, CT-RSA 2002): distinct places give distinct numbers.
    """
    import torch

    from ring_core.hashing import mix, mixed

    numbers = torch.tensor([seed, head], device=block.device)
    key = mixed(mixed(mix(numbers[0]), numbers[1], 0), block, 1)
    bits = torch.ceil(torch.log2(size.clamp_min(2).double()) / 2).long()
    low = (1 << bits) - 1

    def once(x: Tensor) -> Tensor:
        left, right = x >> bits, x & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(key, right * _ROUNDS + turn, 2) & low)
        return left << bits | right

    found = once(place)
    while bool((found >= size).any()):
        found = torch.where(found >= size, once(found), found)
    return found


def _entries(table: Any) -> Iterator[Any]:
    """What stands in nested lists."""
    if isinstance(table, (list, tuple)):
        for one in table:
            yield from _entries(one)
    else:
        yield table


def _depth(table: Sequence[Any]) -> int:
    first = table[0] if table else ()
    return 3 if first and isinstance(first[0], Sequence) else 2


@lru_cache(maxsize=16)
def _as_tensor(table: tuple[Table, ...], device: str) -> Tensor:
    import torch

    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.bool, device=device)

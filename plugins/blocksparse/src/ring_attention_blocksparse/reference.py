"""What patterns show, straight from the definitions: slow, obvious, and the measure of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ring_attention_blocksparse.patterns import Pattern

_64 = (1 << 64) - 1


def shown(
    patterns: Sequence[Pattern],
    mask: Tensor,
    kv_heads: int,
    *,
    block_q: int,
    block_kv: int,
    starts: Sequence[int] = (0,),
    q: Tensor | None = None,
    k: Tensor | None = None,
    tokens: Tensor | None = None,
    prefix: int = 0,
) -> Tensor:
    """Which keys the KV heads see of one batch row: bool [kv_heads, length, length].

    Args:
        mask: bool [length, length], causal, window, documents and padding AND-ed.
        starts: where documents begin, ascending.
        q: [length, query heads, D]. k: [length, kv_heads, D]: for patterns that choose.
        tokens: [length], the token at each place of an order: blocks are of places.
        prefix: tokens before the cells of grids.
    """
    length = len(mask)
    if tokens is None:
        tokens = torch.arange(length)
    seen = torch.zeros(kv_heads, length, length, dtype=torch.bool)
    visible = _any_of_blocks(mask[tokens][:, tokens], block_q, block_kv)
    for pattern, head in product(patterns, range(kv_heads)):
        if pattern.heads is None or head in pattern.heads:
            seen[head] |= _pairs(
                pattern, head, visible, block_q, block_kv, starts, mask, q, k, tokens, prefix
            )
    return seen & mask


def density(seen: Tensor, mask: Tensor, block_q: int, block_kv: int) -> float:
    """Block pairs with a visible pair as a share of those that the mask leaves.

    Args:
        seen: bool [kv_heads, length, length]. mask: bool [length, length].
    """
    left = int(_any_of_blocks(mask, block_q, block_kv).sum())
    found = sum(int(_any_of_blocks(one, block_q, block_kv).sum()) for one in seen)
    return found / (len(seen) * left) if left else 0.0


def _pairs(
    pattern: Any,
    head: int,
    visible: Tensor,
    block_q: int,
    block_kv: int,
    starts: Sequence[int],
    mask: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    tokens: Tensor,
    prefix: int,
) -> Tensor:
    found: Tensor
    length = len(mask)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    place = torch.argsort(tokens)
    blocks = place[:, None] // block_q, place[None, :] // block_kv
    match pattern.kind:
        case "local":
            found = (i - pattern.left <= j) & (j <= i + pattern.right)
        case "strided":
            found = (i - j) % pattern.stride == 0
        case "dilated":
            near = (i - j).abs() <= pattern.window * pattern.rate
            found = near & ((i - j) % pattern.rate == 0)
        case "sink":
            start = torch.tensor([max(s for s in starts if s <= t) for t in range(length)])[:, None]
            found = (start <= j) & (j < start + pattern.n)
        case "global_tokens":
            ids = [t for t in pattern.ids if t < length]
            found = torch.zeros(length, length, dtype=torch.bool)
            found[ids, :] = True
            found[:, ids] = True
        case "neighborhood":
            radius = pattern.radius
            if isinstance(radius, int):
                radius = (radius,) * len(pattern.grid)
            found = torch.ones(length - prefix, length - prefix, dtype=torch.bool)
            for axis, (cell, r) in enumerate(zip(_cells(pattern.grid), radius, strict=True)):
                apart = cell[None, :] - cell[:, None]
                found &= apart.abs() <= r
                if axis in pattern.causal_axes:
                    found &= apart <= 0
            found = torch.nn.functional.pad(found, (prefix, 0, prefix, 0))
        case "window_blocks":
            shift = pattern.shift
            if isinstance(shift, int):
                shift = (shift,) * len(pattern.grid)
            found = torch.ones(length - prefix, length - prefix, dtype=torch.bool)
            for cell, size, s in zip(_cells(pattern.grid), pattern.shape, shift, strict=True):
                window = torch.floor((cell - s) / size)
                found &= window[:, None] == window[None, :]
            found = torch.nn.functional.pad(found, (prefix, 0, prefix, 0))
        case "random":
            found = _drawn(pattern, head, visible)[blocks]
        case "blocks":
            table = torch.tensor(pattern.table)
            found = (table[head] if table.ndim == 3 else table)[blocks]
        case "topk":
            if q is None or k is None:
                raise ValueError("topk is chosen by queries and keys: give q and k")
            along = mask[tokens][:, tokens], q[tokens], k[tokens]
            found = _chosen(pattern, head, visible, block_q, block_kv, *along)[blocks]
        case other:
            raise ValueError(f"no definition here of {other!r}")
    return found


def _cells(grid: Sequence[int]) -> list[Tensor]:
    """The coordinates of each token, axis by axis."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return [axis.flatten() for axis in axes]


def _any_of_blocks(mask: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Whether a block lets any of its pairs through: bool [query blocks, key blocks]."""
    rows, columns = (-(-len(mask) // size) for size in (block_q, block_kv))
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for x, y in product(range(rows), range(columns)):
        block = mask[x * block_q : (x + 1) * block_q, y * block_kv : (y + 1) * block_kv]
        found[x, y] = block.any()
    return found


def _drawn(pattern: Any, head: int, visible: Tensor) -> Tensor:
    """The first numbers of a permutation of the visible blocks, one for each query block."""
    table = torch.zeros_like(visible)
    for x, row in enumerate(visible):
        blocks = row.nonzero().flatten().tolist()
        for place in range(min(pattern.blocks, len(blocks))):
            table[x, blocks[_permuted(place, len(blocks), pattern.seed, head, x)]] = True
    return table


def _permuted(place: int, size: int, seed: int, head: int, block: int) -> int:
    """Four Feistel rounds over an even number of bits, again until the number is below ``size``."""
    key = _mix(_mix(_mix(seed) + (head + 1) * _STEPS[0]) + (block + 1) * _STEPS[1])
    bits = math.ceil(math.log2(max(2, size)) / 2)
    low = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & low
        for turn in range(4):
            hashed = _mix(key + (right * 4 + turn + 1) * _STEPS[2])
            left, right = right, left ^ (hashed & low)
        place = left << bits | right
        if place < size:
            return place


# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) and the steps of ring_core.hashing, in whole
# numbers.
_STEPS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7)


def _mix(x: int) -> int:
    x &= _64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64
    return x ^ x >> 31


def _chosen(
    pattern: Any,
    head: int,
    visible: Tensor,
    block_q: int,
    block_kv: int,
    mask: Tensor,
    q: Tensor,
    k: Tensor,
) -> Tensor:
    """The best visible blocks by mean query times mean key; a block's own tokens always."""
    group = q.shape[1] // k.shape[1]
    there = mask.any(1)  # padding is in no mean
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    table = torch.zeros_like(visible)

    def mean(x: Tensor, block: int, size: int) -> Tensor:
        rows = torch.arange(block * size, min((block + 1) * size, len(mask)))
        rows = rows[there[rows]]
        return x[rows].double().mean((0, 1)).to(dtype)

    for x, row in enumerate(visible):
        blocks = row.nonzero().flatten().tolist()
        if not blocks:
            continue
        query = mean(q[:, head * group : (head + 1) * group], x, block_q)
        scores = {
            y: (query.double() @ mean(k[:, head : head + 1], y, block_kv).double()).to(dtype).item()
            for y in blocks
        }
        first, last = x * block_q, min((x + 1) * block_q, len(mask)) - 1
        own = [y for y in blocks if first // block_kv <= y <= last // block_kv]
        others = sorted((y for y in blocks if y not in own), key=lambda y: (-scores[y], y))
        table[x, own + others[: max(0, pattern.blocks - len(own))]] = True
    return table

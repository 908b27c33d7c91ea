"""Rows of a plan as views of tensors, and parts of a shard as one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ring_core.plan import ALL_HEADS, Heads, Rows, Segments
from ring_core.rounds import Block, Part


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """View [B, S, H, D] as [B, S, K, H/K, D]: query heads beside the key/value head they read."""
    return torch.unflatten(x, 2, (kv_heads, -1))


def select(x: Tensor, rows: Rows, heads: Heads = ALL_HEADS, batch: range | None = None) -> Tensor:
    """View [b, repeat, count, k/phases, phases, ...] of what rows, heads and batch name of ``x``
    [B, S, K, ...].

    It shares memory with ``x``, so it can be read and written.
    """
    if batch is not None:
        x = x[batch.start : batch.stop]
    groups = heads.count(x.shape[2]) // heads.phases
    to_row, to_head = x.stride(1), x.stride(2)
    start = x.storage_offset() + rows.start * to_row + heads.start * to_head
    sizes = x.shape[0], rows.repeat, rows.count, groups, heads.phases
    # What is there once has no next one, and the rate by which it would come passes any memory.
    strides = (
        x.stride(0),
        rows.stride * to_row if rows.repeat > 1 else to_row,
        rows.step * to_row if rows.count > 1 else to_row,
        heads.step * to_head if groups > 1 else to_head,
        to_head + rows.slant * to_row,
    )
    return x.as_strided((*sizes, *x.shape[3:]), (*strides, *x.stride()[3:]), start)


def window(x: Tensor, rows: Rows, heads: Heads = ALL_HEADS, batch: range | None = None) -> Tensor:
    """What :func:`select` gives; of :class:`Segments` a copy, which :func:`put` writes back."""
    if isinstance(rows, Segments):
        return _of_heads(x, heads, batch).index_select(1, index(rows, x.device)).unsqueeze(1)
    return select(x, rows, heads, batch)


def put(x: Tensor, rows: Segments, heads: Heads, batch: range | None, found: Tensor) -> None:
    """Write a :func:`window` back."""
    _of_heads(x, heads, batch).index_copy_(1, index(rows, x.device), found.squeeze(1))


def add_segments(
    x: Tensor, rows: Segments, heads: Heads, batch: range | None, added: Tensor
) -> None:
    """Add ``added`` [b, rows, H, D] to some rows and heads of ``x`` [B, S, K, ..., D]."""
    there = _of_heads(x, heads, batch)
    added = added.reshape(*added.shape[:2], *there.shape[2:])
    there.index_add_(1, index(rows, x.device), added.to(x.dtype))


def _of_heads(x: Tensor, heads: Heads, batch: range | None = None) -> Tensor:
    """View [b, S, k/phases, phases, ...] of some heads of ``x`` [B, S, K, ...]."""
    return select(x, Rows(0, x.shape[1]), heads, batch)[:, 0]


@lru_cache(maxsize=1024)
def index(rows: Rows, device: torch.device) -> Tensor:
    """The row indices: int64 on ``device``, where they stay for a while."""
    with torch.inference_mode(False):
        return torch.tensor(rows.indices(), dtype=torch.int64, device=device)


def numel(rows: int, heads: Heads, x: Tensor) -> int:
    """Elements of ``rows`` rows of some heads of a shard like ``x`` [B, S, K, D]."""
    batch, _, kv_heads, dim = x.shape
    return rows * batch * heads.count(kv_heads) * dim


def parts_numel(parts: Sequence[Part], x: Tensor) -> int:
    """Elements of ``parts`` of a shard like ``x`` together."""
    return sum(numel(len(part.rows), part.heads, x) for part in parts)


def blocks_numel(blocks: Sequence[Block], x: Tensor) -> int:
    """Elements of a round's blocks together."""
    return sum(numel(block.rows, block.heads, x) for block in blocks)


def block_views(flat: Tensor, blocks: Sequence[Block], x: Tensor) -> list[Tensor]:
    """A round's buffer as its blocks, [B, rows, heads, D] each.

    Batch rows lie side by side in memory, so that any run of rows is contiguous there.
    """
    return _views(flat, [(block.rows, block.heads) for block in blocks], x)


def part_views(flat: Tensor, parts: Sequence[Part], x: Tensor) -> list[Tensor]:
    """``flat`` as the tensors [B, rows, heads, D] of ``parts``, one behind the other."""
    return _views(flat, [(len(part.rows), part.heads) for part in parts], x)


def _views(flat: Tensor, sizes: Sequence[tuple[int, Heads]], x: Tensor) -> list[Tensor]:
    batch, _, kv_heads, dim = x.shape
    views, start = [], 0
    for rows, heads in sizes:
        stop = start + numel(rows, heads, x)
        shape = rows, batch, heads.count(kv_heads), dim
        views.append(flat[start:stop].view(shape).transpose(0, 1))
        start = stop
    return views


def pack(parts: Sequence[Part], x: Tensor, flat: Tensor) -> None:
    """Copy ``parts`` of the shard ``x`` into ``flat``."""
    for view, part in zip(part_views(flat, parts, x), parts, strict=True):
        chosen = window(x, part.rows, part.heads)
        view.view(chosen.shape).copy_(chosen)


def as_packed(parts: Sequence[Part], x: Tensor) -> Tensor | None:
    """The shard's own memory if ``parts`` already lie in it as :func:`pack` would lay them out."""
    if len(parts) != 1 or parts[0].rows.repeat > 1 or isinstance(parts[0].rows, Segments):
        return None
    chosen = select(x, parts[0].rows, parts[0].heads)[:, 0].transpose(0, 1)
    return chosen.view(-1) if chosen.is_contiguous() else None

"""Rows of a plan as views of tensors, and parts of a shard as one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ring_core.plan import ALL_HEADS, Heads, Part, Rows


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """View [B, S, H, D] as [B, S, K, H/K, D]: query heads beside the key/value head they read."""
    return torch.unflatten(x, 2, (kv_heads, -1))


def select(x: Tensor, rows: Rows, heads: Heads = ALL_HEADS, batch: range | None = None) -> Tensor:
    """View [b, repeat, count, k, ...] of what rows, heads and batch name of ``x`` [B, S, K, ...].

    It shares memory with ``x``, so it can be read and written.
    """
    if batch is not None:
        x = x[batch.start : batch.stop]
    if heads != ALL_HEADS:
        x = x[:, :, heads.start :: heads.step]
    span = (rows.count - 1) * rows.step + 1
    if rows.repeat == 1:
        return x[:, rows.start : rows.start + span : rows.step].unsqueeze(1)
    reach = rows.start + (rows.repeat - 1) * rows.stride + span
    spans = x[:, rows.start : reach].unfold(1, span, rows.stride)  # [b, repeat, k, ..., span]
    return spans.movedim(-1, 2)[:, :, :: rows.step]


def part_shapes(parts: Sequence[Part], x: Tensor) -> list[tuple[int, ...]]:
    """Shapes [B, rows, heads, D] of ``parts`` of a shard like ``x`` [B, S, K, D]."""
    batch, _, kv_heads, dim = x.shape
    return [(batch, len(part.rows), part.heads.count(kv_heads), dim) for part in parts]


def part_numel(parts: Sequence[Part], x: Tensor) -> int:
    """Elements of ``parts`` together."""
    return sum(math.prod(shape) for shape in part_shapes(parts, x))


def part_views(flat: Tensor, parts: Sequence[Part], x: Tensor) -> list[Tensor]:
    """``flat`` as the tensors [B, rows, heads, D] of ``parts``, one behind the other."""
    views, start = [], 0
    for shape in part_shapes(parts, x):
        size = math.prod(shape)
        views.append(flat[start : start + size].view(shape))
        start += size
    return views


def pack(parts: Sequence[Part], x: Tensor, flat: Tensor) -> None:
    """Copy ``parts`` of the shard ``x`` into ``flat``."""
    for view, part in zip(part_views(flat, parts, x), parts, strict=True):
        chosen = select(x, part.rows, part.heads)
        view.view(chosen.shape).copy_(chosen)


def as_packed(parts: Sequence[Part], x: Tensor) -> Tensor | None:
    """The shard's own memory if ``parts`` already lie in it as :func:`pack` would lay them out."""
    if len(parts) != 1:
        return None
    chosen = select(x, parts[0].rows, parts[0].heads)
    return chosen.view(-1) if chosen.is_contiguous() else None


def add_parts_(x: Tensor, parts: Sequence[Part], values: Sequence[Tensor]) -> None:
    """Add tensors [B, rows, heads, D] to the rows of ``x`` that ``parts`` name."""
    for part, value in zip(parts, values, strict=True):
        target = select(x, part.rows, part.heads)
        target.add_(value.view(target.shape).to(x.dtype))


def flat_zeros(parts: Sequence[Part], x: Tensor, dtype: torch.dtype) -> Tensor:
    """A zeroed flat buffer for ``parts`` of a shard like ``x``."""
    return torch.zeros(part_numel(parts, x), dtype=dtype, device=x.device)

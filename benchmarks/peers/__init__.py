"""Contenders: each takes whole tensors' shards and attends, in the process group that is up.

A contender's package is the user's to install; a module here says why it cannot run instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Causal self-attention of [1, tokens, heads, head_dim] over a group."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    group: Any
    documents: tuple[int, ...] | None = None
    """Ends of packed documents, 0 first."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem on this rank.

    Attributes:
        shard: this rank's rows [1, tokens/world, H, D] of a whole tensor.
        attend: out of q, k, v shards; differentiable.
        kernel: family of its tiles' kernel, to choose the ideal it is measured against.
        gather: the whole tensor of all ranks' shards, or None if it cannot say.
        uncounted: bytes of GPU memory that it holds beside torch's allocator.
    """

    name: str
    kernel: str
    shard: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    gather: Callable[[Tensor], Tensor] | None = None
    uncounted: Callable[[], int] = lambda: 0


class CannotRunError(Exception):
    """Why a contender cannot run here."""

"""A byte-level transformer: pre-norm blocks, rotary positions, attention given from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256
"""The vocabulary."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q, k, v [B, S, heads, head_dim] of this rank's rows to their attention output."""


@dataclass(frozen=True)
class ModelSize:
    """How large the model is."""

    width: int = 128
    layers: int = 2
    heads: int = 4

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.heads


class Rotary:
    """Rotations of queries and keys by their global positions.

    Args:
        positions: int64 [S], each row's global token index; -1 for padding.
    """

    def __init__(self, positions: Tensor, head_dim: int, device: torch.device) -> None:
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = positions.clamp_min(0)[:, None, None] * frequencies
        self._cos, self._sin = (x.float().to(device) for x in (angles.cos(), angles.sin()))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, S, heads, head_dim]."""
        first, second = x.chunk(2, dim=-1)
        turned = [first * self._cos - second * self._sin, second * self._cos + first * self._sin]
        return torch.cat(turned, dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.before_attention = nn.LayerNorm(size.width, bias=False)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.joined = nn.Linear(size.width, size.width, bias=False)
        self.before_mlp = nn.LayerNorm(size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(dim=2)
        attended = attend(rotary(q), rotary(k), v)
        x = x + self.joined(attended.flatten(2))
        mlp: Tensor = self.down(F.gelu(self.up(self.before_mlp(x))))
        return x + mlp


class LanguageModel(nn.Module):
    """Predicts each byte from those before it. Weights start as torch's layers draw them."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.logits = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, ids: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Logits [B, S, 256] of the bytes that follow ids [B, S]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rotary, attend)
        logits: Tensor = self.logits(self.norm(x))
        return logits

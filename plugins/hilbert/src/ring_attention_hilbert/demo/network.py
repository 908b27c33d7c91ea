"""Neighbourhood attention over patches: pre-norm blocks, rotary positions in two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the network; ``heads`` divides ``width`` into multiples of 4."""

    width: int = 64
    heads: int = 4
    layers: int = 2


class Rotary2d:
    """Rotations of queries and keys: half of a head by the row of a patch, half by its column.

    Args:
        positions: int64 [S], each row's token; -1 for padding.
    """

    def __init__(self, positions: Tensor, columns: int, head_dim: int) -> None:
        pairs = head_dim // 4
        frequencies = 100.0 ** (-torch.arange(pairs, device=positions.device) / pairs)
        cells = positions.clamp_min(0)
        axes = (cells // columns, cells % columns)
        angles = torch.cat([axis[:, None] * frequencies for axis in axes], 1)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S, H, D] rotated."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)


class Denoiser(nn.Module):
    """From noisy patches [B, S, values] to what it takes for their noise."""

    def __init__(self, values: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.enter = nn.Linear(values, size.width)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.layers))
        last = nn.Linear(size.width, values)
        self.leave = nn.Sequential(nn.LayerNorm(size.width), last)
        self.shortcut = nn.Linear(values, values)  # what a patch says of its own noise
        # It starts with little noise; with none at all, the first gradients would be rounding.
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(self.shortcut.weight)

    def forward(self, noisy: Tensor, rotary: Rotary2d, attend: Attend) -> Tensor:
        x = self.enter(noisy)
        for block in self.blocks:
            x = block(x, rotary, attend)
        noise: Tensor = self.leave(x) + self.shortcut(noisy - 0.5)
        return noise


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, rotary: Rotary2d, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (torch.unflatten(y, -1, (self.heads, -1)) for y in (q, k, v))
        x = x + self.out(attend(rotary(q), rotary(k), v).flatten(2))
        mixed: Tensor = x + self.mlp(self.norms[1](x))
        return mixed

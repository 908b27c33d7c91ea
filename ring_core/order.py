"""Orders of tokens: how a sequence is laid out before it is cut into shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Walk:
    """For pictures: the cells that tokens stand for, one after the other as they are laid out.

    Attributes:
        grid: (height, width), or (frames, height, width); some cells may be no token's.
        cells, tokens: int64, on the CPU, alike long.
    """

    grid: tuple[int, ...]
    cells: Tensor
    tokens: Tensor


class Order(ABC):
    """A permutation of a sequence: which token stands at which place.

    Layouts with an order count in places; masks, positions and results speak of tokens. A subclass
    is a small value, hashable and equal where the permutation is, as a frozen dataclass is.
    """

    @abstractmethod
    def make(self) -> Tensor:
        """The token at each place: int64 [length] on the CPU, each of 0..length-1 once."""

    def walk(self) -> Walk | None:
        """The way through the grid that tokens are the cells of; None where there is no grid."""
        return None

    def tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """The token at each place; kept on ``device`` for a while."""
        return _tokens(self, str(device))

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """The place of each token; kept on ``device`` for a while."""
        return _places(self, str(device))


@lru_cache(maxsize=32)
def _tokens(order: Order, device: str) -> Tensor:
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return order.make() if device == "cpu" else _tokens(order, "cpu").to(device)


@lru_cache(maxsize=32)
def _places(order: Order, device: str) -> Tensor:
    import torch

    with torch.inference_mode(False), torch.no_grad():
        tokens = order.tokens(device)
        places = torch.empty_like(tokens)
        places[tokens] = torch.arange(len(tokens), device=tokens.device)
        return places

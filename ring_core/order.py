"""Orders of tokens: how a sequence is laid out before it is cut into shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Order(ABC):
    """A permutation of a sequence: which token stands at which place.

    Layouts with an order count in places; masks, positions and results speak of tokens. A subclass
    is a small value, hashable and equal where the permutation is, as a frozen dataclass is.
    """

    @abstractmethod
    def make(self) -> Tensor:
        """The token at each place: int64 [length] on the CPU, each of 0..length-1 once."""

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

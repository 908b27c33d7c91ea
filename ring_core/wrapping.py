"""What observers' wrappers start from: all of what they wrap, but for what a subclass overrides.

Attributes that are no methods of the protocol, a communicator's own ones too, are read from what is
wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar

from ring_core.protocols import AttentionKernel, Communicator, Pending, Problem, Selection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ring_core.communication import Counters
    from ring_core.dropout import Dropout
    from ring_core.masks import Mask
    from ring_core.plan import Tile
    from ring_core.rounds import Round


class WrappedCommunicator(Communicator):
    """A communicator that does what another one does.

    Attributes:
        inner: the one that is wrapped.
    """

    name: ClassVar[str]
    priority: ClassVar[int]
    shards: ClassVar[float]
    selects: ClassVar[bool]
    group: Any
    rank: int
    world: int
    counters: Counters

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    @classmethod
    def refuse(cls, group: Any, device: torch.device) -> str | None:
        """Never chosen: an observer puts it around the one that was."""
        return "wraps another communicator"

    def among(self, selection: Selection) -> Communicator:
        inner = self.inner.among(selection)
        if inner is self.inner:
            return self
        other = copy(self)
        other.inner = inner
        return other

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        return self.inner.fetch(one, tensors, tag)

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        return self.inner.give_back(one, gradients, like, tag)


class WrappedKernel(AttentionKernel):
    """A kernel that does what another one does.

    Attributes:
        inner: the one that is wrapped.
    """

    name: str
    priority: int
    supports_dropout: bool
    rounds: bool

    def __init__(self, inner: AttentionKernel) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def refuse(self, problem: Problem) -> str | None:
        return self.inner.refuse(problem)

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return self.inner.lower(tiles)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:
        return self.inner.forward(q, k, v, mask, scale=scale, dropout=dropout)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        *,
        scale: float,
        dropout: Dropout | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            mask,
            scale=scale,
            dropout=dropout,
            deterministic=deterministic,
        )

"""The two things an engine needs from a plugin: something that moves rows, something that attends.

Shapes: B batch, S rows, H query heads, K key/value heads, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ring_core.communication import Counters
    from ring_core.dropout import Dropout
    from ring_core.masks import Mask
    from ring_core.plan import Tile
    from ring_core.rounds import Part, Round


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked whether it can do.

    Attributes:
        ragged: whether ``auto`` asks, for documents of several lengths, or a padded batch: lengths
            that may never come again.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    masks: frozenset[type[Mask]]
    dropout: bool
    deterministic: bool
    ragged: bool = False


@runtime_checkable
class AttentionKernel(Protocol):
    """Attention of one tile. Stateless: the same object serves every layer and thread."""

    name: str
    priority: int
    """Among the kernels that do not refuse, ``auto`` takes the one with the highest."""
    supports_dropout: bool
    """Whether it drops weights by :class:`~ring_core.dropout.Dropout`, in both directions."""
    rounds: bool
    """Whether its results come in the inputs' dtype; else in the accumulation dtype."""

    def refuse(self, problem: Problem) -> str | None:
        """Why this kernel cannot solve ``problem``, or None if it can."""
        ...

    def lower(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        """Tiles that this kernel computes directly and that are ``tiles`` together.

        Every visible pair stands in exactly one of them. It may cut tiles, and join some of one
        block in a :class:`~ring_core.masks.Diagonal`; in all others every row sees some key.

        Args:
            tiles: of one round.
        """
        ...

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
        """Attend: q [B, Sq, H, D], k [B, Sk, K, D], v [B, Sk, K, Dv], any strides.

        Returns:
            out [B, Sq, H, Dv], in q's dtype if the kernel ``rounds``, else in the accumulation
            dtype; lse [B, H, Sq], natural log, float32
            (float64 for float64 inputs), of the scores before dropout. Rows between the pieces of a
            :class:`~ring_core.masks.Diagonal` get out 0 and lse -inf.
        """
        ...

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
        """This tile's gradients, given ``out`` and ``lse`` of the whole attention (merged tiles).

        Returns:
            dq, dk, dv shaped like q, k, v, in the dtype that ``out`` of the forward had; 0 for rows
            and keys between the pieces of a :class:`~ring_core.masks.Diagonal`.
        """
        ...


class Pending(Protocol):
    """A transfer under way. Wait once, then release once its tensors are used up."""

    def wait(self) -> list[Any]:
        """The received tensors; see what started the transfer.

        Raises:
            RingTimeoutError: a peer did not deliver in time; names rank, step and operation.
        """
        ...

    def release(self) -> None:
        """Give the buffers back; the received tensors are invalid from here."""
        ...


@runtime_checkable
class Selection(Protocol):
    """Which of the rows that a plan moves are read in one call, where its tensors decide that; what
    an attention chooses for a call may be one."""

    def rows(self, requester: int, owner: int, part: Part) -> Tensor:
        """Those of ``part``, of the owner's shard, that the requester reads: bool [B, rows, heads];
        both ranks know them."""
        ...


@runtime_checkable
class Communicator(Protocol):
    """Moves rows between the ranks of one group.

    The engine calls the same sequence of transfers, with the same rounds, on every rank; where
    ``shards`` is 1, ranks may leave out rounds that neither give nor take anything. A round's last
    step may be from the rank to itself (offset 0): its rows are copied into their block like the
    others', and their gradients handed back.
    """

    name: ClassVar[str]
    priority: ClassVar[int]
    shards: ClassVar[float]
    """How many shards' worth of fetched keys its rounds may hold; see
    :func:`ring_core.rounds.rounds`."""
    selects: ClassVar[bool]
    """Whether :meth:`among` moves less; if not, ranks do not tell each other what they read."""
    group: Any
    """The process group. Rounds name peers by their place in it."""
    rank: int
    """This process's place in the group."""
    world: int
    """Ranks in the group."""
    counters: Counters

    def __init__(self, group: Any, timeout: float) -> None: ...

    @classmethod
    def refuse(cls, group: Any, device: torch.device) -> str | None:
        """Why this class cannot serve ``group`` with tensors on ``device``, or None if it can."""
        ...

    def among(self, selection: Selection) -> Communicator:
        """One that does as this one does for a single call, of which only what ``selection`` names
        moves, if this class ``selects``: other rows come as zeros, and so do their gradients."""
        ...

    def fetch(self, one: Round, tensors: Sequence[Tensor], tag: int) -> Pending:
        """Start a round: for each step get ``parts`` from ``source``, send ``give`` to
        ``requester``.

        Args:
            tensors: this rank's shards [B, S, K, D], the same number and dtypes on every rank.
            tag: of the call; messages of different tags must not meet where tags exist.

        Returns:
            Waiting gives, for each block, a tuple of [B, rows, heads, D], one per tensor.
        """
        ...

    def give_back(
        self,
        one: Round,
        gradients: Sequence[Sequence[tuple[Tensor, ...]]],
        like: Sequence[Tensor],
        tag: int,
    ) -> Pending:
        """The way home: for each step send gradients of ``parts`` to ``source``, receive those of
        ``give``.

        Args:
            gradients: for each step and each of its parts, one [B, rows, heads, D] per tensor, in
                the dtype that the step's ``rounded`` names.
            like: this rank's shards, for shapes and dtype.

        Returns:
            Waiting gives, for each step and each part of ``give``, one [B, rows, heads, D] per
            tensor, in that dtype too.
        """
        ...

"""What a pattern is, and the kinds that know tokens by their distance or their index.

A kind of your own subclasses :class:`Pattern` and is brought by the hook ``blocksparse_patterns``.
Importing this module imports no torch: it describes configs, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ring_attention_blocksparse.limits import Axis
    from ring_attention_blocksparse.scene import Blocks, Reach, Scene


MOST = 2**62
"""Largest number of tokens or cells that a pattern may name: sums of two stay whole numbers of 64
bits."""
Natural = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]


class Pattern(BaseModel):
    """Which keys a query sees, apart from the mask. Frozen and hashable; JSON round-trips.

    A subclass has a field ``kind``, a ``Literal`` of its name, its own fields, and :meth:`reach`.
    Where it is finer than blocks it has :meth:`sees` too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """Name of the kind."""

    heads: tuple[Natural, ...] | None = Field(default=None, min_length=1)
    """KV heads that have this pattern, each with the query heads that it serves; None: all."""

    @property
    def chosen(self) -> int:
        """How many key blocks are chosen for a query block in each call, by the products of mean
        queries and mean keys; those of :meth:`reach` among them."""
        return 0

    @property
    def is_of_blocks(self) -> bool:
        """Whether only whole blocks are seen: what they hold depends on the order of the tokens."""
        return type(self).sees is Pattern.sees

    @property
    def varies(self) -> bool:
        """Whether heads that have this pattern see different keys."""
        return False

    @property
    def kv_heads(self) -> int | None:
        """How many KV heads there must be; None: any number."""
        return None

    def applies(self, head: int) -> bool:
        """Whether KV head ``head`` has this pattern."""
        return self.heads is None or head in self.heads

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        """Key blocks that some query blocks see, and maybe more, but none left out.

        Time and memory should be in proportion to the answer; :meth:`Scene.between` and
        :meth:`Scene.offsets` make one from tokens.

        Args:
            head: the KV head; it matters only where the pattern ``varies``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reach")

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor | None:
        """Whether query i sees key j: bool, of the shape that both broadcast to.

        Asked of pairs of which :meth:`reach` did not say ``whole``; the mask is looked at apart.
        None: only whole blocks are seen.
        """
        return None

    def limits(self, scene: Scene, i: Tensor, j: Tensor) -> Sequence[Axis] | None:
        """What queries i see of keys j as limits along some axes, which kernels look up faster than
        a bit for each pair; None: it is nothing of the kind.

        Args:
            i, j: tokens, int64 [n] and [m]. An axis whose ``at`` is j itself is that of the tokens.
        """
        return None

    def check(self, scene: Scene) -> str | None:
        """What is wrong with this pattern for a sequence, or None."""
        return None

    def check_heads(self, kv_heads: int) -> str | None:
        """What is wrong with this pattern for so many KV heads, or None."""
        if self.kv_heads not in (None, kv_heads):
            return f"is for {self.kv_heads} KV heads, and there are {kv_heads}"
        if self.heads is not None and max(self.heads) >= kv_heads:
            return f"heads={list(self.heads)}, and there are {kv_heads} KV heads, counted from 0"
        return None


# By distance


class Local(Pattern):
    """``i - left <= j <= i + right``."""

    kind: Literal["local"] = "local"
    left: Natural
    """Tokens before the query."""
    right: Natural
    """Tokens behind it."""

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        return scene.offsets(q, 1, -self.left, self.right)

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        return (j - i >= -self.left) & (j - i <= self.right)

    def limits(self, scene: Scene, i: Tensor, j: Tensor) -> Sequence[Axis]:
        from ring_attention_blocksparse.limits import Axis

        return [Axis(j, i - self.left, i + self.right, scene.length)]


class Strided(Pattern):
    """``(i - j) mod stride = 0`` (Sparse Transformer, arXiv 1904.10509)."""

    kind: Literal["strided"] = "strided"
    stride: Positive
    """Tokens from one seen key to the next."""

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        return scene.offsets(q, self.stride, None, None)

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        return (j - i) % self.stride == 0


class Dilated(Pattern):
    """``abs(i - j) <= window * rate`` and ``(i - j) mod rate = 0`` (Longformer, arXiv
    2004.05150)."""

    kind: Literal["dilated"] = "dilated"
    window: Natural
    """Keys seen on each side."""
    rate: Positive
    """Tokens from one seen key to the next."""

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        return scene.offsets(q, self.rate, -self._far, self._far)

    @property
    def _far(self) -> int:
        return min(self.window * self.rate, MOST)

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        return ((j - i).abs() <= self._far) & ((j - i) % self.rate == 0)


# By index


class Sink(Pattern):
    """The first ``n`` tokens of the query's document (StreamingLLM, arXiv 2309.17453)."""

    kind: Literal["sink"] = "sink"
    n: Positive
    """Tokens at a document's start."""

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        query, start, stop = scene.documents_of(q)
        return scene.between(q, query, start, (start + self.n).minimum(stop) - 1)

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        start, _ = scene.document(i)
        return (start <= j) & (j < start + self.n)

    def limits(self, scene: Scene, i: Tensor, j: Tensor) -> Sequence[Axis]:
        from ring_attention_blocksparse.limits import Axis

        start, _ = scene.document(i)
        return [Axis(j, start, start + self.n - 1, scene.length)]


class GlobalTokens(Pattern):
    """Some tokens see all and are seen by all (Longformer, arXiv 2004.05150)."""

    kind: Literal["global_tokens"] = "global_tokens"
    ids: tuple[Natural, ...] = Field(min_length=1)
    """Indices of the tokens; those behind the end of a sequence have no effect."""

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        import torch

        from ring_attention_blocksparse.scene import Reach

        ids = torch.tensor(
            sorted({token for token in self.ids if token < scene.length}),
            dtype=torch.int64,
            device=q.device,
        )
        each = torch.arange(len(q.index), device=q.device)
        places = scene.places(ids)
        by_query, by_key = (
            torch.bincount(places // size, minlength=-(-scene.length // size))
            for size in (scene.block_q, scene.block_kv)
        )
        inside = by_query[q.index] > 0
        first = torch.zeros_like(each[inside])
        rows = scene.between(q, each[inside], first, first + scene.length - 1)
        # One token of each key block that holds some.
        held = torch.full((scene.key_blocks,), -1, device=q.device)
        held[places // scene.block_kv] = ids
        columns = held[held >= 0]
        query, columns = each.repeat_interleave(len(columns)), columns.repeat(len(each))
        found = Reach.together([rows, scene.between(q, query, columns, columns)])
        # Blocks of such tokens alone see and are seen whole.
        index = q.index[found.query]
        whole = by_query[index] == scene.size_of(index, scene.block_q)
        whole |= by_key[found.block] == scene.size_of(found.block, scene.block_kv)
        some = torch.ones_like(whole) if scene.order is None or scene.is_open else found.some
        return Reach(found.query, found.block, whole, some)

    def sees(self, scene: Scene, i: Tensor, j: Tensor) -> Tensor:
        chosen = _among(self.ids, scene.length, i.device)
        return chosen[i.clamp_max(scene.length - 1)] | chosen[j.clamp_max(scene.length - 1)]


@lru_cache(maxsize=16)
def _among(ids: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Whether each of ``length`` tokens is among ``ids``."""
    import torch

    with torch.inference_mode(False):
        found = torch.zeros(length, dtype=torch.bool, device=device)
        found[[token for token in set(ids) if token < length]] = True
        return found

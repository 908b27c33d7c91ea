"""What a plan is asked for: how many tokens, in which documents, valid in which batch rows."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

from ring_core.errors import InputError
from ring_core.tiling import Document

Kind = Literal["packed", "padded", "cross"]
"""Of sequences that are more than one whole one; packed documents with keys of their own are two of
them."""

_ASKED_BY = {"packed": "cu_seqlens", "padded": "lengths", "cross": "kv_len or kv_cu_seqlens"}


@dataclass(frozen=True)
class Sequences:
    """Tokens of the queries and of the keys, and the documents that they form.

    Attributes:
        q_len, kv_len: tokens along the sequence, padding of the batch counted in.
        documents: in ascending order; a query sees only keys of its own document.
        cross: whether keys were given apart from queries (then ends are aligned).
        lengths: valid tokens of each batch row of a padded batch, if it is one.
    """

    q_len: int
    kv_len: int
    documents: tuple[Document, ...]
    cross: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def batch(self) -> int:
        """Batch rows that the documents speak of; 1 where all rows are alike."""
        return 1 if self.lengths is None else len(self.lengths)

    @property
    def kinds(self) -> frozenset[Kind]:
        """What these are beside one whole sequence that attends to itself."""
        whole = Document(range(self.q_len), range(self.kv_len))
        found: dict[Kind, bool] = {
            "packed": self.lengths is None and self.documents != (whole,),
            "padded": self.lengths is not None,
            "cross": self.cross,
        }
        return frozenset(kind for kind, is_so in found.items() if is_so)

    def refuse(self, *kinds: Kind, why: str) -> None:
        """What a planner calls that knows no sequences of these kinds.

        Raises:
            InputError: these are of one; names the argument of ``plan`` that asked for it, and why.
        """
        for kind in kinds:
            if kind in self.kinds:
                raise InputError(f"{_ASKED_BY[kind]}: {why}")

    @staticmethod
    def build(
        seq_len: Any = None,
        *,
        kv_len: Any = None,
        cu_seqlens: Any = None,
        kv_cu_seqlens: Any = None,
        lengths: Any = None,
    ) -> Sequences:
        """Check and normalise what :meth:`BaseRingAttention.plan` takes.

        Raises:
            InputError: a combination has no meaning, or a number is out of range.
        """
        if cu_seqlens is not None:
            ends = _ends("cu_seqlens", cu_seqlens)
            _agree("seq_len", seq_len, "cu_seqlens", ends[-1])
            if lengths is not None:
                raise InputError(
                    "cu_seqlens and lengths: a batch is either packed or padded; give one"
                )
            if kv_cu_seqlens is None:
                if kv_len is not None:
                    raise InputError("kv_len with packed documents: give kv_cu_seqlens instead")
                return Sequences(ends[-1], ends[-1], _documents(ends, ends))
            kv_ends = _ends("kv_cu_seqlens", kv_cu_seqlens)
            _agree("kv_len", kv_len, "kv_cu_seqlens", kv_ends[-1])
            if len(kv_ends) != len(ends):
                raise InputError(
                    f"cu_seqlens has {len(ends) - 1} documents and kv_cu_seqlens {len(kv_ends) - 1}"
                )
            return Sequences(ends[-1], kv_ends[-1], _documents(ends, kv_ends), cross=True)
        if kv_cu_seqlens is not None:
            raise InputError("kv_cu_seqlens needs cu_seqlens beside it")
        if seq_len is None:
            raise InputError(
                "plan() needs a sequence length: plan(4096) or plan(cu_seqlens=[0, 700, 1303])"
            )
        q_len = _count("seq_len", seq_len)
        if kv_len is not None:
            if lengths is not None:
                raise InputError(
                    "lengths and kv_len: a padded batch of cross-attention is not defined"
                )
            n = _count("kv_len", kv_len)
            return Sequences(q_len, n, (Document(range(q_len), range(n)),), cross=True)
        if lengths is None:
            return Sequences(q_len, q_len, (Document(range(q_len), range(q_len)),))
        valid = tuple(_numbers("lengths", lengths))
        if not valid or min(valid) < 0 or max(valid) > q_len:
            raise InputError(f"lengths {list(valid)}: each must be between 0 and seq_len={q_len}")
        return Sequences(q_len, q_len, tuple(_padded(valid)), lengths=valid)


def _documents(q_ends: Sequence[int], kv_ends: Sequence[int]) -> tuple[Document, ...]:
    return tuple(
        Document(range(*q), range(*kv))
        for q, kv in zip(pairwise(q_ends), pairwise(kv_ends), strict=True)
        if q[1] > q[0] and kv[1] > kv[0]
    )


def _padded(lengths: Sequence[int]) -> Iterable[Document]:
    row = 0
    for length, alike in groupby(lengths):
        rows = len(list(alike))
        if length:
            yield Document(range(length), range(length), range(row, row + rows))
        row += rows


def _ends(name: str, values: Any) -> list[int]:
    ends = _numbers(name, values)
    if len(ends) < 2 or ends[0] != 0 or any(b < a for a, b in pairwise(ends)) or ends[-1] < 1:
        raise InputError(
            f"{name}={_short(ends)}: expected 0 and then the end of each document, ascending, "
            "as in [0, 700, 1303]"
        )
    return ends


def _numbers(name: str, values: Any) -> list[int]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Iterable):
        raise InputError(f"{name}: expected a sequence of whole numbers, got {values!r}")
    return [_int(name, one) for one in listed]


def _agree(name: str, given: Any, source: str, total: int) -> None:
    if given is not None and _count(name, given) != total:
        raise InputError(f"{name}={given} and {source}, which ends at {total}, disagree")


def _count(name: str, value: Any) -> int:
    number = _int(name, value)
    if number < 1:
        raise InputError(f"{name}={number}: must be at least 1")
    return number


def _int(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected whole numbers, got {value!r}") from None


def _short(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"

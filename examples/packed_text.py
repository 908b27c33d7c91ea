"""A text as packed training sequences, and the rows of one that a rank holds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ring_core.attention import BaseRingAttention
from ring_core.demo import document
from ring_core.demo.model import Rotary

NO_LABEL = -100
"""What cross_entropy passes over."""

_SHORTEST = 32


@dataclass(frozen=True)
class Sequence:
    """Several documents one after another.

    Attributes:
        ids: int64 [tokens], bytes. labels: int64 [tokens], the byte after each; NO_LABEL in a
            document's first line, its prompt, and at its end.
        starts: where documents begin, and the number of tokens (``cu_seqlens``).
    """

    ids: Tensor
    labels: Tensor
    starts: tuple[int, ...]


class PackedText:
    """Sequences of ``tokens`` bytes, drawn by number: any rank can make any of them.

    Args:
        path: a text, of which each paragraph is a document; None: the help that comes with Python.
    """

    def __init__(self, path: Path | None, tokens: int) -> None:
        paragraphs = document.load(path).data.split(b"\n\n")
        self._documents = [one + b"\n" for one in paragraphs if len(one) >= _SHORTEST]
        if not self._documents:
            raise ValueError(f"{path} has no paragraph of {_SHORTEST} bytes")
        self._tokens = tokens

    def sequence(self, number: int) -> Sequence:
        """The sequence of this number."""
        draw = random.Random(number)
        ids, labels, starts = bytearray(), [], [0]
        while len(ids) < self._tokens:
            one = draw.choice(self._documents)[: self._tokens - len(ids)]
            prompt = one.find(b"\n", 1)
            following = [*one[1:], NO_LABEL]
            labels += [NO_LABEL if i < prompt else byte for i, byte in enumerate(following)]
            ids += one
            starts.append(len(ids))
        return Sequence(torch.tensor(list(ids)), torch.tensor(labels), tuple(starts))


class Shard:
    """This rank's rows of a sequence.

    Attributes:
        labels: how many bytes to predict are among them; other ranks hold other numbers.
    """

    def __init__(
        self, sequence: Sequence, attention: BaseRingAttention, device: torch.device
    ) -> None:
        self._attention = attention
        self._plan = attention.plan(cu_seqlens=list(sequence.starts))
        self._ids = self._plan.shard(sequence.ids, dim=0).to(device)
        self._targets = self._plan.shard(sequence.labels, dim=0, fill=NO_LABEL).to(device)
        self.labels = int((self._targets != NO_LABEL).sum())

    def loss(self, model: nn.Module, head_dim: int) -> Tensor:
        """Sum of the cross entropies of this rank's labels."""
        rotary = Rotary(self._plan.positions, head_dim, self._ids.device)
        logits = model(self._ids[None], rotary, self._attend)[0]
        return F.cross_entropy(
            logits.float(), self._targets, ignore_index=NO_LABEL, reduction="sum"
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self._attention(q, k, v, plan=self._plan)
        return out

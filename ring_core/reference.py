"""Float64 attention straight from the definitions: slow, obvious, and the measure of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ring_core.dropout import Dropout


def visible(
    q_len: int,
    kv_len: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    kv_cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Which keys each query sees: bool [q_len, kv_len].

    Query i of a document with n keys and m queries stands opposite key i + (n - m): ends aligned.
    Then causal is ``j <= i``, a window ``i - left <= j <= i + right``, all within one document.
    """
    q_ends = list(cu_seqlens) if cu_seqlens is not None else [0, q_len]
    kv_ends = list(kv_cu_seqlens) if kv_cu_seqlens is not None else q_ends
    if cu_seqlens is None:
        kv_ends = [0, kv_len]
    left, right = window if window is not None else (None, None)
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], kv_ends, kv_ends[1:], strict=False):
        i = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        j = torch.arange(k1 - k0)[None, :]
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if causal:
            block &= j <= i
        if left is not None:
            block &= j >= i - left
        if right is not None:
            block &= j <= i + right
        seen[q0:q1, k0:k1] = block
    return seen


def dilated(
    length: int,
    kv_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """How many branches of dilated attention let each query see each key, whatever the mask says.

    LongNet (arXiv 2307.02486, section 2): branch (w, r) cuts each document into segments of w
    tokens, the last of which may be short; KV head h keeps the tokens whose index in the segment is
    ``h mod r`` modulo r; kept queries see kept keys of the same segment. In the softmax a key
    counts once for each branch: multiply a mask by this.

    Returns:
        int64 [kv_heads, length, length].
    """
    ends = list(cu_seqlens) if cu_seqlens is not None else [0, length]
    times = torch.zeros(kv_heads, length, length, dtype=torch.int64)
    for start, stop in pairwise(ends):
        token = torch.arange(stop - start)
        for w, r in zip(segment_lengths, dilation_rates, strict=True):
            together = token[:, None] // w == token[None, :] // w
            for h in range(kv_heads):
                kept = token % w % r == h % r
                times[h, start:stop, start:stop] += together & kept[:, None] & kept[None, :]
    return times


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64, differentiable by autograd.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, K, D]. v: [B, Sk, K, Dv]; H a multiple of K.
        seen: bool [Sq, Sk], or any shape that broadcasts to [B, H, Sq, Sk]; or whole numbers, how
            often each key counts in each query's softmax.
        dropout, seed: drop weights by the hash of :class:`~ring_core.dropout.Dropout`.

    Returns:
        out [B, Sq, H, Dv] and lse [B, H, Sq], float64. A query that sees no key has out 0 and
        lse -inf, and neither it nor a key that no query sees has a gradient.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    seen = seen.to(q.device).expand(scores.shape)
    empty = ~seen.any(-1)
    # A key that counts n times weighs n exp(score): log 0 is -inf, where it does not.
    # An empty row has no softmax: let it see all, so that autograd meets no 0/0, then blank it.
    scores = scores + seen.double().masked_fill(empty[..., None], 1).log()
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0)
    if dropout:
        weights = weights * _everything(q, k, dropout, seed).factor()
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out, lse.masked_fill(empty, -torch.inf)


def _everything(q: Tensor, k: Tensor, p: float, seed: int) -> Dropout:
    def count(n: int) -> Tensor:
        return torch.arange(n, device=q.device)

    rows = len(q)
    return Dropout(
        p,
        seed,
        batch=count(rows),
        heads=count(q.shape[2]),
        q=count(q.shape[1]).expand(rows, -1),
        kv=count(k.shape[1]).expand(rows, -1),
    )


def within_lengths(seen: Tensor, lengths: Sequence[int]) -> Tensor:
    """A padded batch: bool [B, 1, Sq, Sk]; batch row b has only its first lengths[b] tokens."""
    valid_q = torch.arange(seen.shape[0])[None, :] < torch.tensor(list(lengths))[:, None]
    valid_k = torch.arange(seen.shape[1])[None, :] < torch.tensor(list(lengths))[:, None]
    return (seen & valid_q[:, :, None] & valid_k[:, None, :])[:, None]

"""Error of a contender's out and gradients against float64, on a slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from measuring import Entry
from torch import Tensor

ROWS = 256


def errors(entry: Entry, tensors: Sequence[Tensor]) -> dict[str, float] | None:
    """Relative error of causal attention; None if the contender cannot gather its shards.

    out and dq: the last queries, with all their keys, of two heads. dk and dv: the last keys, which
    those queries alone see, of two heads.
    """
    gather = entry.contender.gather
    if gather is None:
        return None
    found = [gather(x).detach() for x in entry.step.both()]
    q, k, v, dout = tensors
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    group, scale = heads // kv_heads, q.shape[3] ** -0.5
    last = torch.arange(tokens - ROWS, tokens, device=q.device)
    seen = torch.arange(tokens, device=q.device)[None] <= last[:, None]
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    for kv_head in (0, kv_heads - 1):
        keys, values = k[0, :, kv_head].double(), v[0, :, kv_head].double()
        dk, dv = torch.zeros_like(keys[last]), torch.zeros_like(values[last])
        for head in range(kv_head * group, (kv_head + 1) * group):
            queries, given = q[0, last, head].double(), dout[0, last, head].double()
            weights = (queries @ keys.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
            right = weights @ values
            delta = (given * right).sum(-1, keepdim=True)
            scores = weights * (given @ values.T - delta) * scale
            dk += scores[:, last].T @ queries
            dv += weights[:, last].T @ given
            pairs["out"].append((found[0][0, last, head], right))
            pairs["dq"].append((found[1][0, last, head], scores @ keys))
        pairs["dk"].append((found[2][0, last, kv_head], dk))
        pairs["dv"].append((found[3][0, last, kv_head], dv))
    return {
        name: float(
            torch.stack([a.double() - b for a, b in each]).norm()
            / torch.stack([b for _, b in each]).norm()
        )
        for name, each in pairs.items()
    }

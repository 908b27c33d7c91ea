"""Where tensors of a rank hold numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ring_core.rank_plan import RankPlan

_KEYS = ("k", "v", "dk", "dv")


def not_finite(plan: RankPlan, tensors: Mapping[str, Tensor]) -> str | None:
    """A sentence that names the tensors of this rank with infinite numbers or NaN in rows that are
    no padding, and the first place; None where all are finite.

    Args:
        tensors: [B, rows, heads, D] by name, in the rows of the plan's tiles.
    """
    found = [text for name, x in tensors.items() if (text := _first(plan, name, x))]
    return "; ".join(found) or None


def _first(plan: RankPlan, name: str, x: Tensor) -> str | None:
    layout = plan.plan.keys if name in _KEYS else plan.plan.queries
    positions = layout.positions(plan.rank)
    x = x.detach()[:, : int((positions >= 0).sum())]
    wrong = ~torch.isfinite(x)
    lengths = plan.sequences.lengths
    if lengths is not None:
        stops = torch.tensor(lengths)[:, None]
        valid = (positions[: x.shape[1]] < stops).to(x.device)
        wrong &= valid[:, :, None, None]
    count = int(wrong.sum())
    if not count:
        return None
    batch, row, head, _ = (int(n) for n in wrong.nonzero()[0])
    return (
        f"{name} holds {count} numbers that are not finite, the first at batch row {batch}, token "
        f"{int(positions[row])}, head {head}"
    )

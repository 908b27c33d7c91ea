"""Rows of heads copied: by torch, or by the fused kernel, whichever is done sooner."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def is_fused(device: torch.device) -> bool:
    """Whether :mod:`ring_core.fused` runs on ``device``."""
    return device.type == "cuda" and find_spec("triton") is not None


def pays(x: Tensor) -> bool:
    """Whether the fused kernel moves ``x`` sooner than torch would."""
    if not is_fused(x.device):
        return False
    from ring_core import fused

    return x.numel() >= fused.MANY


def copy(target: Tensor, x: Tensor) -> None:
    """Copy ``x`` [..., D] to ``target``: views, of up to six dimensions before the last."""
    if pays(x):
        from ring_core.fused import copy_into

        copy_into(target, x)
    else:
        target.copy_(x)


def copy_chosen(target: Tensor, x: Tensor, chosen: Tensor) -> None:
    """Copy those rows of ``x`` [..., D] to ``target`` that ``chosen`` [...] names.

    The others are not touched: they do not pass a link that the target lies behind, and somebody
    else may be writing them.
    """
    if is_fused(x.device):
        from ring_core.fused import copy_chosen_into

        copy_chosen_into(target, x, chosen)
    else:
        target[chosen] = x[chosen]


def shaped(window: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of that shape; strided rows, of which there is none, are copied together."""
    if not pays(window):
        return window.reshape(shape)
    try:
        return window.view(shape)
    except RuntimeError:
        together = torch.empty(window.shape, dtype=window.dtype, device=window.device)
        copy(together, window)
        return together.view(shape)

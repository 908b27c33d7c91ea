"""Head sizes that a kernel does not take, padded with zeros: scores and outputs stay the same."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def padded(x: Tensor, size: int) -> Tensor:
    """``x`` [..., D] with zeros behind it up to D = ``size``."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def ready(x: Tensor, size: int) -> Tensor:
    """``x`` padded to D = ``size``, elements of a row side by side."""
    x = padded(x, size)
    return x if x.stride(-1) == 1 else x.contiguous()


def common_size(head_dim: int, value_dim: int, multiple: int = 1) -> int:
    """The head size for a kernel that wants one for keys and values, and a multiple of that."""
    return -(-max(head_dim, value_dim) // multiple) * multiple

"""What is timed and compared: an attention on one rank's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Step:
    """An attention's forward, and its forward with backward.

    Args:
        attend: gives out of q, k and v.
        tensors: q, k, v and the gradient of out.
    """

    def __init__(self, attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        *inputs, self.dout = (x.detach() for x in tensors)
        self.attend, self.leaves = attend, [x.requires_grad_() for x in inputs]

    def forward(self) -> Tensor:
        """Out, of which no gradient can be taken."""
        with torch.no_grad():
            return self.attend(*self.leaves)

    def both(self) -> list[Tensor]:
        """Out and the gradients of q, k and v."""
        out = self.attend(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)]

    def warm(self, times: int = 3) -> None:
        """Compile, allocate, and whatever else the first runs do beside."""
        for run in (self.forward, self.both):
            for _ in range(times):
                run()

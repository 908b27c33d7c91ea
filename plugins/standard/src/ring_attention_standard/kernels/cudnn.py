"""cuDNN's attention as torch calls it: the fastest that ships with torch on Hopper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attention_standard.kernels.bands import cut
from ring_attention_standard.kernels.rectangles import Rectangles
from ring_attention_standard.kernels.varlen import Ends
from ring_core.masks import CAUSAL, FULL, Band
from ring_core.plan import Tile
from ring_core.protocols import Problem

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


class Cudnn(Rectangles):
    """Triangles with aligned first corners."""

    name = "cudnn"
    priority = 20
    head_sizes = range(8, 129, 8)
    least = 64  # its backward has no plan for single rows
    few = 2048  # a call takes the processor as long as so many rows take with FlashAttention-2

    def refuse(self, problem: Problem) -> str | None:
        if reason := super().refuse(problem):
            return reason
        if problem.ragged:
            return "takes a tenth of a second to plan each new length; kernel='cudnn' insists on it"
        return "its backward is not bitwise repeatable" if problem.deterministic else None

    def is_triangle(self, nq: int, nk: int, band: Band) -> bool:
        return band == CAUSAL

    def pieces(self, tile: Tile) -> Sequence[Tile]:
        return cut(tile, lambda nq, nk, band: band in (FULL, CAUSAL), block=1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Ends | None, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _forward(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        ends: Ends | None,
        *,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = q.shape[1], k.shape[1]
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        dq, dk, dv = _backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
            lse.unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            rows,
            keys,
            0.0,
            causal,
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

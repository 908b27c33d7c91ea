"""A small real run: sharded attention compared with the definition, on the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ring_core import reference
from ring_core.choice import choose
from ring_core.config import RingAttentionConfig
from ring_core.groups import resolve
from ring_core.launching import Worker
from ring_core.registry import registry

LENGTH = 509
"""Tokens: a prime, so that shards are padded."""

_SHAPES = {"q": (1, LENGTH, 4, 64), "k": (1, LENGTH, 2, 64), "v": (1, LENGTH, 2, 64)}


@dataclass(frozen=True)
class SmokeResult:
    """What a rank saw.

    Attributes:
        errors: of the output and each gradient, in the Frobenius norm, relative to the reference.
        communicators: the best first, each with its reason to refuse this group, or None.
    """

    errors: dict[str, float]
    communicators: dict[str, str | None]


def smoke(worker: Worker, dtype: str) -> SmokeResult:
    """Attend forward and backward, sharded. A task for :func:`ring_core.launching.launch`."""
    inputs, dout = _inputs(getattr(torch, dtype), worker.device)
    attention = registry.create("standard", causal=True)
    plan = attention.plan(LENGTH)
    shards = [plan.shard(x).requires_grad_() for x in inputs]
    out = attention(*shards, plan=plan)
    torch.autograd.backward(out, plan.shard(dout))
    found = [plan.unshard(x) for x in (out.detach(), *_gradients(shards))]
    names = ("out", "dq", "dk", "dv")
    return SmokeResult(
        errors={
            name: float((mine.double() - right).norm() / right.norm())
            for name, mine, right in zip(names, found, _expected(inputs, dout), strict=True)
        },
        communicators=_communicators(worker.device),
    )


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the output's gradient, whole and the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*_SHAPES.values(), _SHAPES["q"])
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return drawn[:3], drawn[3]


def _expected(inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    whole = [x.double().requires_grad_() for x in inputs]
    seen = reference.visible(LENGTH, LENGTH, causal=True)
    out, _ = reference.attention(whole[0], whole[1], whole[2], seen)
    torch.autograd.backward(out, dout.double())
    return [out.detach(), *_gradients(whole)]


def _gradients(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _communicators(device: torch.device) -> dict[str, str | None]:
    classes = registry.communicators(RingAttentionConfig())
    group = resolve(None)
    return choose(classes, lambda kind: kind.refuse(group, device)).refusals

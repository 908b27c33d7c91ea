"""A case through a communicator whose rounds may hold several shards, and kernels that round."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from ring_attention_standard.kernels.eager import Eager
from ring_attention_standard.kernels.varlen import joined

from ring_core import BaseRingAttention, WrappedKernel
from ring_core.rounds import elements_fetched, elements_sent
from ring_core.testing import Case, Worker
from ring_core.testing.case import Result, gathered
from ring_core.testing.tasks import build


class Rounding(WrappedKernel):
    """A kernel whose results come in the inputs' dtype; exact where that is float64."""

    rounds = True


class Joining(Eager):
    """A kernel that computes several tiles in one call, as those for packed documents do."""

    def lower(self, tiles):
        return joined(tiles, lambda nq, nk, band: "any")


def one_sided(worker: Worker, attention: BaseRingAttention, shards: float) -> Any:
    """Have the attention move its rows through shared memory, and give what moves them."""
    from ring_attention_standard.symmetric_memory import SymmetricMemory

    from shared_files import FileRegion

    communicator = SymmetricMemory(worker.group, 60.0, FileRegion(worker.group))
    communicator.shards = shards
    attention.runtime._communicators.setdefault(worker.group, {})["cpu"] = communicator
    return communicator


def run_in_rounds(
    worker: Worker, case: Case, shards: float, kernel: str, chooses: bool = False
) -> Result | None:
    """The case through rounds of several steps; of one step each where one shard may be held.

    Args:
        chooses: whether the tensors decide what travels, and not the plan.
    """
    from ring_attention_standard.point_to_point import PointToPoint

    attention, plan, (q, k, v, dout, dlse) = build(worker, case)
    runtime = attention.runtime
    if shards == 1:
        communicator = PointToPoint(worker.group, 60.0)
        runtime._communicators.setdefault(worker.group, {})["cpu"] = communicator
    else:
        communicator = one_sided(worker, attention, shards)
    plain = runtime.kernel
    if kernel == "rounding":
        runtime.kernel = lambda problem: Rounding(plain(problem))
    elif kernel == "joining":
        runtime.kernel = lambda problem: Rounding(Joining())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, plan=plan, return_lse=True)
    torch.autograd.backward((out, lse), (dout, dlse))
    names = [] if shards == 1 else communicator._region.barriers
    assert all(a != b for a, b in pairwise(names)), "a word could be set before it was seen"
    elements = elements_sent(plan.plan, plan.rank, case.kv_heads)
    fetched = elements_fetched(plan.plan, plan.rank, case.kv_heads)
    width = case.batch * (case.head_dim + case.value_dim) * 8
    planned = (2 * elements + fetched) * width
    sent = communicator.counters.bytes_sent
    assert chooses or sent == planned
    whole = gathered(plan, out, lse, *(x.grad for x in leaves))
    return whole if worker.rank == 0 else None

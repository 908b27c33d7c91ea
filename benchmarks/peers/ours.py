"""This project's standard variant, on the group and on one GPU."""

from __future__ import annotations

import torch.distributed as dist

from peers import CannotRunError, Contender, Problem
from ring_core import registry
from ring_core.errors import RingError


def contender(problem: Problem, kernel: str, **fields: object) -> Contender:
    """``kernel``: ``cudnn``, ``flash4`` or ``flash``; further fields of the config."""
    name = ", ".join(["ours", *(f"{key}={value}" for key, value in fields.items())])
    return _contender(name, problem, kernel, problem.group, **fields)


def alone(problem: Problem, kernel: str) -> Contender:
    """The whole sequence on this GPU: a call without peers is the kernel and nothing else."""
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return _contender("one GPU", problem, kernel, group)


def _contender(
    name: str, problem: Problem, kernel: str, group: object, **fields: object
) -> Contender:
    attention = registry.create("standard", causal=True, kernel=kernel, group=group, **fields)
    documents = problem.documents
    plan = attention.plan(problem.tokens if documents is None else None, cu_seqlens=documents)

    def attend(q, k, v):
        try:
            return attention(q, k, v, plan=plan)
        except RingError as error:
            raise CannotRunError(str(error)) from error

    def uncounted():
        return getattr(attention.communicator(plan, "cuda"), "shared_bytes", 0)

    return Contender(name, kernel, plan.shard, attend, plan.unshard, uncounted)

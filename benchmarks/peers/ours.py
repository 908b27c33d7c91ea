"""This project's standard variant."""

from __future__ import annotations

from peers import CannotRunError, Contender, Problem
from ring_core import registry
from ring_core.errors import RingError


def contender(problem: Problem, kernel: str, **fields: object) -> Contender:
    """``kernel``: ``cudnn``, ``flash4`` or ``flash``; further fields of the config."""
    attention = registry.create(
        "standard", causal=True, kernel=kernel, group=problem.group, **fields
    )
    documents = problem.documents
    plan = (
        attention.plan(problem.tokens)
        if documents is None
        else attention.plan(cu_seqlens=documents)
    )

    def attend(q, k, v):
        try:
            return attention(q, k, v, plan=plan)
        except RingError as error:
            raise CannotRunError(str(error)) from error

    name = ", ".join(["ours", *(f"{key}={value}" for key, value in fields.items())])
    return Contender(name, kernel, plan.shard, attend, plan.unshard)

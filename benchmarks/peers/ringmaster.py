"""The package axolotl-ringmaster, imported as ringmaster: its zigzag ring over FlashAttention-2."""

from __future__ import annotations

import importlib

from peers import CannotRunError, Contender, Problem, torch_flash, zigzag


def contender(problem: Problem) -> Contender:
    """Over the kernels that it finds through transformers, or else over torch's copy of them."""
    if problem.documents is not None:
        raise CannotRunError("measured on one sequence")
    try:
        ring = importlib.import_module("ringmaster.ring.zigzag")
    except Exception as error:
        raise CannotRunError(f"{type(error).__name__}: {error}") from error
    if ring._flash_ops() is None:
        ring._flash_ops = lambda: (torch_flash.forward, torch_flash.backward)

    def attend(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return ring.zigzag_ring_attention(*heads_first, group=problem.group, scaling=None)

    shard, gather = zigzag.of(problem.group)
    return Contender("ringmaster zigzag", "flash", shard, attend, gather)

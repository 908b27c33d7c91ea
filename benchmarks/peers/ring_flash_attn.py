"""The package ring-flash-attn: its zigzag ring over FlashAttention-2."""

from __future__ import annotations

import importlib
import sys
import types

import torch
import torch.distributed as dist

from peers import CannotRunError, Contender, Problem


def contender(problem: Problem) -> Contender:
    """Over the package flash-attn, or where that is not installed over torch's own copy of it."""
    if problem.documents is not None:
        raise CannotRunError("measured on one sequence")
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        _lend_flash_attn()
    # Its patches for transformers import names that come and go there; the ring needs none of them.
    patches = types.ModuleType("ring_flash_attn.adapters")
    patches.substitute_hf_flash_attn = patches.update_ring_flash_attn_params = None
    sys.modules.setdefault("ring_flash_attn.adapters", patches)
    try:
        function = importlib.import_module("ring_flash_attn").zigzag_ring_flash_attn_func
    except Exception as error:
        raise CannotRunError(f"{type(error).__name__}: {error}") from error
    rank, world = dist.get_rank(problem.group), dist.get_world_size(problem.group)

    def shard(x):
        chunks = x.chunk(2 * world, dim=1)
        return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim=1)

    def gather(x):
        shards = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(shards, x.contiguous(), group=problem.group)
        halves = [one.chunk(2, dim=1) for one in shards]
        return torch.cat([one[0] for one in halves] + [one[1] for one in halves[::-1]], dim=1)

    def attend(q, k, v):
        return function(q, k, v, causal=True, group=problem.group)

    return Contender("ring-flash-attn zigzag", "flash", shard, attend, gather)


def _lend_flash_attn() -> None:
    """The two functions that it calls, over the same kernels as torch ships them."""
    aten = torch.ops.aten

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    ):
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
        )
        return out, lse, None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        rng_state=None,
    ):
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        found = aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            unused,
            unused,
            scale=softmax_scale,
        )
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            target.copy_(gradient)

    package = sys.modules.get("flash_attn") or types.ModuleType("flash_attn")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = _flash_attn_forward
    interface._flash_attn_backward = _flash_attn_backward
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, None)
    package.flash_attn_interface = interface
    sys.modules.setdefault("flash_attn", package)
    sys.modules["flash_attn.flash_attn_interface"] = interface

"""The two functions of flash-attn that peers call, over the same kernels as torch ships them."""

from __future__ import annotations

import torch

_aten = torch.ops.aten


def forward(
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
    """``flash_attn_interface._flash_attn_forward``: out and lse, and two that nobody reads."""
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
    )
    return out, lse, None, None


def backward(
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
    """``flash_attn_interface._flash_attn_backward``: writes dq, dk and dv."""
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    found = _aten._flash_attention_backward(
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

"""The package ring-flash-attn: its zigzag ring over FlashAttention-2."""

from __future__ import annotations

import importlib
import sys
import types

from peers import CannotRunError, Contender, Problem, torch_flash, zigzag


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

    def attend(q, k, v):
        return function(q, k, v, causal=True, group=problem.group)

    shard, gather = zigzag.of(problem.group)
    return Contender("ring-flash-attn zigzag", "flash", shard, attend, gather)


def _lend_flash_attn() -> None:
    package = sys.modules.get("flash_attn") or types.ModuleType("flash_attn")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = torch_flash.forward
    interface._flash_attn_backward = torch_flash.backward
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, None)
    package.flash_attn_interface = interface
    sys.modules.setdefault("flash_attn", package)
    sys.modules["flash_attn.flash_attn_interface"] = interface

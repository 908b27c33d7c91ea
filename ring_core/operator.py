"""The attention as one operator of torch's dispatcher: ``ring_attention::attend``.

``torch.compile`` keeps it whole in its graph, and selective activation checkpointing can name it
and keep its output instead of repeating its communication. Attentions and plans travel as numbers:
the operator looks up what they stand for. The attention's number is a tensor: as a plain number it
would be a constant of the graph, and each layer of a model would be compiled for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ring_core.compiling import untraced
from ring_core.errors import DifferentiationError, InputError
from ring_core.given import Given
from ring_core.softmax import accumulation_dtype

if TYPE_CHECKING:
    from ring_core.attention import BaseRingAttention
    from ring_core.rank_plan import RankPlan

_numbers = count(1)
_known: WeakValueDictionary[int, Any] = WeakValueDictionary()
_recent: deque[Any] = deque(maxlen=64)

NO_PLAN = 0
"""Stands for the plan that the inputs' shape implies."""


def number_of(thing: Any, keep: bool = False) -> int:
    """A number that stands for ``thing`` in this process while it lives.

    Args:
        keep: have it live a while, though nobody may hold it between a graph's forward and
            backward.
    """
    number = next(_numbers)
    _known[number] = thing
    if keep:
        _recent.append(thing)
    return number


def attend(
    attention: Tensor, plan: int, q: Tensor, k: Tensor, v: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Out and lse of a call; see :meth:`ring_core.attention.BaseRingAttention.forward`."""
    graph = torch.is_grad_enabled()
    wants = [graph and x.requires_grad for x in (q, k, v)]
    out, lse, _ = torch.ops.ring_attention.attend(q, k, v, attention, plan, training, wants)
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Tensor,
    plan: int,
    training: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse, and what the backward must know of the call: its number and seed, int64 [2]."""
    module, rank_plan = _meant(attention, plan)
    call = module.begin(q, k, v, rank_plan, training, (wants[0], wants[1], wants[2]))
    out, lse = call.forward(q, k, v)
    return out.contiguous(), lse.contiguous(), torch.tensor([call.number, call.seed])


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, attention: Tensor, plan: int, training: bool, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    return (
        q.new_empty(batch, rows, heads, v.shape[-1]),
        q.new_empty(batch, heads, rows, dtype=accumulation_dtype(q.dtype)),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


def _attend_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Tensor,
    attention: Tensor,
    plan: int,
    training: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    module, rank_plan = _meant(attention, plan)
    number, seed = call.tolist()
    again = module.resume(
        q, k, v, rank_plan, training, (wants[0], wants[1], wants[2]), number, seed
    )
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = again.backward(Given(dout, dlse, q, k, v, out, lse))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attend_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, attention, plan, training, wants = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)
    ctx.rest = attention, plan, training, wants
    if type(attention) is Tensor and type(plan) is int:  # not while a graph is traced
        ctx.alive = _known.get(int(attention)), _known.get(plan)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    found = torch.ops.ring_attention.attend_backward(dout, dlse, *ctx.saved_tensors, *ctx.rest)
    wanted = ctx.needs_input_grad
    gradients = [x if wanted[i] else None for i, x in enumerate(found)]
    return (*gradients, None, None, None, None)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise DifferentiationError(
        "ring attention is differentiable once: these gradients were computed with "
        "create_graph=True, and cannot be differentiated again; compute this layer with dense "
        "attention"
    )


_library: Any = torch.library.Library("ring_attention", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    keep: Callable[..., None] | None = None,
) -> None:
    """An operator, as torch.library.custom_op makes it; that imports the compiler at the first
    call, whether or not anybody compiles."""
    name = "ring_attention::" + schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", untraced(function), lib=_library)
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, backward, setup_context=keep, lib=_library)


_define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor attention, SymInt plan, bool training, "
    "bool[] wants) -> (Tensor, Tensor, Tensor)",
    _attend,
    _attend_fake,
    _differentiate,
    _keep,
)
_define(
    "attend_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor call, Tensor attention, SymInt plan, bool training, bool[] wants) "
    "-> (Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_fake,
    _refuse,
)

# A rank whose output nobody uses must make the call all the same: its peers do.
torch.fx.node.has_side_effect(torch.ops.ring_attention.attend.default)


def _meant(attention: Tensor, plan: int) -> tuple[BaseRingAttention, RankPlan | None]:
    try:
        return _known[int(attention)], None if plan == NO_PLAN else _known[plan]
    except KeyError as error:
        raise InputError(
            "the attention or the plan of this call is gone: keep both while graphs that were "
            "compiled with them, or backwards of their calls, are still to run"
        ) from error

"""The attention as one operator: whole in a compiled graph, and kept by selective checkpointing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ring_core import reference, registry
from ring_core.errors import InputError
from ring_core.operator import NO_PLAN
from ring_core.testing import Case, RankPool, Worker
from ring_core.testing.tasks import build


def leaves(*shape: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def test_the_operator_keeps_torchs_contract():
    """Schema, shapes without data, autograd, and tracing, as torch.library.opcheck tries them."""
    attention = registry.create("standard", causal=True)
    plan = attention.plan(12)
    for number in (plan.number, NO_PLAN):
        arguments = (*leaves(1, 12, 2, 4), attention._number, number, False, [True] * 3)
        torch.library.opcheck(torch.ops.ring_attention.attend.default, arguments)


def test_a_compiled_model_is_one_graph():
    attention = registry.create("standard", causal=True)
    plan = attention.plan(12)
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    @partial(torch.compile, backend=backend, fullgraph=True)
    def model(x):
        return attention(x * 2, x, x, plan=plan) + x

    x = leaves(1, 12, 2, 4)[0]
    seen = reference.visible(12, 12, causal=True)
    assert torch.allclose(model(x), reference.attention(x * 2, x, x, seen)[0] + x, atol=1e-12)
    assert len(graphs) == 1
    assert sum("ring_attention.attend" in str(target) for target in graphs[0]) == 1


def test_lengths_that_change_do_not_compile_again_and_again():
    attention = registry.create("standard", causal=True)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.compile(lambda x, plan: attention(x, x, x, plan=plan) * 1.0, backend=backend)
    for length in (8, 9, 12, 15, 20, 31):
        x = torch.randn(1, length, 2, 4, dtype=torch.float64)
        seen = reference.visible(length, length, causal=True)
        right = reference.attention(x, x, x, seen)[0]
        assert torch.allclose(model(x, attention.plan(length)), right, atol=1e-12)
    assert len(compiled) <= 3


def sent_in_training(worker: Worker, how: str) -> tuple[int, list[torch.Tensor]]:
    """Bytes that one block's forward and backward send, and its gradients."""
    case = Case(fields={"causal": True}, seq_len=32)
    attention, plan, (q, k, v, dout, _) = build(worker, case)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def block(*tensors: torch.Tensor) -> torch.Tensor:
        return attention(*(x * 1.5 for x in tensors), plan=plan).square()

    def keep_attention(context, op, *args, **options):
        kept = op is torch.ops.ring_attention.attend.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    counters = attention.communicator(plan).counters
    counters.reset()
    if how == "nothing kept":
        out = checkpoint(block, *inputs, use_reentrant=False)
    elif how == "attention kept":
        contexts = partial(create_selective_checkpoint_contexts, keep_attention)
        out = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    else:
        out = block(*inputs)
    return counters.bytes_sent, [
        counters.bytes_sent,
        *torch.autograd.grad(out, inputs, dout),
        counters.bytes_sent,
    ]


def test_selective_checkpointing_does_not_repeat_the_communication(cpu_pool: RankPool):
    whole = cpu_pool.run(sent_in_training, "everything kept", world=2)
    again = cpu_pool.run(sent_in_training, "nothing kept", world=2)
    selective = cpu_pool.run(sent_in_training, "attention kept", world=2)
    for rank in range(2):
        (forward, (_, *right, total)) = whole[rank]
        assert forward > 0
        assert again[rank][1][-1] == total + forward
        assert selective[rank][1][-1] == total
        for other in (again, selective):
            for a, b in zip(other[rank][1][1:-1], right, strict=True):
                assert torch.equal(a, b)


def test_layers_share_one_compiled_graph():
    layers = [registry.create("standard", causal=True) for _ in range(12)]
    plan = layers[0].plan(12)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Block(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, plan=plan) + x

    torch._dynamo.reset()
    x = torch.randn(1, 12, 2, 4, dtype=torch.float64)
    for attention in layers:
        block = Block(attention)
        right = block(x)
        block.compile(backend=backend, fullgraph=True)
        assert torch.equal(block(x), right)
    assert len(compiled) <= 2


def test_a_call_whose_output_nobody_uses_is_made():
    attention = registry.create("standard")
    plan = attention.plan(4)
    kept = []

    def backend(graph, inputs):
        kept.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def model(x):
        attention(x, x, x, plan=plan)
        return x * 2

    x = torch.randn(1, 4, 1, 4)
    torch.compile(model, backend=aot_autograd(fw_compiler=backend))(x)
    assert any("attend" in name for name in kept), kept


def test_a_plan_that_is_gone_is_no_longer_known():
    attention = registry.create("standard")
    with pytest.raises(InputError, match="the plan of this call is gone"):
        torch.ops.ring_attention.attend(
            *leaves(1, 4, 1, 4), attention._number, 10**9, False, [False] * 3
        )

"""From the whole sequence to shards and back: any dtype and dimension, with DTensor's gradients."""

from __future__ import annotations

import pytest
import torch

from ring_core import registry
from ring_core.errors import InputError
from ring_core.testing import RankPool, Worker

DTYPES = (
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.uint32,
    torch.uint8,
    torch.bool,
)


def round_trips(worker: Worker, layout: str) -> bool:
    attention = registry.create("standard", causal=True, layout=layout, group=worker.group)
    for number, length in enumerate((1, 7, 24, 37)):
        plan = attention.plan(length)
        cross = attention.plan(length, kv_len=length + 5)
        for dtype in DTYPES:
            x = (torch.arange(3 * length * 2).reshape(3, length, 2) % 2).to(dtype)
            assert torch.equal(plan.unshard(plan.shard(x)), x)
        for dim, dtype in zip((0, 1, -1), DTYPES[number:], strict=False):
            x = (torch.arange(3 * length * 2).reshape(3, length, 2) % 2).to(dtype)
            moved = x.movedim(1, dim).contiguous()
            shard = plan.shard(moved, dim=dim)
            assert shard.shape[dim] == len(plan.positions) == plan.local_len
            assert torch.equal(plan.unshard(shard, dim=dim), moved)
        flat = torch.ones(length)
        assert torch.equal(plan.unshard(plan.shard(flat, dim=0), dim=0), flat)
        keys = torch.arange(2.0 * (length + 5)).view(2, -1)
        assert torch.equal(cross.unshard(cross.shard(keys, kv=True), kv=True), keys)
        assert len(cross.kv_positions) == cross.kv_local_len
        labels = plan.shard(torch.arange(length), dim=0, fill=-100)
        expected = plan.positions.masked_fill(plan.positions < 0, -100)
        assert torch.equal(labels, expected)
    return True


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_round_trips(cpu_pool: RankPool, layout: str, world: int) -> None:
    assert all(cpu_pool.run(round_trips, layout, world=world))


def gradients(worker: Worker) -> tuple[bool, bool]:
    plan = registry.create("standard", causal=True, group=worker.group).plan(11)
    whole = torch.arange(22.0).reshape(1, 11, 2).requires_grad_()
    # Each rank weighs its own slice; the gradient of the whole is the same on every rank.
    shard = plan.shard(whole)
    (shard * (1 + worker.rank)).sum().backward()
    owner = plan._origin(False) // plan.local_len
    gathered = torch.equal(whole.grad[0, :, 0], 1.0 + owner)

    mine = plan.shard(torch.randn(1, 11, 2)).requires_grad_()
    weights = torch.randn(1, 11, 2, generator=torch.Generator().manual_seed(0))
    (plan.unshard(mine) * weights).sum().backward()
    sliced = torch.equal(mine.grad, plan.shard(weights))
    return gathered, sliced


def test_gradients_follow_dtensor(cpu_pool: RankPool) -> None:
    """shard's backward gathers the slices; unshard's takes this rank's slice."""
    assert cpu_pool.run(gradients, world=3) == [(True, True)] * 3


def test_wrong_lengths_are_named() -> None:
    plan = registry.create("standard").plan(8)
    with pytest.raises(
        InputError, match=r"shape \(2, 9\): dimension 1 should be the whole sequence, 8"
    ):
        plan.shard(torch.ones(2, 9))
    with pytest.raises(InputError, match=r"shape \(2, 9\): dimension 1 should be a shard, 8"):
        plan.unshard(torch.ones(2, 9))


def gathered(worker: Worker, spoil: str) -> bool:
    """Shards gathered, by one rank otherwise than by the others."""
    attention = registry.create("standard", causal=True, group=worker.group, timeout=20)
    plan = attention.plan(8)
    x = plan.shard(torch.arange(16.0).view(1, 8, 2))
    odd = {"length": x[:, 1:], "width": x[..., :1], "dtype": x.double()}
    if worker.rank != 1:
        plan.unshard(x)
    elif spoil == "turn":
        attention(*(torch.ones(1, plan.local_len, 1, 4) for _ in range(3)), plan=plan)
    else:
        plan.unshard(odd[spoil])
    return True


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("length", "rank 1"),
        ("width", "shape"),
        ("dtype", "torch.float64"),
        ("turn", "operation"),
    ],
)
def test_ranks_that_gather_otherwise_are_told_on_all(
    cpu_pool: RankPool, spoil: str, says: str
) -> None:
    errors = cpu_pool.run(gathered, spoil, world=3, errors=True, fresh=True)
    kinds = [type(error).__name__ for error in errors]
    if spoil == "length":
        assert kinds == ["DisagreementError", "InputError", "DisagreementError"]
        assert "should be a shard" in str(errors[0])
    else:
        assert kinds == 3 * ["DisagreementError"]
        assert len({str(error) for error in errors}) == 1
    assert says in str(errors[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "needs a sequence length"),
        ({"seq_len": 0}, "seq_len=0: must be at least 1"),
        ({"seq_len": 2.5}, "expected whole numbers, got 2.5"),
        (
            {"cu_seqlens": [3, 5]},
            r"cu_seqlens=\[3, 5\]: expected 0 and then the end of each document",
        ),
        ({"cu_seqlens": [0, 5, 3]}, "ascending"),
        ({"cu_seqlens": 5}, "cu_seqlens: expected a sequence of whole numbers, got 5"),
        ({"seq_len": 8, "lengths": 5}, "lengths: expected a sequence of whole numbers, got 5"),
        (
            {"seq_len": 9, "cu_seqlens": [0, 5]},
            "seq_len=9 and cu_seqlens, which ends at 5, disagree",
        ),
        ({"cu_seqlens": [0, 5], "lengths": [5]}, "either packed or padded"),
        ({"cu_seqlens": [0, 5], "kv_len": 5}, "give kv_cu_seqlens instead"),
        ({"cu_seqlens": [0, 5], "kv_cu_seqlens": [0, 2, 5]}, "has 1 documents and kv_cu_seqlens 2"),
        ({"seq_len": 5, "kv_cu_seqlens": [0, 5]}, "needs cu_seqlens beside it"),
        ({"seq_len": 5, "kv_len": 5, "lengths": [5]}, "padded batch of cross-attention"),
        ({"seq_len": 5, "lengths": [6]}, r"lengths \[6\]: each must be between 0 and seq_len=5"),
    ],
    ids=str,
)
def test_bad_plan_arguments_are_named(arguments, text) -> None:
    with pytest.raises(InputError, match=text):
        registry.create("standard").plan(**arguments)


def test_numbers_may_be_tensors() -> None:
    attention = registry.create("standard", causal=True)
    packed = attention.plan(cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    assert packed is attention.plan(cu_seqlens=[0, 3, 8]), "plans are cached by what they mean"
    assert attention.plan(torch.tensor(8)) is attention.plan(8)

"""The engine runs any plan: strided rows, phases of heads, batched tiles, third parties' masks."""

from __future__ import annotations

import random

import pytest
import torch

import planners
from in_rounds import Joining, Rounding, run_in_rounds
from ring_core import reference, registry
from ring_core.rounds import elements_fetched, elements_sent
from ring_core.testing import Case, RankPool, Worker
from ring_core.testing.case import Result, expected_of, gathered, visible_of
from ring_core.testing.tasks import build

PLANNERS = (
    "block columns",
    "checkered",
    "first checkered",
)


def run_planner(worker: Worker, planner: str, case: Case) -> Result | None:
    attention = planners.Planned(group=worker.group)
    attention.planner = planner
    plan = attention.plan(case.seq_len)
    q, k, v, dout, dlse = case.tensors()
    shards = [plan.shard(x).detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*shards, plan=plan, return_lse=True)
    torch.autograd.backward((out, lse), (plan.shard(dout), plan.shard(dlse, dim=2)))
    sent = attention.communicator(plan)
    if sent is not None:
        elements = elements_sent(plan.plan, plan.rank, case.kv_heads)
        forward = elements * case.batch * (case.head_dim + case.value_dim) * 8
        fetched = elements_fetched(plan.plan, plan.rank, case.kv_heads)
        returned = fetched * case.batch * (case.head_dim + case.value_dim) * 8
        assert sent.counters.bytes_sent == 2 * forward + returned
    whole = gathered(plan, out, lse, *(x.grad for x in shards))
    return whole if worker.rank == 0 else None


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("planner", PLANNERS)
def test_any_plan(cpu_pool: RankPool, planner: str, world: int) -> None:
    case = Case(seq_len=16 * world, batch=2, heads=10, kv_heads=5, value_dim=6)
    result = cpu_pool.run(run_planner, planner, case, world=world)[0]
    seen = planners.visible(planner, case.seq_len, world, case.kv_heads).repeat_interleave(2, dim=0)
    errors = result.errors(expected_of(case, seen))
    assert max(errors.values()) < 1e-10, errors


def many_plans(worker: Worker, count: int) -> list[float]:
    """Random configs and lengths, one after the other, in one group; forward and backward. What
    the sizes of this rank's gradients come to."""
    draw = random.Random(7)
    sums = []
    for _ in range(count):
        window = draw.choice([None, (draw.randint(0, 30), draw.choice([None, 0, 5]))])
        layout = draw.choice(["auto", "contiguous", "zigzag", "striped"])
        fields = {
            "causal": draw.random() < 0.5,
            "window": window,
            "layout": layout,
            "timeout": 30.0,
        }
        if dilated := draw.random() < 0.3:
            branches = range(draw.randint(1, 3))
            fields["segment_lengths"] = [draw.randint(1, 90) for _ in branches]
            fields["dilation_rates"] = [draw.randint(1, 5) for _ in branches]
        length = draw.randint(1, 120)
        cuts = sorted({0, length, *(draw.randint(0, length) for _ in range(draw.randint(0, 4)))})
        cross = {"seq_len": length, "kv_len": draw.randint(1, 90)}
        kinds = [{"seq_len": length}, {"cu_seqlens": tuple(cuts)}, cross]
        sizes = draw.choice(kinds[:2] if dilated else kinds)
        case = Case(fields=fields, seed=draw.randint(0, 10**6), **sizes)
        attention, plan, (q, k, v, dout, dlse) = build(worker, case)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, plan=plan, return_lse=True)
        torch.autograd.backward((out, lse), (dout, dlse))
        sums.append(sum(float(x.grad.abs().sum()) for x in leaves))
    return sums


def test_many_random_plans_do_not_hang(cpu_pool: RankPool) -> None:
    """And give the gradients of one process, drop whatever steps they may."""
    sharded = cpu_pool.run(many_plans, 200, world=4, timeout=100)
    (alone,) = cpu_pool.run(many_plans, 200, world=1, timeout=100)
    assert [sum(shares) for shares in zip(*sharded, strict=True)] == pytest.approx(alone, rel=1e-10)


def two_groups(worker: Worker) -> tuple[float, float]:
    """Calls of two attentions on two groups, taking turns within one process."""
    import torch.distributed as dist

    halves = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    inner = halves[worker.rank // 4]
    results = []
    attentions = [
        registry.create("standard", causal=True, group=group) for group in (worker.group, inner)
    ]
    plans = [attention.plan(24) for attention in attentions]
    q = Case(seq_len=24, kv_heads=4).tensors()[0]
    for _ in range(3):
        results = [
            float(plan.unshard(attention(*3 * [plan.shard(q)], plan=plan)).sum())
            for attention, plan in zip(attentions, plans, strict=True)
        ]
    return results[0], results[1]


def test_several_groups_at_once(cpu_pool: RankPool) -> None:
    answers = cpu_pool.run(two_groups)  # new_group is a collective of all eight
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in answers)


def memory_in_flight(worker: Worker, seq_len: int) -> int:
    """Largest number of elements of fetched keys and values that are held at any time."""
    attention = registry.create("standard", causal=True, group=worker.group, layout="contiguous")
    plan = attention.plan(seq_len)
    x = torch.ones(1, plan.local_len, 1, 4)
    pool = attention.communicator(plan).buffers
    held = most = 0
    take, give = pool.take, pool.give

    def counted_take(numel, like):
        nonlocal held, most
        held += numel
        most = max(most, held)
        return take(numel, like)

    def counted_give(buffer):
        nonlocal held
        held -= buffer.numel()
        give(buffer)

    pool.take, pool.give = counted_take, counted_give
    attention(x, x, x, plan=plan)
    pool.take, pool.give = take, give
    assert held == 0, "every buffer went back"
    return most


@pytest.mark.parametrize("world", [2, 4, 8])
def test_two_blocks_of_keys_are_held_whatever_the_world_size(
    cpu_pool: RankPool, world: int
) -> None:
    seq_len = 64 * world
    most = max(cpu_pool.run(memory_in_flight, seq_len, world=world, fresh=True))
    assert most <= 2 * 2 * (seq_len // world) * 4


IN_ROUNDS = (
    (2, 1, "rounding"),
    (2, 3, "usual"),
    (2, 3, "rounding"),
    (3, 1.5, "rounding"),
    (3, 3, "joining"),
    (4, 3, "rounding"),
    (8, 3, "usual"),
    (4, 9, "joining"),
)


@pytest.mark.parametrize(("world", "shards", "kernel"), IN_ROUNDS)
def test_rounds_of_several_steps_equal_the_reference(
    cpu_pool: RankPool, world: int, shards: float, kernel: str
) -> None:
    """The communicator of GPUs, over files in place of their memory."""
    turn = IN_ROUNDS.index((world, shards, kernel))
    every = (
        {},
        {"causal": True},
        {"causal": True, "layout": "striped"},
        {"causal": True, "window": (9, None), "layout": "contiguous"},
        {"window": (3, 9)},
        {"causal": True, "segment_lengths": [10, 40], "dilation_rates": [1, 3]},
        {"segment_lengths": [30, 31], "dilation_rates": [2, 2], "layout": "striped"},
    )
    for number, fields in enumerate(every):
        for other, sizes in enumerate(
            (
                {"seq_len": 16 * world + 3, "batch": 2, "value_dim": 12},
                {"cu_seqlens": (0, 1, 14, 14, 41, 43), "batch": 2},
                {"seq_len": 23, "lengths": (23, 0, 7, 1), "batch": 4},
                {"seq_len": 13, "kv_len": 40},
            )
        ):
            if "segment_lengths" in fields and sizes.keys() & {"kv_len", "lengths"}:
                continue
            # Every one of both, not with every other; fewer in the largest world.
            if (number + other + turn) % (2 if world < 8 else 4):
                continue
            case = Case(fields=fields, **sizes)
            result = cpu_pool.run(run_in_rounds, case, shards, kernel, world=world)[0]
            errors = result.errors(expected_of(case, visible_of(case)))
            assert all(error < 1e-10 for error in errors.values()), (case, errors)


CHANGING = [
    (fields, seq_len, batch)
    for seq_len, batch in ((19, 1), (64, 2), (5, 1), (40, 1), (19, 2), (64, 1))
    for fields in (
        {},
        {"causal": True, "layout": "zigzag"},
        {"window": (3, 2)},
        {"segment_lengths": [6, 50], "dilation_rates": [1, 3], "causal": True},
    )
]


def changing_calls(worker: Worker, kind: str) -> list[Result] | None:
    """One communicator, memory that grows, plans made anew, ways that are forgotten in between."""
    from ring_attention_standard import symmetric_memory
    from ring_attention_standard.point_to_point import PointToPoint

    from shared_files import FileRegion

    symmetric_memory._REMEMBERED = 5
    if kind == "p2p":
        communicator = PointToPoint(worker.group, 60.0)
    else:
        region = FileRegion(worker.group)
        communicator = symmetric_memory.SymmetricMemory(worker.group, 60.0, region)
    attentions, results = {}, []
    for number, (fields, seq_len, batch) in enumerate(CHANGING):
        case = Case(fields=fields, seq_len=seq_len, batch=batch)
        attention = attentions.setdefault(str(fields), build(worker, case)[0])
        runtime = attention.runtime
        runtime._communicators.setdefault(worker.group, {})["cpu"] = communicator
        runtime.kernel = lambda problem: Rounding(Joining())
        if number % 4 == 3:
            runtime.plans._values.clear()
        plan = attention.plan(seq_len)
        q, k, v, dout, dlse = case.tensors()
        leaves = [plan.shard(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, plan=plan, return_lse=True)
        torch.autograd.backward((out, lse), (plan.shard(dout), plan.shard(dlse, dim=2)))
        results.append(gathered(plan, out, lse, *(x.grad for x in leaves)))
    return results if worker.rank == 0 else None


@pytest.mark.parametrize(("kind", "world"), [("p2p", 2), ("symmetric", 2), ("symmetric", 3)])
def test_a_communicator_serves_calls_that_change(cpu_pool: RankPool, kind: str, world: int) -> None:
    found = cpu_pool.run(changing_calls, kind, world=world)[0]
    for (fields, seq_len, batch), result in zip(CHANGING, found, strict=True):
        case = Case(fields=fields, seq_len=seq_len, batch=batch)
        errors = result.errors(expected_of(case, visible_of(case)))
        assert all(error < 1e-10 for error in errors.values()), (case, errors)


def run_with_one_lse(worker: Worker, case: Case) -> Result | None:
    """Only rank 0 uses its lse, so only its backward may need another kernel."""
    from ring_attention_standard.symmetric_memory import SymmetricMemory

    from shared_files import FileRegion

    attention, plan, (q, k, v, dout, dlse) = build(worker, case)
    runtime = attention.runtime
    communicator = SymmetricMemory(worker.group, 60.0, FileRegion(worker.group))
    runtime._communicators.setdefault(worker.group, {})["cpu"] = communicator
    plain = runtime.kernel

    def kernel(problem):
        found = plain(problem)
        return HalfRounding(found) if problem.value_dim == case.value_dim else found

    runtime.kernel = kernel
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, plan=plan, return_lse=True)
    used = (out, lse) if worker.rank == 0 else (out,)
    torch.autograd.backward(used, (dout, dlse)[: len(used)])
    whole = gathered(plan, out, lse, *(x.grad for x in leaves))
    return whole if worker.rank == 0 else None


class HalfRounding(Rounding):
    """Whose results are in the inputs' dtype, in fact."""

    name = "half_rounding"

    def forward(self, q, *arguments, **options):
        out, lse = self.inner.forward(q, *arguments, **options)
        return out.to(q.dtype), lse

    def backward(self, dout, q, *arguments, **options):
        found = self.inner.backward(dout, q, *arguments, **options)
        return tuple(x.to(q.dtype) for x in found)


@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_may_use_its_lse_alone(cpu_pool: RankPool, world: int) -> None:
    """In which dtype gradients travel is one decision of all ranks."""
    case = Case(fields={"causal": True, "layout": "contiguous"}, seq_len=64, dtype="bfloat16")
    result = cpu_pool.run(run_with_one_lse, case, world=world)[0]
    q, k, v, dout, dlse = (x.double() for x in case.tensors())
    dlse[:, :, 64 // world :] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, reference.visible(64, 64, causal=True))
    right = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for found, wanted in zip((result.dq, result.dk, result.dv), right, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 0.02

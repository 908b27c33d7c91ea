"""Calls: inputs that do not fit, groups and meshes, dropout, and what a copy keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from ring_core import reference, registry
from ring_core.errors import (
    DifferentiationError,
    DisagreementError,
    InputError,
    RingError,
    RingTimeoutError,
)
from ring_core.store import store_of
from ring_core.testing import Case, RankPool, Worker
from ring_core.testing.case import visible_of
from ring_core.testing.tasks import build


def _q(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "text"),
    [
        (_q(8, 2, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), r"q \(8, 2, 4\).*expected \[batch, rows"),
        (_q(1, 8, 3, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), "3 query heads are no multiple of 2"),
        (_q(1, 8, 2, 4), _q(1, 8, 2, 5), _q(1, 8, 2, 4), "q and k must have the same head_dim"),
        (
            _q(1, 8, 2, 4),
            _q(1, 8, 2, 4),
            _q(1, 9, 2, 4),
            "k and v must have the same rows and heads",
        ),
        (_q(2, 8, 2, 4), _q(1, 8, 2, 4), _q(1, 8, 2, 4), "batch sizes differ"),
        (
            _q(1, 8, 2, 4).half(),
            _q(1, 8, 2, 4),
            _q(1, 8, 2, 4),
            "q is torch.float16, k torch.float32",
        ),
        (*3 * [_q(1, 8, 2, 4).long()], "torch.int64: expected one of torch.float64"),
        (*3 * [_q(1, 9, 2, 4)], r"q \(1, 9, 2, 4\) has 9 rows.*use plan.shard\(q_full, dim=1\)"),
        (_q(1, 8, 2, 4), *2 * [_q(1, 7, 2, 4)], "k .* has 7 rows"),
        (*3 * [_q(0, 8, 2, 4)], "every size must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_named(q, k, v, text) -> None:
    attention = registry.create("standard")
    with pytest.raises(InputError, match=text):
        attention(q, k, v, plan=attention.plan(8))


def test_a_plan_must_be_a_plan_and_fit_the_batch() -> None:
    attention = registry.create("standard")
    q = _q(2, 8, 2, 4)
    with pytest.raises(InputError, match=r"plan is a int; get one from attn.plan"):
        attention(q, q, q, plan=8)
    with pytest.raises(InputError, match="lengths for a batch of 3"):
        attention(q, q, q, plan=attention.plan(8, lengths=[8, 8, 1]))


def without_plan_or_layout(worker: Worker) -> str:
    attention = registry.create("standard", group=worker.group)
    q = torch.ones(1, 4, 1, 4)
    try:
        attention(q, q, q)
    except InputError as error:
        return str(error)
    return "no error"


def test_a_call_without_a_plan_needs_a_layout(cpu_pool: RankPool) -> None:
    answers = cpu_pool.run(without_plan_or_layout, world=2, fresh=True)
    assert all(
        "pass plan=attn.plan(seq_len), or create the attention with layout=" in a for a in answers
    )


def mesh_and_copies(worker: Worker) -> bool:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))
    attention = registry.create("standard", causal=True, group=mesh["cp"])
    plan = attention.plan(19)
    assert (plan.world, plan.rank) == (4, worker.rank % 4)
    with pytest.raises(InputError, match=r"2-D DeviceMesh \(2, 4\); name one dimension"):
        registry.create("standard", group=mesh)
    q = Case(seq_len=19, kv_heads=4).tensors()[0]
    expected = reference.attention(q, q, q, reference.visible(19, 19, causal=True))[0]
    for one in (attention, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        plan = one.plan(19)
        out = plan.unshard(one(*3 * [plan.shard(q)], plan=plan))
        assert torch.allclose(out, expected, atol=1e-10)
    return True


def test_meshes_and_copies_that_keep_their_group(cpu_pool: RankPool) -> None:
    assert all(cpu_pool.run(mesh_and_copies))


def test_a_pickled_group_that_is_gone_is_named() -> None:
    attention = registry.create("standard")
    attention.__setstate__(attention.__getstate__() | {"_group": "no such group"})
    with pytest.raises(InputError, match="pickled with process group 'no such group'"):
        attention.plan(8)


def dropped(worker: Worker, case: Case) -> list[torch.Tensor]:
    attention, plan, (q, k, v, dout, dlse) = build(worker, case)
    torch.manual_seed(5)  # alike on every rank, as the field's description asks
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, plan=plan, return_lse=True)
    torch.autograd.backward((out, lse), (dout, dlse))
    return [
        plan.unshard(out.detach()),
        *(plan.unshard(x.grad, kv=i > 0) for i, x in enumerate(leaves)),
    ]


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ({"seq_len": 23}, {}),
        ({"cu_seqlens": (0, 9, 30)}, {}),
        ({"seq_len": 9, "kv_len": 20}, {}),
        ({"seq_len": 23}, {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}),
    ],
)
def test_dropout_is_the_references_at_every_world_size(cpu_pool: RankPool, sizes, fields) -> None:
    """Forward and backward use one mask, a function of global indices and the call's seed: a key
    that counts in two branches is dropped in both. lse is what it is without dropout."""
    fields = {"causal": True, "dropout": 0.3, **fields}
    case = Case(fields=fields, batch=2, value_dim=5, **sizes)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    q, k, v, dout, dlse = case.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    right = reference.attention(*leaves, visible_of(case), dropout=0.3, seed=seed)
    expected = [right[0].detach(), *torch.autograd.grad(right, leaves, (dout, dlse))]
    for world in (1, 2, 3, 8):
        for found, wanted in zip(
            cpu_pool.run(dropped, case, world=world)[0], expected, strict=True
        ):
            assert torch.allclose(found, wanted, atol=1e-10), world


def test_dropout_is_off_in_eval_and_repeats_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    attention = registry.create("standard", dropout=0.5)
    q = _q(1, 32, 2, 8, dtype=torch.float64).requires_grad_()
    torch.manual_seed(1)
    plain = torch.autograd.grad(attention(q, q, q).square().sum(), q)[0]
    torch.manual_seed(1)
    out = checkpoint(attention, q, q, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], plain)
    assert not torch.equal(attention(q, q, q), attention(q, q, q))
    attention.eval()
    exact = reference.attention(q, q, q, torch.ones(32, 32, dtype=torch.bool))[0]
    assert torch.allclose(attention(q, q, q), exact, atol=1e-12)


def test_twice_differentiating_is_refused() -> None:
    q = _q(1, 4, 1, 4).requires_grad_()
    out = registry.create("standard")(q, q, q)
    (once,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(DifferentiationError, match=r"differentiable once: .* create_graph"):
        torch.autograd.grad(once.sum(), q)


Broken = dict[Callable[..., Any], Future[list[Any]]]


def broken_off(task: Callable[..., Any], world: int, errors: bool = False) -> list[Any]:
    """Run a call that breaks off in processes of its own: a thread of gloo's may spin on lost
    connections for good."""
    pool = RankPool(world)
    try:
        return pool.run(task, fresh=True, timeout=60, errors=errors)
    finally:
        pool.close()


@pytest.fixture(scope="module")
def broken() -> Broken:
    """What came of each of them: they wait most of the time, so all go on at once."""
    with ThreadPoolExecutor() as threads:
        return {
            late_peer: threads.submit(broken_off, late_peer, 3, errors=True),
            skipped_backward: threads.submit(broken_off, skipped_backward, 2),
            refused_once: threads.submit(broken_off, refused_once, 2),
            other_order: threads.submit(broken_off, other_order, 3),
            failing_kernel: threads.submit(broken_off, failing_kernel, 3),
        }


def late_peer(worker: Worker) -> None:
    """The second call is known to all, so rank 0's absence shows in the transfer itself."""
    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    q = torch.ones(1, 4, 1, 4)
    attention(q, q, q)
    store = store_of(worker.group)
    if worker.rank == 0:
        others = range(1, worker.world)
        store.wait([f"gave up: {rank}" for rank in others], timedelta(seconds=30))
    try:
        attention(q, q, q)
    finally:
        store.set(f"gave up: {worker.rank}", "")


def test_a_late_peer_is_named_alike_on_every_rank(broken: Broken) -> None:
    outcomes = broken[late_peer].result()
    assert all(isinstance(outcome, RingTimeoutError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    assert "timeout=2 s" in str(outcomes[0])
    assert "fetching keys" in str(outcomes[0])
    assert "Nothing was heard of rank 0 within 1 s more" in str(outcomes[0])


def skipped_backward(worker: Worker) -> list[float | str]:
    """Rank 1 skips one backward, as a rank without labels might."""
    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    outcomes: list[float | str] = []
    for step in range(3):
        q = torch.full((1, 2, 1, 2), float(step), requires_grad=True)
        try:
            out = attention(q, q, q)
            outcomes.append(float(out.mean()))
            if not (worker.rank == 1 and step == 0):
                out.sum().backward()
        except RingTimeoutError as error:
            outcomes.append(str(error))
    return outcomes


def test_a_skipped_backward_is_an_error_and_never_another_calls_numbers(broken: Broken) -> None:
    answers = broken[skipped_backward].result()
    assert all(answer[0] == 0.0 for answer in answers), answers
    for answer in answers:
        for step, outcome in enumerate(value for value in answer if not isinstance(value, str)):
            assert outcome == float(step), "numbers of another step"
    texts = {text for answer in answers for text in answer if isinstance(text, str)}
    assert len(texts) == 1, answers
    assert "returning gradients" in texts.pop() or "fetching keys" in str(answers)


def refused_once(worker: Worker) -> list[str]:
    """A known call, then one that rank 0 alone refuses, then a known one again."""
    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    plan = attention.plan(4)
    outcomes = []
    for step in range(3):
        rows = plan.local_len + (worker.rank == 0 and step == 1)
        q = torch.full((1, rows, 1, 2), float(step))
        try:
            outcomes.append(f"{attention(q, q, q, plan=plan).mean():.1f}")
        except RingError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def test_a_refusal_reaches_ranks_that_are_already_computing(broken: Broken) -> None:
    refuser, other = broken[refused_once].result()
    assert refuser[0] == other[0] == "0.0"
    assert refuser[1].startswith("InputError: q (1, 3, 1, 2) has 3 rows")
    assert other[1].startswith("DisagreementError: rank 0 refused its input: q (1, 3, 1, 2)")
    assert "refused its input" in refuser[2], "the group is spent, and says why"
    assert refuser[2] == other[2] == other[1]


def other_order(worker: Worker) -> str:
    """Two calls that all ranks know, made in another order by rank 0."""
    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    plans = [attention.plan(length) for length in (4, 8)]

    def call(plan):
        q = torch.ones(1, plan.local_len, 1, 2)
        return attention(q, q, q, plan=plan)

    for plan in plans:
        call(plan)
    try:
        for plan in plans if worker.rank else reversed(plans):
            call(plan)
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_known_calls_in_another_order_are_told_apart(broken: Broken) -> None:
    texts = broken[other_order].result()
    assert len(set(texts)) == 1, texts
    assert "tokens: 8 on rank 0; 4 on ranks 1, 2" in texts[0]


def failing_kernel(worker: Worker) -> str:
    """Rank 0's kernel fails in mid-call, as one that runs out of memory does."""
    attention = registry.create("standard", layout="contiguous", timeout=2.0, group=worker.group)
    q = torch.ones(1, 4, 1, 2)
    attention(q, q, q)
    if worker.rank == 0:

        def fail(*args, **options):
            raise MemoryError("out of memory, for the test")

        kernel = next(iter(attention.runtime._kernels.values()))
        kernel.forward = fail
    try:
        attention(q, q, q)
    except (RingError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        vars(next(iter(attention.runtime._kernels.values()))).pop("forward", None)
    return "no error"


def test_a_rank_that_fails_alone_is_named_by_the_others(broken: Broken) -> None:
    alone, *others = broken[failing_kernel].result()
    assert alone == "MemoryError: out of memory, for the test"
    for text in others:
        assert text.startswith(
            "RingTimeoutError: rank 0 failed in the middle of a call with Memory"
        )


def test_a_plan_of_another_config_is_refused() -> None:
    causal, full = registry.create("standard", causal=True), registry.create("standard")
    q = _q(1, 8, 2, 4)
    with pytest.raises(InputError, match="made by an attention of another config"):
        causal(q, q, q, plan=full.plan(8))
    layer = registry.create("standard", causal=True, kernel="reference", softmax_scale=0.3)
    layer(q, q, q, plan=causal.plan(8))


def test_positions_are_the_callers_own() -> None:
    plan = registry.create("standard", causal=True).plan(8)
    with torch.inference_mode(), torch.device("meta"):
        plan.positions.add_(100)
    assert torch.equal(plan.positions, torch.arange(8))
    embedding = torch.nn.Embedding(8, 2)
    embedding(plan.positions).sum().backward()


def zigzag_cross(worker: Worker) -> bool:
    """Without a plan, keys of another length are shards of the same named layout."""
    attention = registry.create("standard", layout="zigzag", group=worker.group)
    plan = attention.plan(4 * worker.world, kv_len=8 * worker.world)
    keys = registry.create("standard", layout="zigzag", group=worker.group).plan(8 * worker.world)
    return torch.equal(plan.kv_positions, keys.positions)


def test_a_named_layout_holds_for_keys_too(cpu_pool: RankPool) -> None:
    assert all(cpu_pool.run(zigzag_cross, world=3))


def test_plans_are_made_safely_by_many_threads() -> None:
    attention = registry.create("standard", causal=True)
    with ThreadPoolExecutor(8) as threads:
        plans = list(threads.map(attention.plan, [1 + i % 97 for i in range(2000)]))
    assert [plan.sequences.q_len for plan in plans] == [1 + i % 97 for i in range(2000)]


def test_compile_with_the_plan_inside_and_changing_lengths() -> None:
    attention = registry.create("standard", causal=True)

    @torch.compile(backend="aot_eager")
    def whole(x: torch.Tensor) -> torch.Tensor:
        plan = attention.plan(x.shape[1])
        y = plan.shard(x * 1.0)
        return plan.unshard(attention(y, y, y, plan=plan)) + 0.0

    for length in (8, 9, 12):
        x = _q(1, length, 2, 4, dtype=torch.float64)
        seen = reference.visible(length, length, causal=True)
        assert torch.allclose(whole(x), reference.attention(x, x, x, seen)[0], atol=1e-12)


def test_mixed_dtypes_under_autocast_are_cast_as_torch_casts_them() -> None:
    attention = registry.create("standard")
    q, v = _q(1, 8, 2, 4), _q(1, 8, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, v).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [None, [1.0], "q"])
def test_what_is_no_tensor_is_named(wrong) -> None:
    attention = registry.create("standard")
    q = _q(1, 8, 2, 4)
    with pytest.raises(InputError, match=f"k is a {type(wrong).__name__}, not a tensor"):
        attention(q, wrong, q)
    with pytest.raises(InputError, match="expected a tensor"):
        attention.plan(8).shard(wrong)


def refused_by_one(worker: Worker) -> tuple[str, float]:
    """A known call, a new one that rank 1 refuses, and the known one again."""
    attention = registry.create("standard", group=worker.group, timeout=20.0)
    plan = attention.plan(9)
    q, wide = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 8)
    attention(q, q, q, plan=plan)
    try:
        attention(wide, q if worker.rank == 1 else wide, wide, plan=plan)
        told = "nothing"
    except RingError as error:
        told = type(error).__name__
    return told, float(attention(q, q, q, plan=plan).sum())


def test_a_refusal_that_all_agreed_on_ends_one_call(cpu_pool: RankPool) -> None:
    found = cpu_pool.run(refused_by_one, world=3, fresh=True, timeout=60)
    assert [told for told, _ in found] == ["DisagreementError", "InputError", "DisagreementError"]
    assert [total for _, total in found] == pytest.approx([24.0] * 3)


def unserved(worker: Worker, fields: dict[str, str]) -> tuple[str, float]:
    """The error of a call that nothing serves, and how far off the group's next one is."""
    x = torch.ones(1, 18, 2, 8, dtype=torch.float64)
    wrong = registry.create("standard", group=worker.group, timeout=20, **fields)
    plan = wrong.plan(18)
    try:
        wrong(*3 * [plan.shard(x)], plan=plan)
        text = "none"
    except RingError as error:
        text = f"{type(error).__name__}: {error}"
    attention = registry.create("standard", group=worker.group, timeout=20)
    plan = attention.plan(18)
    out = attention(*3 * [plan.shard(x)], plan=plan)
    return text, float((out - 1).abs().max())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kernel": "cudnn"}, "KernelError"),
        ({"communicator": "symmetric"}, "CommunicatorError"),
    ],
)
def test_what_nothing_serves_does_not_cost_the_group(cpu_pool: RankPool, fields, says) -> None:
    for text, error in cpu_pool.run(unserved, fields, world=3):
        assert text.startswith(says)
        assert error < 1e-10

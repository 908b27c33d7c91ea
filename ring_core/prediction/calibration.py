"""What this machine does in a second: kernels, copies, transfers and the processor, measured.

The tiles are those that the attention itself would compute, at lengths that double; all processes
are at work at once, as they are in a ring, and the slowest one counts.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.attention import BaseRingAttention
from ring_core.bench.step import Step
from ring_core.bench.stopwatch import Stopwatch
from ring_core.config import RingAttentionConfig
from ring_core.errors import InputError
from ring_core.launching import Worker, launch
from ring_core.layout import contiguous
from ring_core.masks import FULL
from ring_core.plan import Plan, Rows, Tile
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Both, Curve, Link, Points, Rates
from ring_core.prediction.timeline import Prediction, Where, kinds, predict
from ring_core.program import Program
from ring_core.protocols import AttentionKernel, Problem
from ring_core.registry import registry
from ring_core.rounds import rounds
from ring_core.sequences import Sequences

_TURNS = 3
_SHORTEST, LONGEST = 64, 32768
"""Tokens of a shard."""
_SECONDS = 1.0
"""Of a forward: longer shards are left out."""
_TINY = 64
"""Tokens that are computed in no time."""
_WORDS = (1 << 10, 1 << 24)
"""Numbers of a small and of a large transfer."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank.

    Attributes:
        fields: of a config. longest: tokens of a shard, at most.
    """

    fields: Mapping[str, Any]
    sizes: Sizes
    longest: int


def calibrate(job: Job, processes: int, device_type: str) -> Rates:
    """Rates of so many processes on this machine, with curves for one attention.

    Raises:
        InputError: weights are dropped, which changes what kernels do.
        RankFailedError: it cannot be computed here; says why.
    """
    if dropout := registry.create(job.fields).config.dropout:
        raise InputError(
            f"dropout={dropout}: rates are of attention that keeps all weights; calibrate with 0"
        )
    rates: Rates = launch(_measured, job, processes=processes, device_type=device_type)[0]
    return rates


def _measured(worker: Worker, job: Job) -> Rates:
    attention = registry.create(job.fields)
    watch = Stopwatch(worker)
    memory = _memory(watch)
    curves = tuple(_curves(watch, attention, job))
    rates = Rates(
        device=_device(worker.device),
        software=f"torch {torch.__version__}, ring-attention-core {version('ring-attention-core')}",
        date=datetime.date.today().isoformat(),
        source="measured by ring-attention plan --calibrate",
        processes=worker.world,
        gpu=worker.device.type == "cuda",
        memory=memory,
        call=(0.0, 0.0),
        round=(0.0, 0.0),
        link=None,
        curves=curves,
    )
    alone = registry.create(job.fields, group=_alone(worker))
    spent = _call(watch, alone, 1, _TINY, job.sizes)
    rest = _less(spent, _predicted(alone, rates, 1, _TINY, job.sizes))
    rates = _with(rates, **_shared(rest, _tiles(alone, worker, job.sizes)))
    if worker.world == 1:
        return rates
    return _together(watch, attention, rates, job)


def _together(watch: Stopwatch, attention: BaseRingAttention, rates: Rates, job: Job) -> Rates:
    """With what several ranks add: transfers, rounds, and how much of a transfer is hidden."""
    world, sizes = watch.worker.world, job.sizes
    rates = _with(rates, link=_link(watch, attention, sizes))
    spent = _call(watch, attention, world, _TINY, sizes)
    tiny = _prediction(attention, rates, world, _TINY, sizes)
    rest = _less(spent, (tiny.forward.total, tiny.backward.total))
    if tiny.degree > 1:
        return _with(rates, exchange=rest)
    number = max(1, _rounds(attention, rates, world, _TINY, sizes))
    rates = _with(rates, round=tuple(x / number for x in rest))
    shard = _balanced(rates, attention, world, job)
    ways = [
        sum(_predicted(attention, _hiding(rates, part), world, shard, sizes)) for part in (0.0, 1.0)
    ]
    took = sum(_call(watch, attention, world, shard, sizes))
    part = (ways[0] - took) / (ways[0] - ways[1]) if ways[0] > ways[1] else 1.0
    return _hiding(rates, min(1.0, max(0.0, part)))


def _hiding(rates: Rates, part: float) -> Rates:
    assert rates.link is not None
    return _with(rates, link=rates.link.model_copy(update={"hidden": part}))


def _with(rates: Rates, **fields: Any) -> Rates:
    return rates.model_copy(update=fields)


def _less(spent: Both, known: Both) -> Both:
    return max(0.0, spent[0] - known[0]), max(0.0, spent[1] - known[1])


def _tiles(attention: BaseRingAttention, worker: Worker, sizes: Sizes) -> int:
    """Kernel calls of one rank's attention."""
    plan = attention.make_plan(Sequences.build(_TINY), 1)
    kernel = _kernel(attention, plan, worker.device, sizes)
    program = Program.build(plan, 0, kernel, kv_heads=sizes.kv_heads)
    return max(1, sum(len(one.tiles) for one in program.rounds))


def _shared(rest: Both, tiles: int) -> dict[str, Both]:
    """What a call and each further tile take, if as much: one attention does not tell which."""
    each = rest[0] / tiles, rest[1] / tiles
    return {"call": each, "tile": each} if tiles > 1 else {"call": each}


def _alone(worker: Worker) -> Any | None:
    """The group of this rank alone; None where there is no other."""
    if worker.world == 1:
        return None
    groups = [dist.new_group([rank]) for rank in range(worker.world)]
    return groups[worker.rank]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# The processor, and the ring


def _call(
    watch: Stopwatch, attention: BaseRingAttention, world: int, shard: int, sizes: Sizes
) -> Both:
    """Seconds of a call's forward, and of its backward."""
    plan = attention.plan(world * shard)
    device = watch.worker.device
    tensors = (
        torch.randn(1, rows, heads, dim, device=device).to(getattr(torch, sizes.dtype))
        for rows, heads, dim in (
            (plan.local_len, sizes.q_heads, sizes.head_dim),
            (plan.kv_local_len, sizes.kv_heads, sizes.head_dim),
            (plan.kv_local_len, sizes.kv_heads, sizes.value_dim),
            (plan.local_len, sizes.q_heads, sizes.value_dim),
        )
    )
    step = Step(lambda *x: attention(*x, plan=plan), list(tensors))
    step.warm()
    first, all_of_it = (watch.milliseconds(run, _TURNS) / 1e3 for run in (step.forward, step.both))
    return first, max(0.0, all_of_it - first)


def _predicted(
    attention: BaseRingAttention, rates: Rates, world: int, shard: int, sizes: Sizes
) -> Both:
    found = _prediction(attention, rates, world, shard, sizes)
    return found.forward.total, found.backward.total


def _prediction(
    attention: BaseRingAttention, rates: Rates, world: int, shard: int, sizes: Sizes
) -> Prediction:
    plan = attention.make_plan(Sequences.build(world * shard), world)
    return attention.predict(plan, sizes, rates, Where(world))


def _rounds(
    attention: BaseRingAttention, rates: Rates, world: int, shard: int, sizes: Sizes
) -> int:
    """Rounds with other ranks' keys, where there are most."""
    plan = attention.make_plan(Sequences.build(world * shard), world)
    shards = rates.link.shards if rates.link else 1
    return max(len(rounds(plan, rank, shards)) - 1 for rank in range(world))


def _balanced(rates: Rates, attention: BaseRingAttention, world: int, job: Job) -> int:
    """Tokens of a shard for which transfers take about as long as kernels: there it shows how much
    of them is hidden."""
    shards = _lengths(job.longest)
    where, kernels = Where(world, overlap=False), attention.candidates

    def apart(shard: int) -> float:
        plan = attention.make_plan(Sequences.build(world * shard), world)
        found = predict(plan, job.sizes, rates, where, kernels)
        computing = found.forward.kernels + found.backward.kernels
        moving = found.forward.transfers + found.backward.transfers
        return abs(math.log(max(moving, 1e-9) / computing))

    return min(shards, key=apart)


@dataclass(frozen=True)
class _EverythingPlan(Plan):
    """Every query sees every key: what crosses the wire is whole shards."""

    def tiles(self, rank: int, owner: int) -> list[Tile]:
        rows = (Rows(0, self.queries.owned(rank)), Rows(0, self.keys.owned(owner)))
        return [Tile(*rows, FULL)]


def _link(watch: Stopwatch, attention: BaseRingAttention, sizes: Sizes) -> Link:
    """Shards fetched by the attention's communicator, a small one and a large one."""
    worker, times = watch.worker, []
    communicator = attention.communicator(attention.plan(worker.world), worker.device)
    assert communicator is not None
    for words in _WORDS:
        rows = max(1, words // (sizes.kv_heads * sizes.key_row))
        layout = contiguous(rows * worker.world, worker.world)
        plan = _EverythingPlan(layout, layout)
        _, one, *_ = rounds(plan, worker.rank, communicator.shards)
        k, v = (
            torch.ones(1, rows, sizes.kv_heads, dim, device=worker.device).to(
                getattr(torch, sizes.dtype)
            )
            for dim in (sizes.head_dim, sizes.value_dim)
        )

        def fetch() -> None:
            pending = communicator.fetch(one, (k, v), 0)  # noqa: B023
            pending.wait()
            pending.release()

        for _ in range(3):
            fetch()
        size = sum(len(part.rows) for step in one.steps for part in step.parts)
        size *= sizes.kv_heads * sizes.key_row * sizes.itemsize
        times.append((size, watch.milliseconds(fetch, _TURNS) / 1e3 / len(one.steps)))
    (small, soon), (large, late) = times
    each = len(one.steps)
    rate = (large - small) / each / max(late - soon, 1e-9)
    start = max(0.0, soon - small / each / rate)
    return Link(
        communicator=communicator.name,
        shards=communicator.shards,
        start=start,
        bytes_per_second=rate,
        hidden=1.0,
    )


# Kernels


def _memory(watch: Stopwatch) -> float:
    """Bytes a second of a sum that reads two tensors and writes one, larger than caches are."""
    numbers = 1 << (27 if watch.on_gpu else 25)
    a, b = (torch.ones(numbers, device=watch.worker.device) for _ in range(2))
    return 3 * 4 * numbers / (watch.milliseconds(lambda: torch.add(a, b, out=a), _TURNS) / 1e3)


def _curves(watch: Stopwatch, attention: BaseRingAttention, job: Job) -> Iterator[Curve]:
    """For each name that masks of the attention's tiles have, one by length."""
    sizes = job.sizes
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    hosts: dict[str, Both] = {}
    kernel: AttentionKernel | None = None
    for shard in _lengths(job.longest):
        slowest = 0.0
        for world in (1, 2, 4):
            plan = attention.make_plan(Sequences.build(shard * world), world)
            if plan.chooses:
                raise InputError(
                    "what is computed depends on the tensors: there is nothing to calibrate"
                )
            kernel = _kernel(attention, plan, watch.worker.device, sizes)
            program = Program.build(plan, world - 1, kernel, kv_heads=sizes.kv_heads)
            for tile in (tile for one in program.rounds for tile in one.tiles):
                name, pairs = tile.mask.cost(tile.q.count, tile.kv.count)
                heads = tile.heads.count(sizes.kv_heads) * sizes.q_heads // sizes.kv_heads
                operations = (
                    2.0 * (sizes.head_dim + sizes.value_dim) * pairs * tile.q.repeat * heads
                )
                points = found.setdefault(name, {})
                # One for each doubling: between them lines are drawn.
                if operations and round(math.log2(operations)) not in points:
                    forward, backward, host = _tile(watch, kernel, tile, sizes, attention.config)
                    points[round(math.log2(operations))] = operations, forward, backward
                    hosts.setdefault(name, host)
                    slowest = max(slowest, forward)
        if slowest > _SECONDS:
            break
    assert kernel is not None
    for name, points in found.items():
        if not points:
            continue
        ordered = sorted(points.values())
        yield Curve(
            kernel=kernel.name,
            mask=name,
            planned=kinds(plan),
            dtype=sizes.dtype,
            head_dim=sizes.head_dim,
            forward=_rising(tuple((one[0], one[1]) for one in ordered)),
            backward=_rising(tuple((one[0], one[2]) for one in ordered)),
            host=hosts[name],
        )


def _rising(points: Points) -> Points:
    """Points of which none takes less time than a smaller one: noise, where it seems so."""
    done, longest = [], 0.0
    for operations, seconds in points:
        longest = max(longest, seconds)
        done.append((operations, longest))
    return tuple(done)


def _lengths(longest: int) -> list[int]:
    """Tokens of shards to measure with."""
    return [n for n in (1 << i for i in range(6, 24)) if _SHORTEST <= n <= longest]


def _kernel(
    attention: BaseRingAttention, plan: Plan, device: torch.device, sizes: Sizes
) -> AttentionKernel:
    dtype, deterministic = getattr(torch, sizes.dtype), attention.config.deterministic
    return attention.runtime.kernel(
        Problem(device, dtype, sizes.head_dim, sizes.value_dim, plan.masks, False, deterministic)
    )


def _tile(
    watch: Stopwatch,
    kernel: AttentionKernel,
    tile: Tile,
    sizes: Sizes,
    config: RingAttentionConfig,
) -> tuple[float, float, Both]:
    """Seconds of a tile's forward and backward, and of the processor in each."""
    kv_heads = tile.heads.count(sizes.kv_heads)
    q_heads = kv_heads * sizes.q_heads // sizes.kv_heads
    q, k, v, dout = (
        torch.randn(tile.q.repeat, rows, heads, dim, device=watch.worker.device).to(
            getattr(torch, sizes.dtype)
        )
        for rows, heads, dim in (
            (tile.q.count, q_heads, sizes.head_dim),
            (tile.kv.count, kv_heads, sizes.head_dim),
            (tile.kv.count, kv_heads, sizes.value_dim),
            (tile.q.count, q_heads, sizes.value_dim),
        )
    )
    scale, deterministic = config.scale(sizes.head_dim), config.deterministic
    out, lse = kernel.forward(q, k, v, tile.mask, scale=scale, dropout=None)
    dout = dout.to(out.dtype)

    def forward() -> tuple[Tensor, Tensor]:
        return kernel.forward(q, k, v, tile.mask, scale=scale, dropout=None)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return kernel.backward(
            *(dout, q, k, v, out, lse, tile.mask),
            scale=scale,
            dropout=None,
            deterministic=deterministic,
        )

    for run in (forward, backward):
        for _ in range(2):
            run()
    first, second = (watch.milliseconds(run, _TURNS) / 1e3 for run in (forward, backward))
    hosts = (_host(watch, forward), _host(watch, backward)) if watch.on_gpu else (0.0, 0.0)
    return first, second, hosts


def _host(watch: Stopwatch, run: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of the processor in a call whose results nobody waits for."""
    watch.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    took = (time.perf_counter() - started) / repeats
    watch.wait()
    return watch.slowest(took)

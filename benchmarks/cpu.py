"""Ring attention on a CPU beside dense attention: time, memory per rank, and bytes sent.

``python benchmarks/cpu.py --output benchmarks/results`` writes a page; without it, prints it.
Time: two ranks of one thread each against dense attention with two threads, taking turns.
Memory: the most that a rank takes for inputs, outputs, gradients and buffers of one call.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

import hardware
from ring_core import registry
from ring_core.bench.memory import PeakMemory
from ring_core.testing import RankPool, Worker

BATCH, HEADS, HEAD_DIM = 1, 8, 64


def whole(tokens: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, the same wherever they are drawn: [B, S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, tokens, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def dense_seconds(tensors: list[torch.Tensor]) -> float:
    """Causal scaled_dot_product_attention, forward and backward, with this process's threads."""
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    started = time.perf_counter()
    F.scaled_dot_product_attention(*leaves, is_causal=True).backward(dout)
    return time.perf_counter() - started


_shards: dict[int, tuple] = {}


def prepare(worker: Worker, tokens: int) -> None:
    """Draw the tensors and keep this rank's rows."""
    attention = registry.create("standard", causal=True, group=worker.group)
    plan = attention.plan(tokens)
    _shards[tokens] = (attention, plan, [plan.shard(x) for x in whole(tokens)])


def ring_seconds(worker: Worker, tokens: int) -> float:
    """The same attention on this rank's rows; the ranks start together."""
    attention, plan, (q, k, v, dout) = _shards[tokens]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dist.barrier(worker.group)
    started = time.perf_counter()
    attention(*leaves, plan=plan).backward(dout)
    return time.perf_counter() - started


def ring_memory(worker: Worker, tokens: int) -> tuple[int, int]:
    """Peak bytes of one call on this rank, tensors included, and bytes sent."""
    attention = registry.create("standard", causal=True, group=worker.group)
    for warm in (worker.world * 64, tokens):
        plan = attention.plan(warm)
        peak = PeakMemory(torch.device("cpu"))
        shape = (BATCH, plan.local_len, HEADS, HEAD_DIM)
        leaves = [torch.randn(shape).requires_grad_() for _ in range(3)]
        communicator = attention.communicator(plan)
        if communicator is not None:
            communicator.counters.reset()
        attention(*leaves, plan=plan).backward(torch.randn(shape))
    return peak.taken(), communicator.counters.bytes_sent if communicator is not None else 0


def time_table(tokens: int, repeats: int) -> list[str]:
    """Both sides taking turns, so that neither has the quieter machine."""
    pool = RankPool(2)
    pool.run(prepare, tokens)
    tensors = whole(tokens)
    torch.set_num_threads(2)
    dense, ring = [], []
    for turn in range(repeats + 1):
        seconds = dense_seconds(tensors), max(pool.run(ring_seconds, tokens, timeout=600))
        if turn:  # the first is the warm-up
            dense.append(seconds[0])
            ring.append(seconds[1])
    pool.close()
    ratio = statistics.median(ring) / statistics.median(dense)
    return [
        f"## Time: {tokens} tokens, {HEADS} heads of {HEAD_DIM}, float32, causal, with backward",
        "",
        f"Median (and range) of {repeats} runs of each, taking turns.",
        "",
        "| | seconds |",
        "|---|---|",
        f"| dense `scaled_dot_product_attention`, 1 process of 2 threads | {_spread(dense)} |",
        f"| ring, 2 processes of 1 thread over gloo | {_spread(ring)} |",
        f"| ratio of the medians | **{ratio:.3f}** |",
        "",
    ]


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def memory_table(tokens: int, worlds: list[int]) -> list[str]:
    """Each world size in processes of its own, so that no run inherits another's memory."""
    # glibc keeps freed buffers below a moving threshold; with a fixed one, freed memory is gone and
    # what is measured is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 * 1024)
    rows = []
    for world in worlds:
        pool = RankPool(world)
        measured = pool.run(ring_memory, tokens, timeout=600)
        pool.close()
        rows.append((world, max(peak for peak, _ in measured), max(sent for _, sent in measured)))
    alone = rows[0][1] * rows[0][0]
    return [
        f"## Memory per rank: {tokens} tokens, {HEADS} heads of {HEAD_DIM}, float32, causal",
        "",
        "Growth of the resident set at its peak over one forward and backward: this rank's inputs,",
        "outputs, gradients and communication buffers; the worst rank. Freed memory is returned at",
        "once (`MALLOC_MMAP_THRESHOLD_`), so this is memory in use.",
        "",
        f"| ranks | peak, MiB | share of {rows[0][0]} rank | times ranks | sent by a rank, MiB |",
        "|---|---|---|---|---|",
        *(
            f"| {world} | {peak / 2**20:.1f} | {peak / alone:.3f} | {peak * world / alone:.2f} "
            f"| {sent / 2**20:.1f} |"
            for world, peak, sent in rows
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="sequence length of the timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, default=32768)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    page = [
        "# Standard variant on a CPU",
        "",
        *hardware.lines(),
        "",
        *time_table(options.tokens, options.repeats),
        *memory_table(options.memory_tokens, options.worlds),
    ]
    text = "\n".join(page)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{datetime.date.today().isoformat()}-cpu.md").write_text(text)


if __name__ == "__main__":
    main()

"""Exact causal attention on several GPUs: time, memory and error, beside peers and the ideal.

``python benchmarks/gpu.py --output benchmarks/results`` on a machine with GPUs writes a page, a
picture and the numbers. Ideal: the same kernel family on one GPU over the whole sequence, divided
by the number of GPUs. Efficiency: ideal over measured. Contenders take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from peers import CannotRunError, Contender, Problem
from ring_core.launching import Worker, launch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
SECONDS_A_TURN = 0.25


def whole(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, alike on every rank."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(1, tokens, heads, HEAD_DIM, generator=generator, device="cuda", dtype=DTYPE)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def milliseconds(run, repeats: int) -> float:
    """Per run, back to back, as a training step makes them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


class Entry:
    """A contender with its tensors on this rank."""

    def __init__(self, contender: Contender, tensors: list[torch.Tensor], alone: bool) -> None:
        self.contender, self.alone = contender, alone
        self.q, self.k, self.v, self.dout = (contender.shard(x).contiguous() for x in tensors)
        self.leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        self.times: dict[str, list[float]] = {"forward": [], "both": []}
        self.host: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    def forward(self) -> None:
        with torch.no_grad():
            self.contender.attend(self.q, self.k, self.v)

    def both(self) -> None:
        out = self.contender.attend(*self.leaves)
        torch.autograd.grad(out, self.leaves, self.dout)

    def warm(self) -> None:
        for run in (self.forward, self.both):
            for _ in range(3):
                run()
            torch.cuda.synchronize()
        for name, run in (("forward", self.forward), ("both", self.both)):
            if not self.alone:
                dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            self.host[name] = 1e3 * (time.perf_counter() - started)
            torch.cuda.synchronize()
        started = time.perf_counter()
        self.both()
        torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - started, device="cuda")
        if not self.alone:  # the ranks must make equally many runs
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.repeats = max(2, min(30, int(SECONDS_A_TURN / float(seconds))))

    def measure_memory(self) -> None:
        outputs = {"forward": self.q.nbytes, "both": self.q.nbytes * 2 + 2 * self.k.nbytes}
        for name, run in (("forward", self.forward), ("both", self.both)):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            self.memory[name] = torch.cuda.max_memory_allocated() - before - outputs[name]

    def turn(self) -> None:
        for name, run in (("forward", self.forward), ("both", self.both)):
            if not self.alone:
                dist.barrier()
            torch.cuda.synchronize()
            self.times[name].append(milliseconds(run, self.repeats))


def ideal(kernel: str, documents: tuple[int, ...] | None) -> Contender:
    """One GPU, the whole sequence: our own call without a group, which is the kernel alone."""
    from ring_core import registry

    attention = registry.create(
        "standard",
        causal=True,
        kernel=kernel,
        group=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )

    def attend(q, k, v):
        plan = (
            attention.plan(q.shape[1])
            if documents is None
            else attention.plan(cu_seqlens=documents)
        )
        return attention(q, k, v, plan=plan)

    return Contender("one GPU", kernel, lambda x: x, attend)


def errors(
    entry: Entry, tensors: list[torch.Tensor], rows: int, documents
) -> dict[str, float] | None:
    """Relative error of out and gradients on a slice of rows, against float64.

    out and dq: the last queries, with all their keys. dk and dv: the last keys, which they alone
    see.
    """
    gather = entry.contender.gather
    if gather is None:
        return None
    out = entry.contender.attend(*entry.leaves)
    found = [gather(x) for x in (out, *torch.autograd.grad(out, entry.leaves, entry.dout))]
    out, dq, dk, dv = (x.detach().double() for x in found)
    q, k, v, dout = (x.double() for x in tensors)
    tokens = q.shape[1]
    worst = {}
    group = HEADS // KV_HEADS
    scale = HEAD_DIM**-0.5
    wanted = {name: [] for name in ("out", "dq", "dk", "dv")}
    for h in (0, HEADS - 1):
        kh, vh = k[0, :, h // group], v[0, :, h // group]
        chosen = torch.arange(tokens - rows, tokens, device="cuda")
        seen = torch.arange(tokens, device="cuda")[None] <= chosen[:, None]
        p = (q[0, chosen, h] @ kh.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        o = p @ vh
        ds = (
            p * (dout[0, chosen, h] @ vh.T - (dout[0, chosen, h] * o).sum(-1, keepdim=True)) * scale
        )
        wanted["out"].append((out[0, chosen, h], o))
        wanted["dq"].append((dq[0, chosen, h], ds @ kh))
    for kh in (0, KV_HEADS - 1):  # the last keys are seen by the last queries alone
        chosen = torch.arange(tokens - rows, tokens, device="cuda")
        dk_, dv_ = 0, 0
        for h in range(kh * group, (kh + 1) * group):
            seen = torch.arange(tokens, device="cuda")[None] <= chosen[:, None]
            p = (q[0, chosen, h] @ k[0, :, kh].T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
            o = p @ v[0, :, kh]
            ds = (
                p
                * (
                    dout[0, chosen, h] @ v[0, :, kh].T
                    - (dout[0, chosen, h] * o).sum(-1, keepdim=True)
                )
                * scale
            )
            dk_ = dk_ + ds[:, chosen].T @ q[0, chosen, h]
            dv_ = dv_ + p[:, chosen].T @ dout[0, chosen, h]
        wanted["dk"].append((dk[0, chosen, kh], dk_))
        wanted["dv"].append((dv[0, chosen, kh], dv_))
    for name, pairs in wanted.items():
        difference = torch.stack([a - b for a, b in pairs]).norm()
        worst[name] = float(difference / torch.stack([b for _, b in pairs]).norm())
    return worst


def contenders(problem: Problem, kernels: list[str], with_peers: bool):
    """Each that can run, and why the others cannot."""
    from peers import context_parallel, ours, ring_flash_attn

    makers = [
        (f"ours, {kernel}", lambda kernel=kernel: ours.contender(problem, kernel))
        for kernel in kernels
    ]
    makers.append(
        (
            f"ours, {kernels[0]}, p2p",
            lambda: ours.contender(problem, kernels[0], communicator="p2p"),
        )
    )
    if with_peers:
        makers += [
            ("ring-flash-attn", lambda: ring_flash_attn.contender(problem)),
            ("torch context_parallel", lambda: context_parallel.contender(problem)),
        ]
    for name, make in makers:
        try:
            yield name, make()
        except CannotRunError as error:
            yield name, str(error)


def measure(
    worker: Worker, tokens: int, kernels: list[str], turns: int, with_peers: bool, documents
) -> dict:
    """One length: every contender, and the ideal of each kernel family, taking turns."""
    torch.cuda.set_device(worker.device)
    dist.barrier()
    problem = Problem(tokens, HEADS, KV_HEADS, HEAD_DIM, dist.group.WORLD, documents)
    tensors = whole(tokens)
    entries: dict[str, Entry] = {}
    skipped: dict[str, str] = {}
    families = dict.fromkeys([*kernels, "flash"] if with_peers else kernels)
    for kernel in families:
        entries[f"ideal, {kernel}"] = Entry(ideal(kernel, documents), tensors, alone=True)
    for name, contender in contenders(problem, kernels, with_peers):
        if isinstance(contender, str):
            skipped[name] = contender
        else:
            entries[name] = Entry(contender, tensors, alone=False)
    found: dict[str, dict] = {}
    for name in list(entries):
        try:
            entries[name].warm()
            entries[name].measure_memory()
            if not entries[name].alone and tokens <= 65536 and documents is None:
                found[name] = {"error": errors(entries[name], tensors, 256, documents)}
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del entries[name]
    del tensors
    for _ in range(turns):
        for entry in entries.values():
            entry.turn()
    for name, entry in entries.items():
        found.setdefault(name, {})
        found[name]["kernel"] = entry.contender.kernel
        found[name]["host"] = entry.host
        for key, times in entry.times.items():
            worst = torch.tensor(statistics.median(times), device="cuda")
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            found[name][key] = float(worst)
        found[name]["range"] = [min(entry.times["both"]), max(entry.times["both"])]
        for key, extra in entry.memory.items():
            most = torch.tensor(float(extra), device="cuda")
            dist.all_reduce(most, dist.ReduceOp.MAX)
            found[name][f"{key} extra, shards"] = float(most) / (
                2 * tokens // worker.world * KV_HEADS * HEAD_DIM * 2
            )
    for name, row in found.items():
        base = found.get(f"ideal, {row['kernel']}")
        if base and not name.startswith("ideal"):
            row["efficiency"] = {
                key: base[key] / worker.world / row[key] for key in ("forward", "both")
            }
    return {"tokens": tokens, "world": worker.world, "found": found, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[torch.cuda.device_count()])
    parser.add_argument("--per-rank", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--kernels", nargs="+", default=["cudnn", "flash4"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--packed", action="store_true", help="12 documents of mixed lengths too")
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    for world in options.ranks:
        for per_rank in options.per_rank:
            for documents in (None, mixed(per_rank * world)) if options.packed else (None,):
                result = launch(
                    measure,
                    per_rank * world,
                    options.kernels,
                    options.turns,
                    not options.no_peers,
                    documents,
                    processes=world,
                    device_type="cuda",
                )[0]
                show(result, per_rank, documents)
                if options.output:
                    name = f"{world}x{per_rank}{'-packed' if documents else ''}.json"
                    (options.output / name).write_text(json.dumps(result, indent=1))


def mixed(tokens: int) -> tuple[int, ...]:
    """Ends of 12 documents whose lengths go from 1/78 of the tokens to 12/78, in a mixed order."""
    order = [7, 2, 11, 4, 9, 1, 12, 5, 3, 10, 6, 8]
    ends = [0]
    for size in order:
        ends.append(ends[-1] + size)
    return tuple(end * tokens // 78 for end in ends)


def show(result: dict, per_rank: int, documents) -> None:
    print(f"== {result['world']} GPUs, {per_rank} per rank{', packed' if documents else ''}")
    for name, row in result["found"].items():
        eff = row.get("efficiency", {})
        print(
            f"{name:28} fwd {row['forward']:8.3f} both {row['both']:8.3f} "
            f"eff {eff.get('forward', 0):.3f} {eff.get('both', 0):.3f} "
            f"range {row['range'][0]:.2f}-{row['range'][1]:.2f} "
            f"host {row['host']['forward']:.2f} {row['host']['both']:.2f} "
            f"shards {row['forward extra, shards']:.2f} {row['both extra, shards']:.2f} "
            + str({k: f"{v:.2e}" for k, v in (row.get("error") or {}).items()}),
            flush=True,
        )
    for name, why in result["skipped"].items():
        print(f"{name}: {why}", flush=True)


if __name__ == "__main__":
    main()

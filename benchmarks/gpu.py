"""Exact causal attention on several GPUs: time, memory and error, beside peers and the ideal.

``python benchmarks/gpu.py --output benchmarks/results`` on a machine with GPUs writes a page, a
picture and the numbers; without ``--output`` it prints the page. Ideal: the same kernel family on
one GPU over the whole sequence, divided by the number of GPUs. Efficiency: ideal over measured.
Contenders take turns; figures are medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import accuracy
import torch
import torch.distributed as dist
from measuring import Entry

import hardware
from peers import (
    CannotRunError,
    Contender,
    Problem,
    context_parallel,
    ours,
    ring_flash_attn,
    ringmaster,
)
from ring_core.launching import Worker, launch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
LONGEST_COMPARED = 65536
"""Tokens up to which errors are computed: float64 on the GPU takes its time."""


def whole(tokens: int, heads: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, alike on every rank."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(1, tokens, each, HEAD_DIM, generator=generator, device="cuda", dtype=DTYPE)
        for each in (heads, kv_heads, kv_heads, heads)
    ]


def mixed(tokens: int) -> tuple[int, ...]:
    """Ends of 12 documents whose lengths go from 1/78 of the tokens to 12/78, in a mixed order."""
    ends = [0]
    for size in (7, 2, 11, 4, 9, 1, 12, 5, 3, 10, 6, 8):
        ends.append(ends[-1] + size)
    return tuple(end * tokens // 78 for end in ends)


def contenders(
    problem: Problem, kernels: Sequence[str], with_peers: bool
) -> Iterator[tuple[str, Contender | str]]:
    """Each that can run, and why the others cannot."""
    makers = {
        f"ours, {kernel}": (lambda k=kernel: ours.contender(problem, k)) for kernel in kernels
    }
    makers[f"ours, {kernels[0]}, p2p"] = lambda: ours.contender(
        problem, kernels[0], communicator="p2p"
    )
    if with_peers:
        makers["ring-flash-attn zigzag"] = lambda: ring_flash_attn.contender(problem)
        makers["ringmaster zigzag"] = lambda: ringmaster.contender(problem)
        makers["torch context_parallel"] = lambda: context_parallel.contender(problem)
    for name, make in makers.items():
        try:
            yield name, make()
        except CannotRunError as error:
            yield name, str(error)


def measure(
    worker: Worker,
    per_rank: int,
    kernels: Sequence[str],
    turns: int,
    with_peers: bool,
    packed: bool,
    heads: int = HEADS,
) -> dict[str, Any]:
    """One length: every contender, and the ideal of each kernel family, taking turns."""
    dist.barrier()
    tokens = per_rank * worker.world
    documents = mixed(tokens) if packed else None
    problem = Problem(tokens, heads, KV_HEADS, HEAD_DIM, dist.group.WORLD, documents)
    tensors = whole(tokens, heads, KV_HEADS)
    rows: dict[str, dict[str, Any]] = {}
    entries: dict[str, Entry] = {}
    skipped: dict[str, str] = {}
    for kernel in dict.fromkeys([*kernels, *(["flash"] if with_peers else [])]):
        entries[f"one GPU, {kernel}"] = Entry(ours.alone(problem, kernel), tensors, alone=True)
    for name, contender in contenders(problem, kernels, with_peers):
        if isinstance(contender, str):
            skipped[name] = contender
        else:
            entries[name] = Entry(contender, tensors, alone=False)
    for name in list(entries):
        try:
            entries[name].warm()
            entries[name].measure_memory()
            rows[name] = {"kernel": entries[name].contender.kernel}
            if not entries[name].alone and tokens <= LONGEST_COMPARED and not packed:
                rows[name]["error"] = accuracy.errors(entries[name], tensors)
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del entries[name]
    del tensors
    for _ in range(turns):
        for entry in entries.values():
            entry.turn()
    shard = 2 * per_rank * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    for name, entry in entries.items():
        for key, times in entry.times.items():
            rows[name][key] = _slowest(statistics.median(times))
            rows[name][f"{key} shards"] = _slowest(entry.memory[key]) / shard
        rows[name]["host"] = entry.host
        rows[name]["spread"] = max(entry.times["both"]) / min(entry.times["both"]) - 1
    for row in rows.values():
        base = rows.get(f"one GPU, {row['kernel']}")
        if base is not None and base is not row:
            row["efficiency"] = {
                key: base[key] / worker.world / row[key] for key in ("forward", "both")
            }
    return {
        "per_rank": per_rank,
        "world": worker.world,
        "packed": packed,
        "heads": f"{heads}/{KV_HEADS}",
        "rows": rows,
        "skipped": skipped,
    }


def _slowest(figure: float) -> float:
    on_all = torch.tensor(float(figure), device="cuda")
    dist.all_reduce(on_all, dist.ReduceOp.MAX)
    return float(on_all)


def table(result: dict[str, Any]) -> list[str]:
    """A measurement as Markdown."""
    title = f"## {result['world']} GPUs, {result['per_rank']} tokens per GPU"
    lines = [
        title + (", 12 packed documents" if result["packed"] else ""),
        "",
        "| | forward, ms | with backward, ms | efficiency | extra memory, shards | "
        "error of out, dq, dk, dv |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        efficiency = row.get("efficiency")
        error = row.get("error")
        lines.append(
            f"| {name} | {row['forward']:.3f} | {row['both']:.3f} "
            + (f"| {efficiency['forward']:.3f} / {efficiency['both']:.3f} " if efficiency else "| ")
            + f"| {row['forward shards']:.1f} / {row['both shards']:.1f} "
            + (f"| {', '.join(f'{x:.2e}' for x in error.values())} |" if error else "| |")
        )
    lines += ["", *(f"Not run: {name}: {why}" for name, why in result["skipped"].items()), ""]
    return lines


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Time of every contender, and beside it its share of its own kernel family's ideal."""
    from matplotlib import pyplot

    height = -(-len(results) // 2)
    figure, panels = pyplot.subplots(
        height, 2, figsize=(12, 0.6 + 2.6 * height), squeeze=False, layout="constrained"
    )
    for panel, result in zip(panels.flat, results, strict=False):
        rows = {n: row for n, row in result["rows"].items() if "efficiency" in row}
        forward = [row["forward"] for row in rows.values()]
        both = [row["both"] for row in rows.values()]
        backward = [b - f for b, f in zip(both, forward, strict=True)]
        panel.barh(list(rows), forward, label="forward", color="#1f77b4")
        bars = panel.barh(list(rows), backward, left=forward, label="backward", color="#ff7f0e")
        shares = [
            f"{x:.1f} ms, {row['efficiency']['both']:.2f}"
            for x, row in zip(both, rows.values(), strict=True)
        ]
        panel.bar_label(bars, shares, padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.3 * max(both))
        packed = ", 12 packed documents" if result["packed"] else ""
        panel.set_title(
            f"{result['world']} GPUs, {result['per_rank']} tokens per GPU{packed}", fontsize=10
        )
        panel.set_xlabel("ms; share of the ideal of the same kernels", fontsize=8)
    for panel in list(panels.flat)[len(results) :]:
        panel.set_axis_off()
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


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
    results = []
    for world in options.ranks:
        for per_rank in options.per_rank:
            for packed in (False, True) if options.packed else (False,):
                arguments = per_rank, options.kernels, options.turns, not options.no_peers, packed
                results += launch(measure, *arguments, processes=world, device_type="cuda")[:1]
                print("\n".join(table(results[-1])), flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.date.today().isoformat()}-gpu"
        (options.output / f"{name}.json").write_text(json.dumps(results, indent=1))
        picture(results, options.output / f"{name}.png")
        page = [
            f"# Exact causal attention, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, bfloat16",
            "",
            *hardware.lines(options.output),
            "",
            f"![efficiency]({name}.png)",
            "",
            *(line for result in results for line in table(result)),
        ]
        (options.output / f"{name}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()

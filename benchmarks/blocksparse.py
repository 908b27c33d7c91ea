"""Block-sparse attention beside dense: speed against the ceiling that its density sets, and error.

``python benchmarks/blocksparse.py --output benchmarks/results`` on a machine with GPUs writes a
page and the numbers; without ``--output`` it prints the table. Every family of patterns at every
length and density, on all ranks and on one; the dense ring; and dense attention on one GPU with the
fastest kernel there. Causal families are measured against causal attention, and their density is
among causal pairs. Figures are medians of the slowest rank.

Errors are relative, against float64 from the definition, of out and gradients of some tokens. Every
tensor is really there; each rank draws the whole sequence alike and keeps its shard.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ring_attention_blocksparse.pairs import Span, active, candidates, seen
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Scene
from torch import Tensor

from page import WAYS, add_arguments, dense_lines, on_many_and_one, times, write
from ring_core import registry
from ring_core.bench.stopwatch import Stopwatch
from ring_core.launching import Worker

HEADS, HEAD_DIM, BLOCK = 8, 128, 128
LENGTHS = [1 << 15, 1 << 17, 1 << 19, 1 << 20]
DENSITIES = [0.005, 0.01, 0.02, 0.05, 0.1]
DENSE_SECONDS = 20.0
"""Dense attention is left out where it would take longer."""


def window(tokens: int, density: float) -> dict[str, Any]:
    side = round(density * tokens / 2)
    return {"patterns": [{"kind": "local", "left": side, "right": side}]}


def sink_and_window(tokens: int, density: float) -> dict[str, Any]:
    left = round(density * tokens / 2)
    patterns = [{"kind": "sink", "n": 64}, {"kind": "local", "left": left, "right": 0}]
    return {"patterns": patterns, "causal": True}


def random_global_local(tokens: int, density: float) -> dict[str, Any]:
    side, blocks = round(density * tokens / 4), round(density * tokens / 2 / BLOCK)
    return {
        "patterns": [
            {"kind": "random", "blocks": max(1, blocks)},
            {"kind": "global_tokens", "ids": list(range(32))},
            {"kind": "local", "left": side, "right": side},
        ]
    }


def topk(tokens: int, density: float) -> dict[str, Any]:
    return {"patterns": [{"kind": "topk", "blocks": max(1, round(density * tokens / BLOCK))}]}


FAMILIES: dict[str, Callable[[int, float], dict[str, Any]]] = {
    "window": window,
    "sink and window, causal": sink_and_window,
    "random, global and local": random_global_local,
    "topk": topk,
}


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    families: tuple[str, ...]
    turns: int
    dtype: str
    kernel: str


def measure(worker: Worker, job: Job) -> list[dict[str, Any]]:
    """All rows that this many ranks can measure. A task for :func:`ring_core.launching.launch`."""
    watch, found = Stopwatch(worker), []
    for tokens in job.lengths:
        for name, fields in _cases(job, tokens):
            one = watch.together(lambda: measure_one(worker, job, watch, tokens, name, fields))  # noqa: B023
            if one is not None:
                found.append(one)
                if worker.rank == 0:
                    print(json.dumps(one), flush=True)
    return found


def _cases(job: Job, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for causal in (False, True):
        yield f"dense{', causal' if causal else ''}", {"variant": "standard", "causal": causal}
    for family in job.families:
        for density in job.densities:
            if density * tokens >= 2 * BLOCK:
                fields = FAMILIES[family](tokens, density)
                sizes = {"block_q": BLOCK, "block_kv": BLOCK, "kernel": job.kernel}
                yield family, {"variant": "blocksparse", **sizes, **fields}


def measure_one(
    worker: Worker, job: Any, watch: Stopwatch, tokens: int, name: str, fields: dict[str, Any]
) -> dict[str, Any] | None:
    """A row: of dense attention if there are no patterns.

    Args:
        job: its ``dtype`` and ``turns`` are looked at.
    """
    dense = "patterns" not in fields
    if dense and _flops(tokens, fields) / worker.world / _rate(worker) > DENSE_SECONDS:
        return None
    case = _Case(worker, job, registry.create(fields), tokens)
    row: dict[str, Any] = {"name": name, "tokens": tokens, "ranks": worker.world}
    case.both()  # compiles, allocates, makes tables
    if not dense:
        plan = case.plan.plan
        row["density"] = case.attention.density if name == "topk" else plan.density()
        row["imbalance"] = case.plan.imbalance
        row["errors"] = case.errors()
    for way, run in (("forward", case.forward), ("both", case.both)):
        row[way] = watch.milliseconds(run, job.turns)
        row[f"{way} bytes"] = watch.bytes(run)
    sent = case.attention.communicator(case.plan, worker.device)
    if sent is not None:
        sent.counters.reset()
        case.forward()
        row["MB sent"] = watch.slowest(sent.counters.bytes_sent) / 1e6
    return row


def _flops(tokens: int, fields: dict[str, Any]) -> float:
    """Of a forward and backward."""
    pairs = tokens**2 / (2 if fields.get("causal") else 1)
    return 3.5 * 4 * pairs * HEADS * HEAD_DIM


def _rate(worker: Worker) -> float:
    """Operations a second that dense attention may be counted on to make."""
    return 4e14 if worker.device.type == "cuda" else 2e10


class _Case:
    def __init__(self, worker: Worker, job: Any, attention: Any, tokens: int) -> None:
        self.worker, self.attention, self.tokens = worker, attention, tokens
        self.plan, self.dtype = attention.plan(tokens), getattr(torch, job.dtype)
        self.q, self.k, self.v, self.dout = (
            self.plan.shard(self._whole(which)).contiguous() for which in range(4)
        )
        for x in (self.q, self.k, self.v):
            x.requires_grad_()

    def _whole(self, which: int) -> Tensor:
        """q, k, v or the gradient of out, of the whole sequence: alike on every rank."""
        generator = torch.Generator(self.worker.device).manual_seed(which)
        shape = 1, self.tokens, HEADS, HEAD_DIM
        return torch.randn(shape, generator=generator, device=self.worker.device, dtype=self.dtype)

    def forward(self) -> None:
        with torch.no_grad():
            self.attention(self.q, self.k, self.v, plan=self.plan)

    def both(self) -> tuple[Tensor, ...]:
        inputs = self.q, self.k, self.v
        out, lse = self.attention(*inputs, plan=self.plan, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, self.dout)

    def errors(self) -> dict[str, float]:
        """Relative errors of some tokens: of out and dq; of dk and dv where no tensors choose."""
        out, lse, *gradients = self.both()
        found = [self.plan.unshard(x) for x in (out, *gradients)]
        lse = self.plan.unshard(lse, dim=2)
        q, k, v, dout = (self._whole(which)[0] for which in range(4))
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        scale = HEAD_DIM**-0.5
        queries = self.plan.plan.queries
        held = {place for run in queries.rows[self.plan.rank] for place in _ends(run)}
        for place in sorted(held):
            token = place if queries.order is None else int(queries.order.tokens()[place])
            for head in (0, HEADS - 1):
                keys = self._seen_by(place, head)
                weights = torch.softmax(k[keys, head].double() @ q[token, head].double() * scale, 0)
                right = weights @ v[keys, head].double()
                given = dout[token, head].double()
                slopes = weights * (v[keys, head].double() @ given - given @ right) * scale
                pairs.setdefault("out", []).append((found[0][0, token, head], right))
                pairs.setdefault("dq", []).append(
                    (found[1][0, token, head], slopes @ k[keys, head].double())
                )
                seeing = self._seeing(place, head)
                if seeing is None:
                    continue
                scores = q[seeing, head].double() @ k[token, head].double() * scale
                weights = torch.exp(scores - lse[0, head, seeing].double())
                given = dout[seeing, head].double()
                delta = (given * found[0][0, seeing, head].double()).sum(-1)
                slopes = weights * (given @ v[token, head].double() - delta) * scale
                pairs.setdefault("dk", []).append(
                    (found[2][0, token, head], slopes @ q[seeing, head].double())
                )
                pairs.setdefault("dv", []).append((found[3][0, token, head], weights @ given))
        return {
            name: float(
                torch.stack([a.double() - b for a, b in each]).norm()
                / torch.stack([b for _, b in each]).norm()
            )
            for name, each in pairs.items()
        }

    def _seen_by(self, place: int, head: int) -> Tensor:
        """The keys that the query at a place sees."""
        scene, patterns = self._scene, self._patterns(head)
        block = place // scene.block_q
        found = candidates(scene, patterns, scene.blocks(torch.tensor([block])), head)
        blocks, whole = found.block, found.whole
        *_, choice = self.attention._latest
        if choice is not None:
            index = int((choice.index == block).nonzero())
            more = [choice.blocks[p][0, head, index] for p in patterns if p.chosen]
            blocks = torch.unique(torch.cat([x[x >= 0].cpu() for x in more]))
            whole = torch.ones_like(blocks, dtype=torch.bool)
        mine, keys = self._sides(place, blocks, scene.block_kv)
        shown = seen(scene, patterns, mine, keys, whole)
        return keys.tokens(scene.order)[0][shown[:, 0]].to(self.worker.device)

    def _seeing(self, place: int, head: int) -> Tensor | None:
        """The queries that see the key at a place; None where tensors choose, on whatever rank."""
        scene, patterns = self._scene, self._patterns(head)
        if any(pattern.chosen for pattern in patterns):
            return None
        known, block = active(scene, patterns, head), place // scene.block_kv
        pairs = (known.block == block).nonzero().squeeze(1)
        index = torch.searchsorted(known.start, pairs, right=True) - 1
        found = candidates(scene, patterns, scene.blocks(index), head)
        there = found.block == block
        key, queries = self._sides(place, index[found.query[there]], scene.block_q)
        shown = seen(scene, patterns, queries, key, found.whole[there])
        return queries.tokens(scene.order)[0][shown[:, :, 0]].to(self.worker.device)

    def _sides(self, place: int, blocks: Tensor, size: int) -> tuple[Span, Span]:
        one = torch.full_like(blocks, place)
        return Span(one, one, 1), Span.of(self._scene, blocks, size)

    @property
    def _scene(self) -> Scene:
        return self.plan.plan.parts[0].scene

    def _patterns(self, head: int) -> tuple[Pattern, ...]:
        return self.plan.plan.of_head(head)


def _ends(run: range) -> set[int]:
    """Tokens of a run that are looked at."""
    return {run[0], run[len(run) // 2], run[-1 - len(run) // 9], run[-1]}


HEADER = [
    "| patterns | tokens | density | forward, ms | with backward, ms | times our dense ring | "
    "times dense on one GPU / ranks | of the ceiling | of one GPU's speed | MB sent a rank | "
    "memory a rank, GB | imbalance | error of out, dq, dk, dv |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def table(many: list[dict[str, Any]], one: list[dict[str, Any]]) -> list[str]:
    """Markdown; pairs of figures are forward / with backward.

    The ceiling is the speed of dense attention on one GPU, times ranks, over the density.
    """
    alone, here = ({_key(row): row for row in rows} for rows in (one, many))
    lines = [*HEADER]
    for row in many:
        if "density" not in row:
            continue
        against = "dense, causal" if "causal" in row["name"] else "dense", row["tokens"], None
        ring, single, same = here.get(against), alone.get(against), alone.get(_key(row))
        cells = [
            row["name"],
            f"{row['tokens']:,}",
            f"{row['density']:.4f}",
            *(f"{row[way]:.2f}" for way in WAYS),
            times(ring, row, 1, ".1f"),
            times(single, row, 1 / row["ranks"], ".1f"),
            times(single, row, row["density"] / row["ranks"], ".2f"),
            times(same, row, 1 / row["ranks"], ".2f"),
            f"{row.get('MB sent', 0):,.1f}",
            " / ".join(f"{row[f'{way} bytes'] / 1e9:.1f}" for way in WAYS),
            f"{row['imbalance']:.3f}",
            ", ".join(f"{x:.1e}" for x in row["errors"].values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *dense_lines([*many, *one])]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    density = row.get("density")
    return row["name"], row["tokens"], None if density is None else round(density, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kernel", default="auto", help="of the sparse rows (default: auto)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    job = Job(
        tuple(options.lengths),
        tuple(options.densities),
        tuple(options.families),
        options.turns,
        options.dtype,
        options.kernel,
    )
    many, one = on_many_and_one(measure, job, options.ranks)
    rows = table(many, one)
    print("\n".join(rows), flush=True)
    if options.output:
        title = (
            f"Block-sparse attention on {options.ranks} ranks, {HEADS} heads of {HEAD_DIM}, "
            f"{job.dtype}, blocks of {BLOCK}"
        )
        write(options.output, "blocksparse", title, rows, {"ranks": many, "one": one})


if __name__ == "__main__":
    main()

"""Dilated attention over ever longer sequences: time, memory and error, beside the dense ring.

``python benchmarks/dilated.py --output benchmarks/results`` on a machine with GPUs writes a page, a
picture and the numbers; without ``--output`` it prints the table. Segments of 2,048 to 65,536
tokens, doubling, at rates 1 to 32. Lengths double until one does not fit. Every tensor is really
there; each rank draws its own shard. Figures are medians of the slowest rank.

Errors are relative, against float64, of out and gradients of some tokens of every rank, in its
last segment too: there indices pass 2**31 and could overflow. Out and dq come from the definition;
dk and dv too, but for the other queries' lse and out, which are those of the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hardware
from ring_core import registry
from ring_core.bench.stopwatch import Stopwatch
from ring_core.launching import Worker, launch

HEADS, HEAD_DIM = 8, 64
SEGMENTS = [2048 << i for i in range(6)]
RATES = [1 << i for i in range(6)]
DENSE_SECONDS = 4.0
"""Dense attention is left out where it would take longer."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    shortest: int
    longest: int
    causal: bool
    segments: tuple[int, ...]
    rates: tuple[int, ...]
    turns: int
    dtype: str


def measure(worker: Worker, job: Job, name: str, way: str) -> list[dict[str, Any]]:
    """One column of the table, down to the length that does not fit or takes too long. A task for
    :func:`ring_core.launching.launch`."""
    fields: dict[str, Any] = {"causal": job.causal}
    if name == "dilated":
        fields |= {"segment_lengths": job.segments, "dilation_rates": job.rates}
    attention, watch = registry.create("standard", **fields), Stopwatch(worker)
    found: list[dict[str, Any]] = []
    tokens = job.shortest
    while tokens <= job.longest:
        # A rank that runs out of memory inside of a case must not leave the others in it.
        one = watch.together(lambda: _Case(worker, job, attention, tokens, way).measure())  # noqa: B023
        if one is None:
            break
        found.append(one)
        if worker.rank == 0:
            print(f"{name} {way}: {tokens:,} tokens, {one['ms']:.2f} ms", flush=True)
        if name == "dense" and one["ms"] > 1e3 * DENSE_SECONDS / 4:
            break
        tokens *= 2
    return found


class _Case:
    def __init__(self, worker: Worker, job: Job, attention: Any, tokens: int, way: str) -> None:
        self.worker, self.job, self.attention, self.way = worker, job, attention, way
        self.plan, self.watch = attention.plan(tokens), Stopwatch(worker)
        generator = torch.Generator(worker.device).manual_seed(worker.rank)
        shape = 1, self.plan.local_len, HEADS, HEAD_DIM
        self.q, self.k, self.v, *rest = (
            torch.randn(
                shape, generator=generator, device=worker.device, dtype=getattr(torch, job.dtype)
            )
            for _ in range(3 if way == "forward" else 4)
        )
        self.dout = rest[0] if rest else None
        if self.dout is not None:
            for x in (self.q, self.k, self.v):
                x.requires_grad_()

    def measure(self) -> dict[str, Any]:
        results = self._run()  # compiles and allocates
        error = self._error(*results) if self.attention.config.segment_lengths else None
        del results
        memory = self.watch.bytes(self._run)
        milliseconds = self.watch.milliseconds(self._run, self.job.turns)
        return {
            "tokens": self.plan.sequences.q_len,
            "ms": milliseconds,
            "bytes": memory + self._shared(),
            "error": error,
        }

    def _run(self) -> tuple[Tensor, ...]:
        if self.dout is None:
            with torch.no_grad():
                return self.attention(self.q, self.k, self.v, plan=self.plan, return_lse=True)
        inputs = self.q, self.k, self.v
        out, lse = self.attention(*inputs, plan=self.plan, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, self.dout)

    def _shared(self) -> int:
        communicator = self.attention.communicator(self.plan, self.worker.device)
        return getattr(communicator, "shared_bytes", 0)

    def _error(self, out: Tensor, lse: Tensor, *gradients: Tensor) -> dict[str, float] | None:
        """Largest relative error of any rank, where its segments are all its own."""
        positions = self.plan.positions
        first, last = int(positions[0]), int(positions[-1])
        local = last - first + 1 == len(positions) and all(
            first % w == 0 and (last + 1) % w == 0 for w in self.job.segments
        )
        errors = self._errors(out, lse, *gradients) if local else {}
        found = {
            name: self.watch.slowest(errors.get(name, -1.0)) for name in ("out", "dq", "dk", "dv")
        }
        known = {name: error for name, error in found.items() if error >= 0}
        return known or None

    def _errors(self, out: Tensor, lse: Tensor, *gradients: Tensor) -> dict[str, float]:
        names = ("out", "dq", "dk", "dv")[: 1 + len(gradients)]
        wrong, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        rows = self.plan.local_len
        tensors = dict(zip(names, (out, *gradients), strict=True))
        for token in (rows - 1, rows - rows // 9, rows // 2 + 77):
            for head in range(HEADS):
                expected = self._expected(token, head, out, lse)
                for name in names:
                    right = expected[name]
                    wrong[name] += float((tensors[name][0, token, head] - right).square().sum())
                    size[name] += float(right.square().sum())
        return {name: math.sqrt(wrong[name] / size[name]) for name in names}

    def _expected(self, token: int, head: int, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
        """Out and dq of a query, from its keys; dk and dv of the key at its place, from the queries
        that see it and what they were given."""
        q, k, v = (x.detach()[0, :, head] for x in (self.q, self.k, self.v))
        scale = HEAD_DIM**-0.5
        kept = []
        for w, r in zip(self.job.segments, self.job.rates, strict=True):
            start = token // w * w
            if (token - start) % r == head % r:
                kept.append(torch.arange(start + head % r, start + w, r, device=q.device))
        others = torch.cat(kept)
        keys = others[others <= token] if self.job.causal else others
        scores = k[keys].double() @ q[token].double() * scale
        weights = torch.softmax(scores, 0)
        found = {"out": weights @ v[keys].double()}
        if self.dout is None:
            return found
        dout = self.dout[0, :, head]
        delta = dout[token].double() @ found["out"]
        slopes = weights * (v[keys].double() @ dout[token].double() - delta)
        found["dq"] = slopes @ k[keys].double() * scale
        queries = others[others >= token] if self.job.causal else others
        scores = q[queries].double() @ k[token].double() * scale
        weights = torch.exp(scores - lse[0, head, queries].double())
        deltas = (dout[queries].double() * out[0, queries, head].double()).sum(-1)
        slopes = weights * (dout[queries].double() @ v[token].double() - deltas)
        found["dk"] = slopes @ q[queries].double() * scale
        found["dv"] = weights @ dout[queries].double()
        return found


HEADER = [
    "| tokens | forward, ms | ns a token | with backward, ms | ns a token | memory a rank, GB | "
    "error of out, dq, dk, dv | dense ring, ms |",
    "|---|---|---|---|---|---|---|---|",
]


def line(row: dict[str, Any], world: int) -> str:
    """A row as Markdown; nanoseconds are of one rank for each of its tokens."""
    cells = [f"{row['tokens']:,}"]
    forward, both = (row.get(f"dilated {way}") for way in ("forward", "both"))
    for found in (forward, both):
        cells += [f"{found['ms']:.2f}", f"{_each(found, row, world):.2f}"] if found else ["", ""]
    cells.append(" / ".join(f"{x['bytes'] / 1e9:.1f}" for x in (forward, both) if x))
    error = next((x["error"] for x in (both, forward) if x and x["error"]), None)
    cells.append(", ".join(f"{x:.1e}" for x in error.values()) if error else "")
    dense = [row[f"dense {way}"] for way in ("forward", "both") if f"dense {way}" in row]
    cells.append(" / ".join(f"{x['ms']:.1f}" for x in dense))
    return f"| {' | '.join(cells)} |"


def _each(found: dict[str, Any], row: dict[str, Any], world: int) -> float:
    return 1e6 * float(found["ms"]) * world / int(row["tokens"])


def picture(rows: Sequence[dict[str, Any]], world: int, path: Path) -> None:
    """Time over length, and time for each token."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = {
        "dilated forward": ("#1f77b4", "-"),
        "dilated both": ("#ff7f0e", "-"),
        "dense forward": ("#1f77b4", ":"),
        "dense both": ("#ff7f0e", ":"),
    }
    for name, (color, style) in styles.items():
        there = [row for row in rows if name in row]
        tokens = [row["tokens"] for row in there]
        label = name.replace("both", "with backward")
        for panel, figures in (
            (left, [row[name]["ms"] for row in there]),
            (right, [_each(row[name], row, world) for row in there]),
        ):
            panel.plot(tokens, figures, style, color=color, marker="o", markersize=3, label=label)
    for panel, title in ((left, "milliseconds"), (right, "nanoseconds of a rank for each token")):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=gpus or 2)
    parser.add_argument("--shortest", type=int, default=1 << 16)
    parser.add_argument("--longest", type=int, default=1 << 28)
    parser.add_argument("--segments", type=int, nargs="+", default=SEGMENTS)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES)
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    job = Job(
        options.shortest,
        options.longest,
        not options.full,
        tuple(options.segments),
        tuple(options.rates),
        options.turns,
        options.dtype,
    )
    device_type = "cuda" if gpus else "cpu"
    columns = {
        f"{name} {way}": launch(
            measure, job, name, way, processes=options.ranks, device_type=device_type
        )[0]
        for name in ("dilated", "dense")
        for way in ("forward", "both")
    }
    rows: dict[int, dict[str, Any]] = {}
    for column, found in columns.items():
        for one in found:
            rows.setdefault(one["tokens"], {"tokens": one["tokens"]})[column] = one
    table = [*HEADER, *(line(row, options.ranks) for row in rows.values())]
    print("\n".join(table), flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.date.today().isoformat()}-dilated"
        (options.output / f"{name}.json").write_text(json.dumps(list(rows.values()), indent=1))
        picture(list(rows.values()), options.ranks, options.output / f"{name}.png")
        mask = "causal" if job.causal else "full"
        page = [
            f"# Dilated attention on {options.ranks} ranks, {mask}, {HEADS} heads of {HEAD_DIM}, "
            f"{job.dtype}",
            "",
            *hardware.lines(options.output),
            f"- segments {list(job.segments)}, rates {list(job.rates)}",
            "",
            f"![time]({name}.png)",
            "",
            *table,
            "",
        ]
        (options.output / f"{name}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()

"""What ``ring-attention plan`` predicts beside what is measured, in one run on one machine.

``python benchmarks/prediction.py --output benchmarks/results`` measures rates with one process and
with several, predicts from them attentions at lengths and in layouts that were not measured,
measures those too, and writes a page. ``--keep FILE`` keeps the rates of several. ``--kernels``:
each attention with every one of these that can compute it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from page import add_arguments, write
from ring_core import registry
from ring_core.bench.memory import PeakMemory
from ring_core.bench.step import Step
from ring_core.bench.stopwatch import Stopwatch
from ring_core.errors import RingError
from ring_core.launching import Worker, launch
from ring_core.prediction.calibration import Job as Rating
from ring_core.prediction.calibration import calibrate
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Rates
from ring_core.prediction.timeline import Where
from ring_core.sequences import Sequences

DILATED = {"segment_lengths": [2048, 4096, 8192], "dilation_rates": [1, 2, 4]}
WINDOW = [{"kind": "local", "left": 512, "right": 512}]
RATED: tuple[Mapping[str, Any], ...] = (
    {"variant": "standard", "causal": True},
    {"variant": "standard", "window": (512, 512)},
    {"variant": "standard", "causal": True, **DILATED},
    {"variant": "blocksparse", "patterns": WINDOW},
    {"variant": "distributed", "causal": True},
)
"""Attentions that are measured, the last one with heads exchanged among all ranks."""
CASES: tuple[Mapping[str, Any], ...] = (
    {"variant": "standard", "causal": True},
    {"variant": "standard", "causal": True, "layout": "contiguous"},
    {"variant": "standard", "causal": True, "layout": "striped"},
    {"variant": "standard", "causal": True, "overlap": False},
    {"variant": "standard"},
    {"variant": "standard", "window": (512, 512)},
    {"variant": "standard", "causal": True, **DILATED},
    {"variant": "blocksparse", "patterns": WINDOW},
    {"variant": "distributed", "causal": True, "ulysses": 2},
)
"""Attentions whose times are predicted."""


@dataclass(frozen=True)
class Job:
    """What to measure; the same for every rank."""

    cases: tuple[Mapping[str, Any], ...]
    rows: tuple[int, ...]
    sizes: Sizes
    turns: int


def measure(worker: Worker, job: Job) -> list[dict[str, Any] | None]:
    """Milliseconds and bytes of each case; None for what cannot run on so many ranks.

    A task for :func:`ring_core.launching.launch`.
    """
    watch = Stopwatch(worker)
    return [
        watch.together(lambda: _one(worker, watch, job, case, rows))  # noqa: B023
        for case in job.cases
        for rows in job.rows
    ]


def _one(
    worker: Worker, watch: Stopwatch, job: Job, case: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    sizes = job.sizes
    attention = registry.create(case)
    plan = attention.plan(rows * worker.world)
    tensors = [
        torch.randn(1, rows, heads, sizes.head_dim, device=worker.device).to(
            getattr(torch, sizes.dtype)
        )
        for heads in (sizes.q_heads, sizes.kv_heads, sizes.kv_heads, sizes.q_heads)
    ]
    small = attention.plan(worker.world)  # or what is loaded at the first call would count
    few = [x[:, : small.local_len] for x in tensors]
    Step(lambda *x: attention(*x, plan=small), few).both()
    step = Step(lambda *x: attention(*x, plan=plan), tensors)
    memory = PeakMemory(worker.device)
    step.both()
    peak = memory.taken()
    step.warm()
    return {
        "forward": watch.milliseconds(step.forward, job.turns),
        "both": watch.milliseconds(step.both, job.turns),
        "peak": int(watch.slowest(peak)) / 1e6,
    }


def predicted(
    case: Mapping[str, Any], rows: int, world: int, sizes: Sizes, rates: Rates
) -> dict[str, Any] | None:
    """The same figures from rates; None for what cannot run."""
    try:
        attention = registry.create(case)
        plan = attention.make_plan(Sequences.build(rows * world), world)
        found = attention.predict(plan, sizes, rates, Where(world))
    except RingError:
        return None
    return {
        "forward": 1e3 * found.forward.total,
        "both": 1e3 * found.total,
        "peak": found.peak_bytes / 1e6,
    }


def rates(
    sizes: Sizes, longest: int, kernels: Sequence[str], processes: int, device_type: str
) -> Rates:
    """Of all that :data:`RATED` names, with the kernels that can."""
    found: Rates | None = None
    for fields, kernel in itertools.product(RATED, kernels):
        fields = {**fields, "kernel": kernel}
        if fields["variant"] == "distributed":
            if processes == 1:
                continue
            fields["ulysses"] = processes
        try:
            more = calibrate(Rating(fields, sizes, longest), processes, device_type)
        except RingError as error:
            print(f"{fields}: {str(error).splitlines()[0]}", flush=True)
            continue
        found = more if found is None else found.beside(more)
    if found is None:
        raise SystemExit(f"none of {', '.join(kernels)} computes anything here")
    return found


HEADER = [
    "| attention | ranks | rows a rank | forward, ms: measured, predicted "
    "| with backward, ms: measured, predicted | off by | peak, MB: measured, predicted |",
    "|---|---|---|---|---|---|---|",
]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, and the errors in a sentence."""
    lines = [*HEADER]
    for row in rows:
        pairs = [
            f"{row['measured'][what]:,.2f}, {row['predicted'][what]:,.2f}"
            for what in ("forward", "both", "peak")
        ]
        off = f"{row['off']['forward']:+.0%} / {row['off']['both']:+.0%}"
        cells = [row["case"], str(row["ranks"]), f"{row['rows']:,}", *pairs[:2], off, pairs[2]]
        lines.append(f"| {' | '.join(cells)} |")
    for ranks in sorted({row["ranks"] for row in rows}):
        errors = [abs(row["off"]["both"]) for row in rows if row["ranks"] == ranks]
        lines += [
            "",
            f"Forward and backward of {ranks} rank{'s' * (ranks > 1)}: off by "
            f"{statistics.median(errors):.1%} in the median, {max(errors):.1%} at most.",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    gpus = torch.cuda.device_count()
    parser.add_argument("--rows", type=int, nargs="+", help="a rank")
    parser.add_argument("--longest", type=int, default=32768 if gpus else 4096, help="rated")
    parser.add_argument("--heads", default="32/8" if gpus else "8/2")
    parser.add_argument("--head-dim", type=int, default=128 if gpus else 64)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the rates")
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.set_defaults(dtype="bfloat16" if gpus else "float32")
    options = parser.parse_args()
    q_heads, kv_heads = map(int, options.heads.split("/"))
    head_dim, device_type = options.head_dim, "cuda" if gpus else "cpu"
    sizes = Sizes(q_heads, kv_heads, head_dim, head_dim, 1, options.dtype)
    rated = {
        count: rates(sizes, options.longest, options.kernels, count, device_type)
        for count in sorted({1, options.ranks})
    }
    if options.keep:
        rated[options.ranks].save(options.keep)
    default = (3072, 12288, 24576) if gpus else (768, 3072)
    cases = tuple({**case, "kernel": kernel} for kernel in options.kernels for case in CASES)
    job = Job(cases, tuple(options.rows or default), sizes, options.turns)
    found = []
    for world in sorted({1, options.ranks}):
        took = launch(measure, job, processes=world, device_type=device_type)[0]
        wanted = [(case, rows) for case in job.cases for rows in job.rows]
        for (case, rows), real in zip(wanted, took, strict=True):
            guess = predicted(case, rows, world, sizes, rated[world])
            if real is None or guess is None or (world == 1 and "ulysses" in case):
                continue
            off = {way: guess[way] / real[way] - 1 for way in ("forward", "both")}
            found.append(
                {
                    "case": ", ".join(
                        f"{name}={value}" for name, value in case.items() if value != "auto"
                    ),
                    "fields": case,
                    "ranks": world,
                    "rows": rows,
                    "measured": real,
                    "predicted": guess,
                    "off": off,
                }
            )
    lines = table(found)
    print("\n".join(lines), flush=True)
    if options.output:
        title = f"Predicted and measured times, {q_heads} query heads"
        measured = [json.loads(one.model_dump_json()) for one in rated.values()]
        name = f"prediction-{f'{options.ranks}gpu' if gpus else 'cpu'}"
        write(options.output, name, title, lines, {"cases": found, "rates": measured})


if __name__ == "__main__":
    main()

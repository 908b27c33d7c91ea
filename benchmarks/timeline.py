"""What the GPUs do during one forward and backward: kernels and transfers, from torch's profiler.

``python benchmarks/timeline.py --output docs/images`` writes ``timeline.png``: for each rank a row
of its kernels and one of its transfers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ring_core import registry
from ring_core.launching import Worker, launch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
KINDS = {
    "keys, values and gradients on the wire": ("#d1495b", ("ptop",)),
    "copies within the GPU": ("#edae49", ("dtod", "memset", "fill", "copy")),
    "before and after": ("#66a182", ("dot_do_o", "convert", "reduce", "preprocess", "postprocess")),
    "merging and adding": ("#00798c", ("_combine", "functor_add")),
    "attention": ("#2e4057", ("fprop", "bprop", "fwd_sm90", "bwd_sm90", "flash")),
    "other": ("#8d96a3", ("",)),
}


def record(worker: Worker, per_rank: int, kernel: str, calls: int = 3) -> list[dict[str, Any]]:
    """GPU events of the last of ``calls`` calls: name, stream, start and length in microseconds."""
    attention = registry.create("standard", causal=True, kernel=kernel)
    plan = attention.plan(per_rank * worker.world)
    shapes = [(1, plan.local_len, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    leaves, dout = [x.requires_grad_() for x in tensors[:3]], tensors[3]

    def call() -> None:
        torch.autograd.grad(attention(*leaves, plan=plan), leaves, dout)

    for _ in range(5):
        call()
    torch.cuda.synchronize()
    if worker.world > 1:
        dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu.sort(key=lambda event: event["ts"])
    last = on_gpu[-(len(on_gpu) // calls) :]
    return [{key: event[key] for key in ("name", "ts", "dur", "tid")} for event in last]


def kind(event: dict[str, Any]) -> str:
    """The first of :data:`KINDS` that the event's name speaks of."""
    name = event["name"].lower()
    return next(label for label, (_, words) in KINDS.items() if any(w in name for w in words))


def picture(ranks: Sequence[Sequence[dict[str, Any]]], title: str, path: Path) -> None:
    """Two rows a rank: its kernels, and what the region's stream moves."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.7 * len(ranks)), layout="constrained")
    for rank, events in enumerate(ranks):
        began = events[0]["ts"]
        main = max({e["tid"] for e in events}, key=lambda tid: _busy(events, tid))
        for event in events:
            row = 2 * rank + (event["tid"] != main)
            color = KINDS[kind(event)][0]
            start, length = (event["ts"] - began) / 1e3, event["dur"] / 1e3
            axes.barh(row, length, left=start, height=0.8, color=color, linewidth=0)
    names = [f"rank {rank}, {what}" for rank in range(len(ranks)) for what in ("kernels", "wire")]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    handles = [Patch(color=color, label=label) for label, (color, _) in KINDS.items()]
    axes.legend(
        handles=handles,
        fontsize=7,
        ncols=len(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.22),
    )
    figure.savefig(path, dpi=130)


def _busy(events: Sequence[dict[str, Any]], tid: int) -> float:
    return sum(event["dur"] for event in events if event["tid"] == tid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--per-rank", type=int, default=8192)
    parser.add_argument("--kernel", default="cudnn")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    ranks = launch(
        record, options.per_rank, options.kernel, processes=options.ranks, device_type="cuda"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "timeline.json").write_text(json.dumps(ranks))
    gpu = torch.cuda.get_device_name()
    title = (
        f"One causal forward and backward, {options.per_rank} tokens on each of {options.ranks} "
        f"{gpu}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, kernel {options.kernel}"
    )
    picture(ranks, title, options.output / "timeline.png")


if __name__ == "__main__":
    main()

"""What the GPUs do during one forward and backward: kernels and transfers, from torch's profiler.

``python benchmarks/timeline.py --output docs/images`` writes ``timeline.png`` of the first rank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ring_core import registry
from ring_core.launching import Worker, launch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def record(worker: Worker, per_rank: int, kernel: str) -> list[dict]:
    """GPU events of the last of a few calls: name, lane, start and length in microseconds."""
    attention = registry.create("standard", causal=True, kernel=kernel)
    plan = attention.plan(per_rank * worker.world)
    shapes = [(1, plan.local_len, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    leaves, dout = [x.requires_grad_() for x in tensors[:3]], tensors[3]

    def call() -> None:
        with torch.profiler.record_function("call/forward"):
            out = attention(*leaves, plan=plan)
        with torch.profiler.record_function("call/backward"):
            torch.autograd.grad(out, leaves, dout)

    for _ in range(5):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    path = Path(f"/tmp/trace-{worker.rank}.json")
    recorded.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--per-rank", type=int, default=8192)
    parser.add_argument("--kernel", default="cudnn")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    events = launch(
        record, options.per_rank, options.kernel, processes=options.ranks, device_type="cuda"
    )
    for rank, found in enumerate(events):
        kept = [e for e in found if e.get("ph") == "X" and e.get("dur", 0) > 0]
        kept = [
            {k: e[k] for k in ("name", "cat", "ts", "dur", "tid")}
            for e in kept
            if e.get("cat")
            in ("kernel", "gpu_memcpy", "gpu_memset", "user_annotation", "cuda_runtime")
        ]
        name = f"timeline-{options.kernel}-{options.ranks}-rank{rank}.json"
        (options.output / name).write_text(json.dumps(kept))


if __name__ == "__main__":
    main()

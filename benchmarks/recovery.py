"""A rank of a training job is killed: how long until the job goes on, and on which losses.

``python benchmarks/recovery.py --output benchmarks/results`` runs ``examples/train_fsdp2.py`` under
torch's launcher, once undisturbed and once with a ``kill -9`` of the last rank in mid-training.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from page import write

SCRIPT = Path(__file__).parents[1] / "examples" / "train_fsdp2.py"


def train(folder: Path, options: argparse.Namespace, kill_after: int | None) -> dict[str, Any]:
    """A job's steps, and when a rank was killed."""
    history = folder / "history"
    fields = ("tokens", "width", "layers", "heads", "steps", "every")
    settings = {name: getattr(options, name) for name in fields}
    settings |= {"ring": options.ranks, "sequences": 1, "checkpoints": folder / "checkpoints"}
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    launcher += ["--max-restarts=1", "--monitor-interval=0.1"]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    job = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(SCRIPT), *flags, f"--history={history}"],
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    killed = None
    while kill_after is not None and job.poll() is None:
        if history.exists() and history.read_text().count("\n") >= kill_after:
            os.kill(process_of(options.ranks - 1, job.pid), signal.SIGKILL)
            killed = time.time()
            break
        time.sleep(0.002)
    if job.wait() != 0:
        raise SystemExit(f"the job ended with exit code {job.returncode}; see above")
    return {"killed": killed, "steps": [json.loads(line) for line in history.open()]}


def process_of(rank: int, launcher: int) -> int:
    """The process of this rank under torch's launcher, on Linux."""
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    raise SystemExit(f"no process of rank {rank}")


def rows(options: argparse.Namespace, whole: dict[str, Any], hit: dict[str, Any]) -> list[str]:
    """Markdown of what the two jobs came to."""
    usual = {one["step"]: one["loss"] for one in whole["steps"]}
    before = [one for one in hit["steps"] if one["time"] <= hit["killed"]]
    after = hit["steps"][len(before) :]
    pace = [b["time"] - a["time"] for a, b in zip(whole["steps"], whole["steps"][1:], strict=False)]
    apart = max(abs(one["loss"] - usual[one["step"]]) for one in hit["steps"])
    first = {one["step"]: one["loss"] for one in before}
    twice = [abs(one["loss"] - first[one["step"]]) for one in after if one["step"] in first]
    return [
        f"{options.ranks} ranks share a sequence of {options.tokens:,} tokens; "
        f"{options.layers} layers of width {options.width}, a checkpoint every {options.every} "
        f"steps, {options.steps} steps.",
        "",
        "| | |",
        "|---|---|",
        f"| a step, undisturbed | {1000 * median(pace):.0f} ms |",
        f"| killed after step | {before[-1]['step']} |",
        f"| went on with step | {after[0]['step']} |",
        f"| from the kill to the end of that step | {after[0]['time'] - hit['killed']:.1f} s |",
        f"| from the start to the first step, undisturbed | {whole['started']:.1f} s |",
        f"| losses, first and last | {usual[1]:.4f}, {usual[options.steps]:.4f} |",
        f"| steps done twice, largest difference between their losses | {max(twice):.1e} |",
        f"| all steps, largest difference from the undisturbed job | {apart:.1e} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=gpus or 2)
    parser.add_argument("--tokens", type=int, default=32768 if gpus else 1024)
    parser.add_argument("--width", type=int, default=1024 if gpus else 64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8 if gpus else 4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--kill-after", type=int, default=25)
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, kill_after in (("whole", None), ("hit", options.kill_after)):
            (Path(folder) / name).mkdir()
            began = time.time()
            found.append(train(Path(folder) / name, options, kill_after))
            found[-1]["started"] = found[-1]["steps"][0]["time"] - began
    lines = rows(options, *found)
    print("\n".join(lines))
    if options.output:
        title = f"A training job of {options.ranks} ranks, one of which is killed"
        write(options.output, "recovery", title, lines, {"undisturbed, killed": found})


if __name__ == "__main__":
    main()

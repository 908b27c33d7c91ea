"""What stands beside every figure: hardware, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("triton", "flash-attn-4", "flash-attn", "ring-flash-attn", "axolotl-ringmaster")
"""Whose versions are told where they are installed."""


def lines(output: Path | None = None) -> list[str]:
    """Markdown bullets that say where and how a result was measured.

    Args:
        output: a folder among the command's words that is this machine's own affair.
    """
    words = ["benchmarks/results" if word == str(output) else word for word in sys.argv[1:]]
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *words])
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- command: `{command}`",
        f"- processor: {_processor()}, {os.cpu_count()} logical cores; {platform.system()}",
        f"- GPUs: {', '.join(gpus) or 'none'}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, "
        f"ring-attention-core {version('ring-attention-core')}"
        + "".join(f", {name} {found}" for name in PACKAGES if (found := _version(name))),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()

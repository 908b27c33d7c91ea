"""What stands beside every figure: hardware, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def lines() -> list[str]:
    """Markdown bullets that say where and how a result was measured."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- command: `{command}`",
        f"- processor: {_processor()}, {os.cpu_count()} logical cores; {platform.system()}",
        f"- GPUs: {', '.join(gpus) or 'none'}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, "
        f"ring-attention-core {version('ring-attention-core')}",
    ]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()

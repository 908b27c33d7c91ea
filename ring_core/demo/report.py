"""A comparison as data: what ``report.json`` holds."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ring_core.demo.comparison import EPSILON, LEARNING_RATE, SIZE, TOLERANCE, Comparison, Run

SCHEMA_VERSION = 1


def report(comparison: Comparison, command: Sequence[str]) -> dict[str, Any]:
    """Everything measured, and what it was measured on. Bytes and seconds throughout."""
    document, options = comparison.document, comparison.options
    return {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "document": {
            "name": document.name,
            "sha256": document.sha256,
            "bytes": len(document.data),
        },
        "settings": {
            "variant": comparison.variant,
            "fields": dict(options.fields),
            "processes": options.processes,
            "context_asked_for": options.context,
            "context": comparison.context,
            "steps": options.steps,
            "seed": options.seed,
            "model": {**asdict(SIZE), "parameters": comparison.parameters, "dtype": "float32"},
            "optimizer": {"name": "AdamW", "learning_rate": LEARNING_RATE, "epsilon": EPSILON},
        },
        "agreement": {
            "tolerance": TOLERANCE,
            "largest_difference": comparison.largest_difference,
            "first_step_apart": comparison.first_apart,
            "agree": comparison.first_apart is None,
        },
        "unsharded": _run(comparison.unsharded),
        "sharded": _run(comparison.sharded),
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "device_type": run.device_type,
        "losses": run.losses,
        "tokens_per_second": run.tokens_per_second,
        "memory_method": run.ranks[0].memory_method,
        "ranks": [
            {
                "rank": one.rank,
                "tokens": one.tokens,
                "peak_memory_bytes": one.peak_bytes,
                "attention_bytes_sent": one.bytes_sent,
                "attention_bytes_planned": one.bytes_planned,
                "step_seconds": one.seconds,
            }
            for one in run.ranks
        ],
    }


def hardware() -> dict[str, Any]:
    """The machine, and the software that decides how fast it is."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:  # no Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()

"""Figures of several ranks beside those of one: comparisons, and the dated page."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hardware
from ring_core.launching import Worker, launch

WAYS = ("forward", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every such script has."""
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=gpus or 2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="folder for a dated page")


def on_many_and_one(
    measure: Callable[[Worker, Any], list[dict[str, Any]]], job: Any, ranks: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What rank 0 of so many found, and of one."""
    device_type = "cuda" if torch.cuda.device_count() else "cpu"
    many, one = (
        launch(measure, job, processes=count, device_type=device_type)[0] for count in (ranks, 1)
    )
    return many, one


def times(other: dict[str, Any] | None, row: dict[str, Any], factor: float, how: str) -> str:
    """How many times faster a row is than another one, times a factor; nothing without it."""
    if other is None:
        return ""
    return " / ".join(format(other[way] / row[way] * factor, how) for way in WAYS)


def dense_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of those without patterns."""
    lines = ["", "| dense | tokens | ranks | forward, ms | with backward, ms |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        if "density" not in row:
            shown = " | ".join(f"{row[way]:.2f}" for way in WAYS)
            lines.append(f"| {row['name']} | {row['tokens']:,} | {row['ranks']} | {shown} |")
    return lines


def write(
    output: Path, name: str, title: str, lines: list[str], figures: dict[str, list[dict[str, Any]]]
) -> None:
    """A page and its figures, with hardware, versions, date and command."""
    output.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today().isoformat()}-{name}"
    (output / f"{name}.json").write_text(json.dumps(figures, indent=1))
    page = [f"# {title}", "", *hardware.lines(output), "", *lines, ""]
    (output / f"{name}.md").write_text("\n".join(page))

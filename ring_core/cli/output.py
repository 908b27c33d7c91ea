"""What the subcommands print with: plain text where there is no terminal, and JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: brackets in an error are no markup."""
    return Console(stderr=stderr, markup=False, highlight=False)


def table(*columns: str, numbers: bool = False) -> Table:
    """A table without frame; ``numbers``: every column but the first is aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        right = numbers and index > 0
        made.add_column(column, justify="right" if right else "left", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """``value`` on stdout, indented, and nothing else."""
    print(json.dumps(value, indent=2))

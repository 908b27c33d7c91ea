"""Signs of life while a run trains: a bar on a terminal, a line every few steps elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINES = 6

Report = Callable[[int, float], None]
"""Called with the number of steps done and the last one's loss."""


@contextmanager
def progress(title: str, steps: int, *, shown: bool) -> Iterator[Report]:
    """Show on stderr how far a run is; nothing where ``shown`` is false."""
    if not shown:
        yield lambda done, loss: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, loss: _line(title, steps, done, loss)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, loss="")
        yield lambda done, loss: bar.update(task, completed=done, loss=f"loss {loss:.4f}")


def _line(title: str, steps: int, done: int, loss: float) -> None:
    if done in (1, steps) or done % max(1, steps // _LINES) == 0:
        print(f"{title}: step {done}/{steps}, loss {loss:.4f}", file=sys.stderr, flush=True)

"""``ring-attention bench``: the installed variants beside dense attention, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ring_core.cli.arguments import add_set, at_least, read_fields, set_fields
from ring_core.cli.output import console, print_json, table
from ring_core.errors import ConfigError, InputError
from ring_core.registry import registry

if TYPE_CHECKING:
    from ring_core.bench.measure import Contender, Row

SUMMARY = "measure the installed variants beside dense attention on this machine"

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.add_argument(
        "--variants", nargs="+", metavar="VARIANT", help="which ones (default: all installed)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML or JSON with the fields of one more attention; may be given several times",
    )
    add_set(parser)
    for name, default, what in (
        ("seq-len", 2048, "tokens of the sequence"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("head-dim", 64, "size of a head"),
        ("turns", 3, "of which the median counts"),
    ):
        parser.add_argument(
            f"--{name}",
            type=at_least(1),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "-n",
        "--processes",
        type=at_least(1),
        metavar="N",
        help="default: one for each GPU, or 2 where there is none",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="default: bfloat16 on GPUs, float32 without"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where bench.json and bench.png go"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not the table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if an attention that was named could not run."""
    if arguments.heads % arguments.kv_heads:
        raise InputError(
            f"{arguments.heads} query heads are no multiple of {arguments.kv_heads} KV heads"
        )
    if arguments.output and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('--output draws: pip install "ring-attention-core[demo]"')
    import torch

    from ring_core.bench.measure import Job, compare

    gpus = torch.cuda.device_count()
    contenders = _contenders(arguments)
    dtype = arguments.dtype or ("bfloat16" if gpus else "float32")
    processes = arguments.processes or gpus or 2
    if gpus and processes > gpus:
        raise InputError(f"--processes {processes}: there are {gpus} GPUs, one for each process")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    out = console(stderr=arguments.json)
    out.print(
        f"{arguments.seq_len:,} tokens, {arguments.heads} query and {arguments.kv_heads} KV heads "
        f"of {arguments.head_dim}, {dtype}, {processes} processes on "
        f"{torch.cuda.get_device_name() if gpus else 'the CPU'}, torch {torch.__version__}",
        soft_wrap=True,
    )
    with tempfile.TemporaryDirectory(prefix="ring-attention-") as folder:
        job = Job(
            contenders=contenders,
            tokens=arguments.seq_len,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            dtype=getattr(torch, dtype),
            causal=bool(set_fields(arguments.set).get("causal", False)),
            turns=arguments.turns,
            seed=arguments.seed,
            folder=folder,
        )
        rows = compare(job, processes, "cuda" if gpus else "cpu")
    _report(out, rows, arguments, dtype)
    return int(any(row.refused for row in rows))


def _contenders(arguments: argparse.Namespace) -> tuple[Contender, ...]:
    """
    Raises:
        RingError: one cannot be built.
    """
    from ring_core.bench.measure import Contender

    given = set_fields(arguments.set)
    found = [
        Contender(name, {**given, "variant": name})
        for name in arguments.variants or registry.names()
    ]
    for path in arguments.config:
        found.append(Contender(path.stem, {**given, **read_fields(path)}))
    for contender in found:
        registry.create(contender.fields)  # or the error comes before anything is measured
    return tuple(found)


def _report(out: Console, rows: Sequence[Row], arguments: argparse.Namespace, dtype: str) -> None:
    found = {"dtype": dtype, "tokens": arguments.seq_len, "rows": [asdict(row) for row in rows]}
    if arguments.json:
        print_json(found)
    else:
        _show(out, rows)
    if arguments.output:
        from ring_core.bench.picture import draw

        (arguments.output / "bench.json").write_text(json.dumps(found, indent=2) + "\n")
        draw(rows, f"{arguments.seq_len:,} tokens, {dtype}", arguments.output / "bench.png")
        out.print(f"\nWritten: {arguments.output / 'bench.json'}, bench.png", soft_wrap=True)


def _show(out: Console, rows: Sequence[Row]) -> None:
    columns = ("Ranks", "Forward, ms", "With backward, ms", "Peak, MB", "Sent, MB")
    shown = table("Attention", *columns, "Error", numbers=True)
    for row in rows:
        figures: list[Any] = [row.name, str(row.ranks)]
        if not row.refused:
            times = (f"{one:,.1f}" for one in (row.forward, row.both))
            sizes = (f"{one / _MB:,.1f}" for one in (row.peak_bytes, row.bytes_sent))
            figures += [*times, *sizes, f"{max((row.errors or {}).values()):.1e}"]
        shown.add_row(*figures)
    out.print(shown)
    out.print("Error: the largest of out, dq, dk, dv, relative to float64. Peak: with backward.")
    for row in rows:
        if row.refused:
            out.print(f"{row.name}: {row.refused}", soft_wrap=True)

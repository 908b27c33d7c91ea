"""``ring-attention demo``: train on one long document, sharded and not, and compare the two."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ring_core.cli.arguments import at_least
from ring_core.cli.output import console, print_json, table
from ring_core.errors import DemoError

if TYPE_CHECKING:
    from ring_core.demo.comparison import Comparison

SUMMARY = "train a small language model on one long document, sharded and not, and compare them"

_ROWS = 12
_MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="train on the bytes of FILE (default: Python's help)",
    )
    parser.add_argument(
        "--variant", default="standard", help="see ring-attention list (default: %(default)s)"
    )
    for name, what in (
        ("segment-lengths", "dilated attention: tokens of each branch's segments, as 1024 8192"),
        ("dilation-rates", "and of how many tokens each branch keeps one, as 1 4"),
    ):
        parser.add_argument(f"--{name}", type=at_least(1), nargs="+", metavar="N", help=what)
    parser.add_argument(
        "--processes", type=at_least(2), default=4, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--context",
        type=at_least(1),
        default=8192,
        metavar="N",
        help="tokens (bytes) of the one sequence of a step; any number (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=at_least(2), default=32, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-report"),
        metavar="DIR",
        help="where report.json and report.png go (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of weights and windows (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report, not the tables")


def run(arguments: argparse.Namespace) -> int:
    """Train both, show the numbers, write the report; 1 if the two losses differ at some step."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError('the demo draws with matplotlib: pip install "ring-attention-core[demo]"')
    from ring_core.demo import comparison, document
    from ring_core.demo.picture import draw
    from ring_core.demo.report import report

    text = document.load(arguments.input)
    # With --json stdout holds the JSON and nothing else.
    out = console(stderr=arguments.json)
    if text.longest_context() < arguments.context:
        out.print(
            f"The document has {len(text.data):,} bytes: the context is "
            f"{text.longest_context():,} tokens, not {arguments.context:,}."
        )
    options = comparison.Options(
        variant=arguments.variant,
        processes=arguments.processes,
        context=arguments.context,
        steps=arguments.steps,
        seed=arguments.seed,
        fields=_fields(arguments),
    )
    prepared = comparison.prepare(text, options)
    folder = _folder(arguments.output)
    out.print(str(prepared))
    compared = prepared.run()
    found = report(compared, _command(arguments))
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(compared, folder / "report.png")
    if arguments.json:
        print_json(found)
    else:
        _show(out, compared)
        out.print(f"\nWritten: {folder / 'report.json'}, {folder / 'report.png'}", soft_wrap=True)
    return _verdict(out, compared)


def _fields(arguments: argparse.Namespace) -> dict[str, list[int]]:
    """The config's fields that were given."""
    names = ("segment_lengths", "dilation_rates")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name)}


def _folder(path: Path) -> Path:
    """Make the folder before training, not after it in vain."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make --output {path}: {error.strerror}") from error
    return path


def _command(arguments: argparse.Namespace) -> list[str]:
    """The options in full, so that the report says how to repeat it."""
    words = ["ring-attention", "demo"]
    for name in ("variant", "processes", "context", "steps", "seed"):
        words += [f"--{name}", str(getattr(arguments, name))]
    for name, numbers in _fields(arguments).items():
        words += [f"--{name.replace('_', '-')}", *map(str, numbers)]
    return words + (["--input", arguments.input.name] if arguments.input else [])


def _show(out: Console, compared: Comparison) -> None:
    out.print()
    losses = table("Step", "Unsharded loss", "Sharded loss", "Difference", numbers=True)
    for step in _some(len(compared.differences)):
        losses.add_row(
            str(step + 1),
            f"{compared.unsharded.losses[step]:.6f}",
            f"{compared.sharded.losses[step]:.6f}",
            f"{compared.differences[step]:.1e}",
        )
    out.print(losses)
    out.print()
    steps = len(compared.differences)
    columns = ("Process", "Tokens", "Peak MB", "of unsharded", "Sent MB/step", "Planned MB/step")
    ranks = table(*columns, numbers=True)
    alone = compared.unsharded.ranks[0].peak_bytes
    for run in (compared.unsharded, compared.sharded):
        for one in run.ranks:
            ranks.add_row(
                "unsharded" if run is compared.unsharded else f"rank {one.rank}",
                f"{one.tokens:,}",
                f"{one.peak_bytes / _MB:.1f}",
                f"{one.peak_bytes / alone:.0%}",
                f"{one.bytes_sent / steps / _MB:.2f}",
                f"{one.bytes_planned / steps / _MB:.2f}",
            )
    out.print(ranks)
    out.print(
        "\nPeak memory is what training took: weights, gradients, optimiser state, activations and "
        "buffers. Sent is what attention sent to other ranks, forward and backward."
    )
    out.print(
        f"\nTokens per second: {compared.unsharded.tokens_per_second:,.0f} unsharded, "
        f"{compared.sharded.tokens_per_second:,.0f} sharded."
    )
    if compared.sharded.device_type == "cpu":
        out.print(
            "Both runs had the same cores between them: what sharding lowers here is the memory of "
            "each process, not the time."
        )


def _some(count: int) -> Sequence[int]:
    """Indices of all rows, or of the first ones, some between, and the last."""
    if count <= _ROWS:
        return range(count)
    return sorted({round(i * (count - 1) / (_ROWS - 1)) for i in range(_ROWS)})


def _verdict(out: Console, compared: Comparison) -> int:
    from ring_core.demo.comparison import TOLERANCE

    apart = compared.first_apart
    if apart is None:
        out.print(
            f"\nThe two runs agree: losses differ by at most {compared.largest_difference:.1e} "
            f"over {len(compared.differences)} steps (allowed: {TOLERANCE:.0e})."
        )
        return 0
    print(
        f"error: the two runs differ from step {apart} on: loss "
        f"{compared.unsharded.losses[apart - 1]:.6f} unsharded and "
        f"{compared.sharded.losses[apart - 1]:.6f} sharded (allowed: {TOLERANCE:.0e})",
        file=sys.stderr,
    )
    return 1

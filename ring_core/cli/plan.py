"""``ring-attention plan``: who would compute and send what, for a variant, a length and a world."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_core.cli.arguments import add_set, at_least, read_fields, set_fields
from ring_core.cli.output import console, print_json, table
from ring_core.errors import InputError
from ring_core.registry import registry

if TYPE_CHECKING:
    from ring_core.plan import ForHeads

SUMMARY = "show who would compute and send what, on any number of ranks; needs none of them"

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.add_argument(
        "--variant", default="auto", help="see ring-attention list (default: by the fields)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON with fields of the config"
    )
    add_set(parser)
    for name, default, what in (
        ("seq-len", None, "tokens of the sequence"),
        ("world", 4, "ranks"),
        ("heads", 32, "query heads"),
        ("kv-heads", 8, "key/value heads"),
        ("head-dim", 128, "size of a head"),
        ("batch", 1, "batch rows"),
    ):
        parser.add_argument(
            f"--{name}",
            type=at_least(1),
            default=default,
            required=default is None,
            metavar="N",
            help=what if default is None else f"{what} (default: {default})",
        )
    parser.add_argument(
        "--dtype", choices=tuple(_BYTES), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the map of tiles, as PNG or SVG"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, and draw it if asked to. Always 0."""
    from ring_core.plan import ForHeads
    from ring_core.sequences import Sequences

    if arguments.heads % arguments.kv_heads:
        raise InputError(
            f"{arguments.heads} query heads are no multiple of {arguments.kv_heads} KV heads"
        )
    if arguments.picture:
        from ring_core.cli.plan_picture import check, draw

        check(arguments.picture)
    attention = registry.create(arguments.variant, config=_given(arguments))
    sequences = Sequences.build(arguments.seq_len)
    plan = ForHeads.of(attention.make_plan(sequences, arguments.world), arguments.kv_heads)
    found = _described(plan, arguments)
    if arguments.json:
        print_json({"config": attention.config.model_dump(mode="json"), **found})
    else:
        _show(attention.config.variant, found, arguments)
    if arguments.picture:
        draw(plan, f"{attention.config.variant}, {arguments.seq_len:,} tokens", arguments.picture)
        console(stderr=arguments.json).print(f"Map of tiles: {arguments.picture}", soft_wrap=True)
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = read_fields(arguments.config) if arguments.config else {}
    return {**fields, **set_fields(arguments.set)}


def _described(plan: ForHeads, arguments: argparse.Namespace) -> dict[str, Any]:
    from ring_core.rounds import elements_sent, rounds

    work = [plan.work(rank, arguments.batch) for rank in range(plan.world)]
    total = sum(work) or 1
    row = 2 * arguments.head_dim * arguments.batch * _BYTES[arguments.dtype]
    ranks = []
    for rank in range(plan.world):
        hops = {
            step.offset: row
            * sum(len(part.rows) * part.heads.count(arguments.kv_heads) for part in step.parts)
            for one in rounds(plan, rank, 1)
            for step in one.steps
        }
        ranks.append(
            {
                "rank": rank,
                "tokens": plan.queries.owned(rank),
                "share_of_work": float(work[rank] / total),
                "bytes_fetched_by_offset": {str(t): size for t, size in hops.items() if size},
                "bytes_sent": row * elements_sent(plan, rank, arguments.kv_heads),
            }
        )
    return {
        "world": plan.world,
        "tokens": arguments.seq_len,
        "imbalance": plan.imbalance(arguments.batch),
        "facts": dict(plan.facts()),
        "alternatives": [dict(one) for one in plan.alternatives()],
        "ranks": ranks,
    }


def _show(variant: str, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    out = console()
    out.print(f"{variant}: {arguments.seq_len:,} tokens on {arguments.world} ranks", soft_wrap=True)
    rows = table("Rank", "Tokens", "Work", "Sends", "Fetches, by offset", numbers=True)
    for one in found["ranks"]:
        hops = one["bytes_fetched_by_offset"]
        listed = ", ".join(f"{t}: {size / _MB:,.1f}" for t, size in hops.items())
        rows.add_row(
            str(one["rank"]),
            f"{one['tokens']:,}",
            f"{one['share_of_work']:.1%}",
            f"{one['bytes_sent'] / _MB:,.1f}",
            listed or "-",
        )
    out.print(rows)
    out.print(
        f"Keys and values of a forward in MB, {arguments.kv_heads} KV heads of "
        f"{arguments.head_dim}, {arguments.dtype}. A backward fetches them again, and sends as "
        "many gradients back.",
        soft_wrap=True,
    )
    out.print(f"imbalance: {found['imbalance']:.3f} (the busiest rank over the mean)")
    for name, what in found["facts"].items():
        out.print(f"{name}: {what}", soft_wrap=True)
    if found["alternatives"]:
        first, *others = found["alternatives"][0]
        weighed = table(first, *others, numbers=True)
        for one in found["alternatives"]:
            weighed.add_row(*one.values())
        out.print(weighed)

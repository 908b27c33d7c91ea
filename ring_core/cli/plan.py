"""``ring-attention plan``: who would compute and send what, for a variant, a length and a world."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_core.cli.arguments import add_set, at_least, read_fields, set_fields
from ring_core.cli.output import console, print_json, table
from ring_core.cli.plan_time import (
    add_time_arguments,
    compare,
    measure,
    rates_of,
    show_times,
    times,
)
from ring_core.errors import InputError
from ring_core.registry import registry

if TYPE_CHECKING:
    from ring_core.plan import ForHeads
    from ring_core.prediction.memory import Sizes

SUMMARY = "show who would compute and send what, on any number of ranks; needs none of them"

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_MB = 1e6
_RANKS, _OFFSETS = 16, 4
"""Ranks, and fetches of each, that are listed."""


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
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: %(default)s")
    add_time_arguments(parser)
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the map of tiles, as PNG or SVG"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, and draw it if asked to. Always 0."""
    from ring_core.plan import ForHeads
    from ring_core.prediction.memory import Sizes
    from ring_core.sequences import Sequences

    if arguments.heads % arguments.kv_heads:
        raise InputError(
            f"{arguments.heads} query heads are no multiple of {arguments.kv_heads} KV heads"
        )
    if arguments.picture:
        from ring_core.cli.plan_picture import check, draw

        check(arguments.picture)
    fields = {"variant": arguments.variant, **_given(arguments)}
    attention = registry.create(fields)
    head_dim = arguments.head_dim
    sizes = Sizes(
        arguments.heads, arguments.kv_heads, head_dim, head_dim, arguments.batch, arguments.dtype
    )
    if arguments.calibrate:
        measure(fields, sizes, arguments)
    rates = rates_of(arguments)
    sequences = Sequences.build(arguments.seq_len)
    plan = attention.make_plan(sequences, arguments.world)
    found = _described(ForHeads.of(plan, arguments.kv_heads), attention.config.overlap, sizes)
    found["prediction"] = times(attention, plan, sizes, rates, arguments)
    found["comparison"] = compare(fields, sequences, sizes, rates, arguments)
    if arguments.json:
        print_json({"config": attention.config.model_dump(mode="json"), **found})
    else:
        _show(attention.config.variant, found, arguments)
        show_times(found, rates, arguments)
    if arguments.picture:
        draw(
            ForHeads.of(plan, arguments.kv_heads),
            f"{attention.config.variant}, {arguments.seq_len:,} tokens",
            arguments.picture,
        )
        console(stderr=arguments.json).print(f"Map of tiles: {arguments.picture}", soft_wrap=True)
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = read_fields(arguments.config) if arguments.config else {}
    return {**fields, **set_fields(arguments.set)}


def _described(plan: ForHeads, overlap: bool, sizes: Sizes) -> dict[str, Any]:
    from ring_core.prediction.memory import peak_bytes
    from ring_core.prediction.timeline import some_ranks
    from ring_core.rounds import elements_sent, rounds

    row = sizes.key_row * sizes.itemsize
    which = some_ranks(plan.world, _RANKS)
    work = {rank: plan.work(rank, sizes.batch) for rank in which}
    total = sum(work.values()) * Fraction(plan.world, len(which)) or 1
    ranks = []
    for rank in which:
        mine = rounds(plan, rank, 1)
        hops = {
            step.offset: row
            * sum(len(part.rows) * part.heads.count(sizes.kv_heads) for part in step.parts)
            for one in mine
            for step in one.steps
        }
        ranks.append(
            {
                "rank": rank,
                "tokens": plan.queries.owned(rank),
                "share_of_work": float(work[rank] / total),
                "bytes_fetched_by_offset": {str(t): size for t, size in hops.items() if size},
                "bytes_sent": row * elements_sent(plan, rank, sizes.kv_heads),
                "peak_bytes": peak_bytes(plan, mine, sizes, sizes.itemsize == 2, overlap),
            }
        )
    mean = sum(work.values()) / len(which)
    return {
        "world": plan.world,
        "tokens": plan.queries.length,
        "imbalance": float(max(work.values()) / mean) if mean else 1.0,
        "facts": dict(plan.facts()),
        "alternatives": [dict(one) for one in plan.alternatives()],
        "ranks": ranks,
    }


def _show(variant: str, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    out = console()
    out.print(f"{variant}: {arguments.seq_len:,} tokens on {arguments.world} ranks", soft_wrap=True)
    rows = table("Rank", "Tokens", "Work", "Peak", "Sends", "Fetches, by offset", numbers=True)
    for one in found["ranks"]:
        hops = one["bytes_fetched_by_offset"]
        few = [f"{t}: {size / _MB:,.1f}" for t, size in hops.items()]
        more = [f"and {len(few) - _OFFSETS} more"] if len(few) > _OFFSETS else []
        listed = ", ".join([*few[:_OFFSETS], *more])
        rows.add_row(
            str(one["rank"]),
            f"{one['tokens']:,}",
            f"{one['share_of_work']:.1%}",
            f"{one['peak_bytes'] / _MB:,.1f}",
            f"{one['bytes_sent'] / _MB:,.1f}",
            listed or "-",
        )
    out.print(rows)
    if len(found["ranks"]) < arguments.world:
        out.print(f"{len(found['ranks'])} of {arguments.world:,} ranks", soft_wrap=True)
    out.print(
        f"Keys and values of a forward in MB, {arguments.kv_heads} KV heads of "
        f"{arguments.head_dim}, {arguments.dtype}. A backward fetches them again, and sends as "
        "many gradients back. Peak: beyond inputs, in forward and backward.",
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

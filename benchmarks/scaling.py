"""One table of 1, 2, 4 and 8 ranks: exact, packed, meshes, block-sparse and dilated attention.

``python benchmarks/scaling.py --output benchmarks/results`` on a machine with GPUs takes as many of
1, 2, 4 and 8 as there are; exact attention stands beside torch's context_parallel, ring-flash-attn
and ringmaster in the same run, at the shapes that ring-flash-attn (32/8 heads) and MagiAttention
(64/8) publish. Without GPUs the exact part is left out, whose kernels and peers need some, and
``--worlds`` and the sizes want to be small: a rehearsal.

Efficiency is one rank's time for the whole sequence, divided by the number of ranks, over the
measured one; of dilated attention, whose length grows with the ranks, one rank's time for a token
over that of a rank's token. ``predicted`` is what rates predict: ``--rates``; below the table
stands what they do not know.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dilated
import gpu
import mesh
import torch

import blocksparse
from page import WAYS, write
from ring_core import registry
from ring_core.errors import RingError
from ring_core.launching import launch
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import read
from ring_core.prediction.timeline import Where
from ring_core.sequences import Sequences

Row = dict[str, Any]
Fields = dict[str, Any]
DEVICE = "cuda" if torch.cuda.device_count() else "cpu"

_SEEN = 0.01
"""Of all keys that a query sees in the block-sparse rows."""


def row(case: str, ranks: int, times: Row, efficiency: list[float] | None = None) -> Row:
    """Figures of one case on so many ranks, by way."""
    found: Row = {"case": case, "ranks": ranks, **{way: times[way] for way in WAYS}}
    return found if efficiency is None else {**found, "efficiency": efficiency}


def exact(world: int, options: argparse.Namespace) -> Iterator[Row]:
    """Causal attention, and 12 packed documents, beside peers and one GPU."""
    for heads, per_rank, packed in itertools.product((32, 64), options.rows, (False, True)):
        if packed and heads != 32:
            continue
        peers = not packed and world > 1
        arguments = per_rank, options.kernels, options.turns, peers, packed, heads
        found = launch(gpu.measure, *arguments, processes=world, device_type=DEVICE)[0]
        what = "packed" if packed else "causal"
        for name, figures in found["rows"].items():
            case = f"{what}, {heads}/{gpu.KV_HEADS} heads, {per_rank:,} a rank: {name}"
            shares = figures.get("efficiency")
            one = row(case, world, figures, shares and [shares[way] for way in WAYS])
            if name in [f"ours, {kernel}" for kernel in options.kernels]:
                fields = {"variant": "standard", "causal": True, "kernel": figures["kernel"]}
                tokens = per_rank * world
                whole = {"cu_seqlens": gpu.mixed(tokens)} if packed else {"seq_len": tokens}
                sizes = Sizes(heads, gpu.KV_HEADS, gpu.HEAD_DIM, gpu.HEAD_DIM, 1, options.dtype)
                one |= predicted(fields, Sequences.build(**whole), world, sizes, options)
            yield one


def meshes(world: int, options: argparse.Namespace) -> Iterator[Row]:
    """Heads exchanged times rings, every split, and one rank that has the whole sequence."""

    def measured(rows: tuple[int, ...], ranks: int) -> Iterator[Row]:
        heads = ((options.heads, options.kv_heads),)
        job = mesh.Job(rows, heads, options.head_dim, options.turns, options.dtype, "auto")
        for one in launch(mesh.measure, job, processes=ranks, device_type=DEVICE)[0]:
            if isinstance(one["fields"].get("ulysses"), int):
                yield one

    dim = options.head_dim
    sizes = Sizes(options.heads, options.kv_heads, dim, dim, 1, options.dtype)
    alone = {one["rows"]: one for one in measured(tuple(n * world for n in options.rows), 1)}
    for figures in measured(tuple(options.rows), world) if world > 1 else alone.values():
        degree, tokens = figures["fields"]["ulysses"], figures["rows"] * world
        shares = [alone[tokens][way] / world / figures[way] for way in WAYS]
        case = f"mesh, {figures['heads']} heads, {figures['rows']:,} a rank: {degree} exchange"
        fields = {"variant": "distributed", "causal": True, "ulysses": degree}
        found = predicted(fields, Sequences.build(tokens), world, sizes, options)
        yield row(case, world, figures, shares if world > 1 else None) | found


def sparse(world: int, options: argparse.Namespace) -> Iterator[Row]:
    """A window of 1% of the tokens."""
    tokens, block = options.sparse_tokens, blocksparse.BLOCK
    job = blocksparse.Job((tokens,), (_SEEN,), ("window",), options.turns, options.dtype, "auto")
    fields = {"variant": "blocksparse", "block_q": block, "block_kv": block}
    fields |= blocksparse.FAMILIES["window"](tokens, _SEEN)
    heads, dim = blocksparse.HEADS, blocksparse.HEAD_DIM
    sizes = Sizes(heads, heads, dim, dim, 1, options.dtype)
    for figures in launch(blocksparse.measure, job, processes=world, device_type=DEVICE)[0]:
        if "density" in figures:
            found = predicted(fields, Sequences.build(tokens), world, sizes, options)
            yield row(f"window of 1%, {tokens:,} tokens", world, figures) | found


def longest(world: int, options: argparse.Namespace) -> Iterator[Row]:
    """Dilated attention of as many tokens as fit, or of the most that were asked for."""
    job = dilated.Job(
        options.dilated_shortest,
        options.dilated_longest,
        True,
        tuple(dilated.SEGMENTS),
        tuple(dilated.RATES),
        options.turns,
        options.dtype,
    )
    last = {}
    for way in WAYS:
        arguments = job, "dilated", way
        found = launch(dilated.measure, *arguments, processes=world, device_type=DEVICE)[0]
        last[way] = found[-1] if found else None
    if all(last.values()):
        one = row("dilated, the most that fits", world, {way: last[way]["ms"] for way in WAYS})
        tokens = [last[way]["tokens"] for way in WAYS]
        fields = {"variant": "standard", "causal": True}
        fields |= {"segment_lengths": dilated.SEGMENTS, "dilation_rates": dilated.RATES}
        heads, dim = dilated.HEADS, dilated.HEAD_DIM
        sizes = Sizes(heads, heads, dim, dim, 1, options.dtype)
        forward, both = (
            predicted(fields, Sequences.build(length), world, sizes, options) for length in tokens
        )
        if "predicted" in forward:
            both["predicted"][0] = forward["predicted"][0]
        yield {**one, "tokens": tokens, **both}


def predicted(
    fields: Fields, sequences: Sequences, world: int, sizes: Sizes, options: argparse.Namespace
) -> Row:
    """Milliseconds by way, or why the rates do not know such a call."""
    attention = registry.create(fields)
    plan = attention.make_plan(sequences, world)
    try:
        found = attention.predict(plan, sizes, read(options.rates), Where(world))
    except RingError as error:
        return {"unpredicted": str(error)}
    return {"predicted": [1e3 * found.forward.total, 1e3 * found.total]}


def with_efficiency(rows: list[Row]) -> None:
    """Of cases that were measured on one rank too, where they have none."""
    alone = {one["case"]: one for one in rows if one["ranks"] == 1}
    for one in rows:
        base = alone.get(one["case"])
        if "efficiency" in one or base is None or one["ranks"] == 1:
            continue
        tokens = [1 / one["ranks"]] * len(WAYS)
        if "tokens" in one:
            pairs = zip(one["tokens"], base["tokens"], strict=True)
            tokens = [mine / theirs / one["ranks"] for mine, theirs in pairs]
        one["efficiency"] = [
            base[way] / one[way] * share for way, share in zip(WAYS, tokens, strict=True)
        ]


def table(rows: list[Row], worlds: list[int]) -> list[str]:
    """A line for each case, a column for each number of ranks."""
    lines = [
        "Forward / with backward, ms; in brackets the efficiency; behind it what was predicted.",
        "",
        f"| | {' | '.join(map(str, worlds))} |",
        f"|---|{'---|' * len(worlds)}",
    ]
    for case in dict.fromkeys(one["case"] for one in rows):
        cells = []
        for world in worlds:
            found = [one for one in rows if (one["case"], one["ranks"]) == (case, world)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    unknown: dict[str, list[str]] = {}
    for one in rows:
        if "unpredicted" in one:
            unknown.setdefault(one["unpredicted"], []).append(f"{one['case']} ({one['ranks']})")
    return [*lines, "", *(f"Not predicted: {', '.join(of)}: {why}" for why, of in unknown.items())]


def _cell(one: Row) -> str:
    text = " / ".join(f"{one[way]:,.2f}" for way in WAYS)
    if "tokens" in one:
        text += f" ({' / '.join(f'{tokens:,}' for tokens in one['tokens'])} tokens)"
    if one.get("efficiency"):
        text += f" [{' / '.join(f'{share:.3f}' for share in one['efficiency'])}]"
    if one.get("predicted"):
        text += f", {' / '.join(f'{ms:,.2f}' for ms in one['predicted'])}"
    return text


PARTS = {"exact": exact, "meshes": meshes, "sparse": sparse, "dilated": longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    worlds = [world for world in (1, 2, 4, 8) if world <= (gpus or 2)]
    parser.add_argument("--worlds", type=int, nargs="+", default=worlds)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768], help="a rank")
    parser.add_argument("--heads", type=int, default=32, help="of meshes")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kernels", nargs="+", default=["cudnn", "flash4"])
    parser.add_argument("--sparse-tokens", type=int, default=1 << 20)
    parser.add_argument("--dilated-shortest", type=int, default=1 << 20)
    parser.add_argument("--dilated-longest", type=int, default=1 << 28)
    parser.add_argument("--rates", default="h200" if gpus else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpus else "float32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    if _SEEN * options.sparse_tokens < 2 * blocksparse.BLOCK:
        least = 2 * blocksparse.BLOCK / _SEEN
        parser.error(f"--sparse-tokens: 1% of fewer than {least:,.0f} are no two blocks")
    if not gpus and "exact" in options.parts:
        print("exact: left out, its kernels and peers need GPUs", flush=True)
        options.parts.remove("exact")
    rows: list[Row] = []
    for world, part in itertools.product(options.worlds, options.parts):
        rows += PARTS[part](world, options)
    with_efficiency(rows)
    lines = table(rows, options.worlds)
    print("\n".join(lines), flush=True)
    if options.output:
        title = f"{', '.join(map(str, options.worlds))} ranks side by side"
        write(options.output, "scaling", title, lines, {"rows": rows})


if __name__ == "__main__":
    main()

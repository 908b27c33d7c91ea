"""Times in ``ring-attention plan``: rates, what they predict, and plans beside each other."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ring_core.cli.arguments import at_least, positive
from ring_core.cli.output import console, table
from ring_core.errors import ConfigError, InputError, RingError
from ring_core.registry import registry

if TYPE_CHECKING:
    from ring_core.attention import BaseRingAttention
    from ring_core.plan import Plan
    from ring_core.prediction.memory import Sizes
    from ring_core.prediction.rates import Rates
    from ring_core.sequences import Sequences

_MB, _GB = 1e6, 1e9


def add_time_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what predictions need."""
    parser.add_argument(
        "--rates",
        metavar="NAME|FILE",
        help="predict times by these: rates that come with the core (cpu, h200), or a file "
        "(default: those measured here, if any were)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure what this machine needs for such an attention first, and keep it in --rates",
    )
    parser.add_argument(
        "-n",
        "--processes",
        type=at_least(1),
        metavar="N",
        help="that --calibrate measures with (default: one for each GPU, or 2 where there is none)",
    )
    parser.add_argument(
        "--ranks-per-host", type=at_least(1), metavar="N", help="default: all ranks on one host"
    )
    for name, what in (
        ("link", "between two ranks of a host (default: as measured)"),
        ("between", "between ranks of two hosts (default: as on one)"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, metavar="GB/S", help=f"what travels in a second {what}"
        )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="FIELD=A,B,...",
        help="predict with each of these values too, as layout=zigzag,striped or ulysses=1,2,4 or "
        "variant=standard,blocksparse; with several such options every combination",
    )


def measure(fields: Mapping[str, Any], sizes: Sizes, arguments: argparse.Namespace) -> None:
    """Measure this machine, and keep what was measured with what the file holds of it."""
    import torch

    from ring_core.prediction import calibration
    from ring_core.prediction.rates import default_file, read, shipped

    if arguments.rates in shipped():
        raise InputError(
            f"--rates {arguments.rates}: these come with the core; name a file to keep others in"
        )
    path = Path(arguments.rates) if arguments.rates else default_file()
    before = read(str(path)) if path.exists() else None
    gpus = torch.cuda.device_count()
    processes = arguments.processes or gpus or 2
    if gpus and processes > gpus:
        raise InputError(f"--processes {processes}: there are {gpus} GPUs, one for each process")
    note = console(stderr=True)
    with note.status(f"Measuring with {processes} processes"):
        job = calibration.Job(fields, sizes, calibration.LONGEST)
        rates = calibration.calibrate(job, processes, "cuda" if gpus else "cpu")
    alike = ("device", "software", "processes")
    if before is not None and all(getattr(before, x) == getattr(rates, x) for x in alike):
        rates = rates.beside(before)
    rates.save(path)
    note.print(f"Rates of {rates.device}: {path}", soft_wrap=True)


def rates_of(arguments: argparse.Namespace) -> Rates | None:
    """The rates that were asked for, or those measured here; None: there are none.

    Raises:
        InputError: there are none, and an option needs some.
    """
    from ring_core.prediction.rates import Link, default_file, read

    if arguments.rates is None and not default_file().exists():
        asked = [
            f"--{name.replace('_', '-')}"
            for name in ("link", "between", "ranks_per_host", "compare")
            if getattr(arguments, name)
        ]
        if asked:
            raise InputError(
                f"{asked[0]} is about times, which are predicted by rates: name some with --rates "
                "(cpu and h200 come with the core), or measure this machine with --calibrate"
            )
        return None
    rates = read(arguments.rates or str(default_file()))
    if arguments.link:
        link = rates.link or Link(
            communicator="given", shards=1, start=0.0, bytes_per_second=1.0, hidden=1.0
        )
        link = link.model_copy(update={"bytes_per_second": arguments.link * _GB})
        rates = rates.model_copy(update={"link": link})
    return rates


def times(
    attention: BaseRingAttention,
    plan: Plan,
    sizes: Sizes,
    rates: Rates | None,
    arguments: argparse.Namespace,
) -> dict[str, Any] | None:
    """What is predicted, in seconds; or why nothing is, as "refused"; None without rates."""
    from ring_core.prediction.timeline import Where

    if rates is None:
        return None
    between = arguments.between and arguments.between * _GB
    where = Where(arguments.ranks_per_host or plan.world, between)
    try:
        found = attention.predict(plan, sizes, rates, where)
    except InputError as error:
        return {"refused": str(error)}
    return {
        **asdict(found),
        "forward": found.forward.parts(),
        "backward": found.backward.parts(),
        "total": found.total,
        "device": rates.device,
        "date": rates.date,
    }


def compare(
    fields: Mapping[str, Any],
    sequences: Sequences,
    sizes: Sizes,
    rates: Rates | None,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """What is predicted with each combination of values, the fastest first."""
    choices = dict(map(_values, arguments.compare))
    rows: list[dict[str, Any]] = []
    for values in itertools.product(*choices.values()) if choices else ():
        given = dict(zip(choices, values, strict=True))
        row: dict[str, Any] = {"fields": given}
        try:
            attention = registry.create({**fields, **given})
            plan = attention.make_plan(sequences, arguments.world)
            row |= times(attention, plan, sizes, rates, arguments) or {}
        except RingError as error:
            row["refused"] = str(error)
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("total", float("inf")))


def _values(text: str) -> tuple[str, list[Any]]:
    """
    Raises:
        ConfigError: it is not FIELD=A,B.
    """
    name, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(values)
        if isinstance(found, str):
            found = [yaml.safe_load(value) for value in found.split(",")]
    except yaml.YAMLError as error:
        raise ConfigError(f"--compare {text}: {error}") from error
    if not name or not equals or found in (None, []):
        raise ConfigError(f"--compare {text}: expected FIELD=A,B,..., as layout=zigzag,striped")
    return name, found if isinstance(found, list) else [found]


def show_times(
    found: Mapping[str, Any], rates: Rates | None, arguments: argparse.Namespace
) -> None:
    """Print a prediction and a comparison, or how to come by one."""
    out = console()
    if rates is None:
        out.print(
            "times: measure this machine with --calibrate, or take rates that come with the core, "
            "as --rates h200",
            soft_wrap=True,
        )
        return
    out.print()
    source = f"Predicted by rates of {rates.device}, {rates.date}"
    predicted = found["prediction"]
    if "refused" in predicted:
        out.print(f"No times: {predicted['refused']}", soft_wrap=True)
    else:
        degree = predicted["degree"]
        mesh = f", {degree} ranks exchange heads" if degree > 1 else ""
        out.print(f"{source}, kernel {predicted['kernel']}{mesh}, in ms:", soft_wrap=True)
        out.print(_parts(predicted))
        for mask, other in predicted["instead"]:
            out.print(f"No rates of tiles {mask!r}: those of {other!r} were taken", soft_wrap=True)
    if found["comparison"]:
        out.print()
        out.print(f"{source}, in ms, the fastest first:", soft_wrap=True)
        out.print(_rows(found["comparison"]))
        for row in found["comparison"]:
            if "refused" in row:
                out.print(f"{_said(row['fields'])}: {row['refused']}", soft_wrap=True)


def _parts(predicted: Mapping[str, Any]) -> Any:
    parts = list(predicted["forward"])
    shown = table("", *(part.capitalize() for part in parts), "All", numbers=True)
    for way in ("forward", "backward"):
        spent = [predicted[way][part] for part in parts]
        shown.add_row(way, *(f"{1e3 * one:,.2f}" for one in (*spent, sum(spent))))
    return shown


def _rows(rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = ("Forward", "Backward", "Both", "Heads exchanged", "Peak, MB")
    shown = table("", *columns, numbers=True)
    for row in rows:
        if "refused" in row:
            continue
        ways = [sum(row[way].values()) for way in ("forward", "backward")]
        shown.add_row(
            _said(row["fields"]),
            *(f"{1e3 * one:,.2f}" for one in (*ways, sum(ways))),
            str(row["degree"]),
            f"{row['peak_bytes'] / _MB:,.1f}",
        )
    return shown


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())

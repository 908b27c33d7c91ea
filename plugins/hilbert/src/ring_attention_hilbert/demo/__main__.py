"""``python -m ring_attention_hilbert.demo``: take the noise off a photograph, sharded and not."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ring_attention_hilbert.demo.denoising import Job, RankResult, noisy, train
from ring_attention_hilbert.demo.network import Size
from ring_attention_hilbert.demo.photograph import grid_of, load, patches, picture
from ring_core.cli.arguments import at_least
from ring_core.cli.output import console, table
from ring_core.demo.report import hardware
from ring_core.launching import launch

TOLERANCE = 1e-4
"""How far the losses of a step may be apart."""
_MB = 1e6


def main(arguments: list[str] | None = None) -> int:
    """Train both, show the numbers, write pictures and report; 1 if the losses differ."""
    options = _parser().parse_args(arguments)
    try:
        photograph = load(options.input)
    except ImportError as error:
        return _failed(f'{error}: pip install "ring-attention-hilbert[demo]"')
    except OSError as error:
        return _failed(f"cannot read --input {options.input}: {error}")
    grid = grid_of(photograph, options.patch)
    if min(grid) < 1:
        return _failed(
            f"a photograph of {photograph.shape[1]} x {photograph.shape[0]} pixels has no patch of "
            f"{options.patch} x {options.patch}; give a smaller --patch"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    job = Job(
        clean=patches(photograph, options.patch),
        grid=grid,
        radius=options.radius,
        order=options.order,
        noise=options.noise,
        steps=options.steps,
        seed=options.seed,
        size=Size(),
    )
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    device_type = "cuda" if gpus >= options.processes else "cpu"
    alone, ranks = (
        launch(
            train,
            job,
            f"{name} ({count} process{'es' if count > 1 else ''})",
            processes=count,
            device_type=device_type,
        )
        for name, count in (("unsharded", 1), ("sharded", options.processes))
    )
    found = _report(job, options, device_type, alone[0], ranks)
    (options.output / "photograph.json").write_text(json.dumps(found, indent=2) + "\n")
    _draw(job, options, ranks[0], found, options.output / "photograph.png")
    _show(job, found, options)
    return 0 if found["largest_difference"] <= TOLERANCE else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ring_attention_hilbert.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="a picture (default: one that matplotlib brings)"
    )
    parser.add_argument(
        "--order",
        choices=("auto", "hilbert", "morton", "tile", "row"),
        default="hilbert",
        help="default: %(default)s",
    )
    for name, least, default, what in (
        ("processes", 2, 4, "ranks"),
        ("patch", 1, 4, "pixels along a patch"),
        ("radius", 1, 3, "patches seen on each side"),
        ("steps", 2, 80, "of training"),
        ("seed", 0, 0, "of weights and noise"),
    ):
        parser.add_argument(
            f"--{name}",
            type=at_least(least),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "--noise", type=float, default=0.2, help="standard deviation (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-report"),
        metavar="DIR",
        help="default: %(default)s",
    )
    return parser


def _report(
    job: Job,
    options: argparse.Namespace,
    device_type: str,
    alone: RankResult,
    ranks: list[RankResult],
) -> dict[str, Any]:
    given, _ = noisy(job, job.steps)
    assert ranks[0].denoised is not None
    differences = [abs(a - b) for a, b in zip(alone.losses, ranks[0].losses, strict=True)]
    steps = max(1, job.steps - 1)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "settings": {
            "input": options.input.name if options.input else "grace_hopper.jpg of matplotlib",
            "grid": job.grid,
            "patches": len(job.clean),
            "patch": options.patch,
            "radius": job.radius,
            "order": ranks[0].order,
            "noise": job.noise,
            "steps": job.steps,
            "processes": options.processes,
            "seed": job.seed,
            "device_type": device_type,
        },
        "tolerance": TOLERANCE,
        "largest_difference": max(differences),
        "losses_unsharded": alone.losses,
        "losses_sharded": ranks[0].losses,
        "decibels_noisy": _decibels(given, job),
        "decibels_denoised": _decibels(ranks[0].denoised, job),
        "seconds_a_step_unsharded": sum(alone.seconds[1:]) / steps,
        "seconds_a_step_sharded": sum(ranks[0].seconds[1:]) / steps,
        "ranks": [
            {
                "rank": one.rank,
                "patches": one.tokens,
                "attention_bytes_sent": one.bytes_sent,
            }
            for one in ranks
        ],
    }


def _decibels(found: torch.Tensor, job: Job) -> float:
    """Peak signal to noise ratio."""
    return float(-10 * torch.log10((found - job.clean).square().mean()))


def _draw(
    job: Job, options: argparse.Namespace, first: RankResult, found: dict[str, Any], path: Path
) -> None:
    from matplotlib.figure import Figure

    assert first.denoised is not None
    given, _ = noisy(job, job.steps)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 4)
    pictures = (
        (job.clean, "photograph"),
        (given, f"with noise: {found['decibels_noisy']:.1f} dB"),
        (first.denoised, f"after training: {found['decibels_denoised']:.1f} dB"),
    )
    for one, (parts, title) in zip(axes, pictures, strict=False):
        one.imshow(picture(parts, job.grid, options.patch).clamp(0, 1).numpy())
        one.set(title=title, xticks=[], yticks=[])
    steps = range(1, job.steps + 1)
    axes[3].plot(steps, found["losses_unsharded"], alpha=0.4, linewidth=8, label="unsharded")
    label = f"sharded over {options.processes}"
    axes[3].plot(steps, found["losses_sharded"], linestyle=(0, (4, 2)), label=label)
    axes[3].set(title="Loss", xlabel="step", ylabel="share of the noise's power")
    title = f"largest difference {found['largest_difference']:.1e}"
    axes[3].legend(frameon=False, title=title, alignment="left")
    figure.suptitle(
        f"{len(job.clean):,} patches, each seeing those within {job.radius}, on "
        f"{options.processes} processes; order {first.order.split()[0]}"
    )
    figure.savefig(path, dpi=120)


def _show(job: Job, found: dict[str, Any], options: argparse.Namespace) -> None:
    out = console()
    ranks = table("Process", "Patches", "Sent MB/step", numbers=True)
    ranks.add_row("unsharded", f"{len(job.clean):,}", "0.00")
    for one in found["ranks"]:
        ranks.add_row(
            f"rank {one['rank']}",
            f"{one['patches']:,}",
            f"{one['attention_bytes_sent'] / (job.steps + 1) / _MB:.2f}",
        )
    out.print(ranks)
    out.print(
        f"Order {found['settings']['order']}. Noise {found['decibels_noisy']:.1f} dB, after "
        f"{job.steps} steps {found['decibels_denoised']:.1f} dB. Losses of both runs differ by at "
        f"most {found['largest_difference']:.1e} (allowed: {TOLERANCE:.0e}).",
        soft_wrap=True,
    )
    names = ", ".join(str(options.output / f"photograph.{end}") for end in ("png", "json"))
    out.print(f"Written: {names}", soft_wrap=True)


def _failed(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

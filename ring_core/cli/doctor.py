"""``ring-attention doctor``: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from ring_core.cli.findings import Finding
from ring_core.cli.output import console, print_json

SUMMARY = "check this machine: torch, GPUs, plugins, kernels, and a small run on two processes"

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; 1 if one is a problem."""
    from ring_core.cli.checks import check_all

    findings = []
    for finding in check_all():
        findings.append(finding)
        if not arguments.json:
            _show(finding)
    healthy = all(finding.status != "problem" for finding in findings)
    if arguments.json:
        print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        console().print(_verdict(findings))
    return 0 if healthy else 1


def _show(finding: Finding) -> None:
    line = Text.assemble(
        (f"{finding.status:8}", _COLOURS[finding.status]),
        (f"{finding.topic}: ", "bold"),
        finding.text,
    )
    out = console()
    out.print(line, soft_wrap=True)
    if finding.remedy:
        out.print(Text(f"        -> {finding.remedy}"), soft_wrap=True)


def _verdict(findings: Sequence[Finding]) -> str:
    counts = {status: sum(f.status == status for f in findings) for status in _COLOURS}
    if not counts["problem"]:
        return f"No problems; {counts['warning']} warning(s)."
    return f"{counts['problem']} problem(s), {counts['warning']} warning(s)."

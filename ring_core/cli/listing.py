"""``ring-attention list``: the plugins that are installed, and the variants that are not."""

from __future__ import annotations

import argparse
from typing import Any

from rich.text import Text

from ring_core.catalogue import PIP_NAMES
from ring_core.cli.output import console, print_json, table
from ring_core.discovery import VARIANTS, PluginRow
from ring_core.registry import registry

SUMMARY = "list the installed variants and plugins, and the known variants that are not installed"

_COLOURS = {"loaded": "green", "disabled": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``list``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the listing; a broken plugin is a row like any other. Always 0."""
    found = _everything()
    if arguments.json:
        print_json(found)
    else:
        _show(found)
    return 0


def _everything() -> dict[str, list[dict[str, Any]]]:
    rows = registry.plugins()
    variants = {row.name for row in rows if row.group == VARIANTS}
    return {
        "plugins": [_described(row) for row in rows],
        "not_installed": [
            {"name": name, "install": f"pip install {pip_name}"}
            for name, pip_name in PIP_NAMES.items()
            if name not in variants
        ],
    }


def _described(row: PluginRow) -> dict[str, Any]:
    brings_variant = row.group == VARIANTS
    usable = brings_variant and row.status == "loaded"
    return {
        "name": row.name,
        "brings": "variant" if brings_variant else "hooks",
        "distribution": row.distribution,
        "version": row.version,
        "entry_point": row.entry_point,
        "status": row.status,
        "summary": registry.variant(row.name).summary if usable else "",
        "error": row.error,
    }


def _show(found: dict[str, list[dict[str, Any]]]) -> None:
    out = console()
    rows = table("Name", "Distribution", "Version", "Status", "Summary")
    for plugin in found["plugins"]:
        status = Text(plugin["status"], style=_COLOURS.get(plugin["status"], "red"))
        summary = plugin["summary"] or ("" if plugin["brings"] == "variant" else "(hooks only)")
        rows.add_row(plugin["name"], plugin["distribution"], plugin["version"], status, summary)
    if found["plugins"]:
        out.print(rows)
    else:
        out.print("No plugins are installed.")
    # Errors can be long: below the table, each on a line of its own.
    for plugin in found["plugins"]:
        if plugin["error"]:
            out.print(f"\n{plugin['name']}: {plugin['error']}", soft_wrap=True)
    if found["not_installed"]:
        out.print("\nNot installed:")
        for variant in found["not_installed"]:
            out.print(f"  {variant['name']}: {variant['install']}")

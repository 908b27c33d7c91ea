"""``ring-attention show``: one variant, preset or plugin: where it comes from and what it takes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.padding import Padding

from ring_core.cli.fields import field_rows, kinds
from ring_core.cli.output import console, print_json, table
from ring_core.discovery import VARIANTS, PluginRow
from ring_core.errors import UnknownVariantError
from ring_core.hookspecs import Preset
from ring_core.registry import registry

SUMMARY = "show a variant with its config fields, a preset, or a plugin that brings only hooks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``show``."""
    parser.add_argument("name", metavar="NAME", help="of a variant, a preset or a plugin")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what is known of the name."""
    found = _described(arguments.name)
    if arguments.json:
        print_json(found)
    else:
        _show(found)
    return 0


def _described(name: str) -> dict[str, Any]:
    """
    Raises:
        UnknownVariantError: there is nothing of that name. PluginLoadError, HookApiError,
            DuplicateNameError: there is, and it cannot be used.
    """
    rows = {row.name: row for row in registry.plugins()}
    presets = registry.presets()
    if name in presets:
        return {"kind": "preset", "name": name, **_of_preset(presets[name])}
    if name in rows and rows[name].group != VARIANTS:
        return {"kind": "plugin", "name": name, **_of_plugin(rows[name])}
    try:
        variant = registry.variant(name)
    except UnknownVariantError as error:
        # On a line of their own: what comes before may end in a command.
        raise UnknownVariantError(
            f"{error}\nPresets: {', '.join(sorted(presets)) or 'none'}."
        ) from error
    origin = _of_plugin(rows[name]) if name in rows else {}
    values = variant.config.model_json_schema()["properties"]
    return {
        "kind": "variant",
        "name": name,
        "summary": variant.summary,
        **origin,
        "attention": variant.attention,
        "presets": sorted(one for one, preset in presets.items() if preset.variant == name),
        "fields": [
            {**asdict(row), "kinds": kinds(values.get(row.name))}
            for row in field_rows(variant.config)
        ],
    }


def _of_preset(preset: Preset) -> dict[str, Any]:
    return {
        "summary": preset.summary,
        "variant": preset.variant,
        "set": {name: _plain(value) for name, value in preset.fields.items()},
    }


def _of_plugin(row: PluginRow) -> dict[str, Any]:
    return {
        "distribution": row.distribution,
        "version": row.version,
        "entry_point": row.entry_point,
        "status": row.status,
        "error": row.error,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(found: dict[str, Any]) -> None:
    out = console()
    out.print(f"{found['kind']} {found['name']}", soft_wrap=True)
    for name, value in found.items():
        if name not in ("kind", "name", "fields", "set") and value:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            out.print(f"  {name.replace('_', ' ')}: {text}", soft_wrap=True)
    if "set" in found:
        rows = table("Field", "Value")
        for name, value in found["set"].items():
            rows.add_row(name, str(value))
        out.print(rows)
    if "fields" in found:
        for field in found["fields"]:
            out.print(f"\n{field['name']}: {field['type']} = {field['default']}", soft_wrap=True)
            out.print(Padding(field["description"], (0, 0, 0, 4)))
            for one in field["kinds"]:
                named = f"{one['kind']}({', '.join(one['takes'])}): {one['description']}"
                out.print(Padding(named, (0, 0, 0, 6)))

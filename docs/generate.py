"""Write the pages that are made from the code: hooks, configs, and the command.

``python docs/generate.py`` (``make docs``). A test fails where a page is not what this writes.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ring_attention_blocksparse.config import kinds

from ring_core import hookspecs
from ring_core.cli import parser
from ring_core.cli.fields import field_rows
from ring_core.config import RingAttentionConfig
from ring_core.registry import registry

HERE = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py; do not edit. -->"
VARIANTS = ("standard", "blocksparse", "hilbert", "distributed")


def hooks() -> Iterator[str]:
    """docs/hooks.md."""
    yield from (NOTE, "", "# Hooks", "", _text(hookspecs), "")
    yield from ("## What they pass on", "")
    for passed in (hookspecs.Variant, hookspecs.Preset, hookspecs.Observer):
        yield from _class(passed)
    yield from ("## Hooks of the core", "")
    yield from _specifications(hookspecs)
    for brought in registry.ask("ring_hookspecs"):
        yield from (f"## Hooks of `{brought.__name__}`", "", _text(brought), "")
        yield from _specifications(brought)


def _text(of: Any) -> str:
    """A docstring as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", inspect.getdoc(of) or "")
    return text.replace("``", "`")


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def _specifications(module: ModuleType) -> Iterator[str]:
    for name, one in vars(module).items():
        if options := getattr(one, "ring_core_spec", None):
            yield from (f"### `{name}{_signature(one)}`", "", _text(one), "")
            if options["firstresult"]:
                yield from ("The first answer that is not None counts.", "")


def _class(one: type) -> Iterator[str]:
    yield from (f"### `{one.__name__}`", "", _text(one), "")
    if is_dataclass(one):
        names = [field.name for field in fields(one)]
        yield from (f"Fields: {', '.join(f'`{name}`' for name in names)}.", "")
        return
    for name, method in vars(one).items():
        if inspect.isfunction(method):
            yield f"- `{name}{_signature(method)}`: {' '.join(_text(method).split())}"
    yield ""


def config() -> Iterator[str]:
    """docs/config.md."""
    yield from (NOTE, "", "# Config", "")
    yield _text(RingAttentionConfig)
    yield from ("", "## Common fields", "", *_fields(RingAttentionConfig, own=False))
    for name in VARIANTS:
        described = registry.variant(name)
        about = described.summary
        yield from ("", f"## `{name}`", "", f"{about[:1].upper()}{about[1:]}.", "")
        rows = list(_fields(described.config, own=True))
        yield from (rows if len(rows) > 2 else ["The common fields, and none of its own."])
    yield from ("", "## Patterns", "", "Of `blocksparse` and `hilbert`; each has `heads` too.")
    for name, kind in kinds().items():
        yield from ("", f"### `{name}`", "")
        yield from (_text(kind), "")
        yield from _table([row for row in field_rows(kind) if row.name not in ("kind", "heads")])
    yield from ("", "## Presets", "", "| preset | variant | fields |", "|---|---|---|")
    for name, preset in sorted(registry.presets().items()):
        given = ", ".join(f"`{key}={value!r}`" for key, value in preset.fields.items())
        yield f"| `{name}` | `{preset.variant}` | {given} |"


def _fields(schema: type[Any], own: bool) -> Iterator[str]:
    rows = [row for row in field_rows(schema) if row.common is not own and row.name != "variant"]
    return _table(rows)


def _table(rows: list[Any]) -> Iterator[str]:
    yield from ("| field | type | default | |", "|---|---|---|---|")
    for row in rows:
        cells = f"`{row.name}`", f"`{row.type}`", f"`{row.default}`", row.description
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def cli() -> Iterator[str]:
    """docs/cli.md."""
    whole = parser()
    yield from (NOTE, "", "# `ring-attention`", "", whole.description or "", "")
    yield (
        "`--verbose` shows tracebacks and what the library logs. Exit status: 0 when done, 1 after "
        "an error or for what a command found wrong, 2 for a command line that cannot be "
        "understood, 130 after Ctrl-C."
    )
    subparsers = next(a for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in subparsers.choices.items():
        about = command.description or ""
        yield from ("", f"## `ring-attention {name}`", "", f"{about[:1].upper()}{about[1:]}.", "")
        for action in command._actions:
            if action.dest in ("help", "verbose"):
                continue
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
            shown = flags or f"`{action.metavar or action.dest}`"
            if flags and action.nargs != 0:
                shown += f" `{action.metavar or action.dest.upper()}`"
            text = " ".join((action.help or "").split()) % vars(action)
            choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
            yield f"- {shown}: {text}.{choices}"


PAGES = {"hooks.md": hooks, "config.md": config, "cli.md": cli}


def page(name: str) -> str:
    """The text of a page."""
    return "\n".join(PAGES[name]()).rstrip() + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (HERE / name).write_text(page(name))

"""Options that subcommands share, and their types."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ring_core.errors import ConfigError


def at_least(least: int) -> Callable[[str], int]:
    """A type of option: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too few: at least {least}")
        return value

    return number


def positive(text: str) -> float:
    """A type of option: numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add option ``--set``, for fields of a config."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field, as causal=true or 'patterns=[{kind: local, left: 512, right: 0}]'",
    )


def set_fields(given: Sequence[str]) -> dict[str, Any]:
    """The fields given with ``--set``, each value read as YAML.

    Raises:
        ConfigError: one is not FIELD=VALUE.
    """
    fields = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected FIELD=VALUE, as causal=true")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: {error}") from error
    return fields


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a file of YAML or JSON.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--config {path}: expected field names and values")
    return fields

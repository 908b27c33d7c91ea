"""``ring-attention schema``: the JSON Schema of a variant's config."""

from __future__ import annotations

import argparse

from ring_core.cli.output import print_json
from ring_core.registry import registry

SUMMARY = "print the JSON Schema of a variant's config, for editors and other programs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``schema``."""
    parser.add_argument("name", metavar="NAME", help="of a variant")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print_json(registry.variant(arguments.name).config.model_json_schema())
    return 0

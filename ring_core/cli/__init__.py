"""The command ``ring-attention``. Importing this, ``--help`` and ``list`` import no torch."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from importlib_metadata import version

from ring_core.cli import bench, demo, doctor, launch, listing, plan, schema, show
from ring_core.cli.next_command import next_command
from ring_core.errors import RingError
from ring_core.registry import registry

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_COMMANDS: dict[str, Any] = {
    "list": listing,
    "show": show,
    "schema": schema,
    "plan": plan,
    "doctor": doctor,
    "bench": bench,
    "demo": demo,
    "launch": launch,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's own) and return the exit status.

    0: done. 1: an error of this library, told on stderr, or what the command found. 130: Ctrl-C.

    Raises:
        SystemExit: 2 for a command line that cannot be understood, 0 after ``--help``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # One of a plugin's, or all for --help?
    commands = _COMMANDS if _COMMANDS.keys() & set(given) else _all_commands()
    arguments = _parser(commands).parse_args(given)
    if arguments.verbose:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("ring_core").setLevel(logging.INFO)
    try:
        status: int = commands[arguments.command].run(arguments)
    except RingError as error:
        if arguments.verbose:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
            if (command := next_command(error, arguments)) is not None:
                print(f"Try: {command}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def parser() -> argparse.ArgumentParser:
    """Of the whole command line, plugins' commands included."""
    return _parser(_all_commands())


def _all_commands() -> dict[str, Any]:
    """With those of plugins. One that cannot be imported is left out, and said so."""
    found = dict(_COMMANDS)
    for brought in registry.ask("ring_commands"):
        for name, module in (brought or {}).items():
            if name in found:
                continue
            try:
                found[name] = import_module(module)
            except Exception as error:
                print(f"command {name!r} of {module} failed to import: {error}", file=sys.stderr)
    return found


def _parser(named: Mapping[str, Any]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--verbose", action="store_true", help="show tracebacks and what the library logs"
    )
    parser = argparse.ArgumentParser(
        prog="ring-attention",
        description="Exact attention over sequences sharded across processes.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('ring-attention-core')}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in named.items():
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=summary, parents=[common])
        module.add_arguments(command)
    return parser

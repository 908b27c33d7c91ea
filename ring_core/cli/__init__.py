"""The command ``ring-attention``. Importing this, ``--help`` and ``list`` import no torch."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from importlib_metadata import version

from ring_core.cli import demo, doctor, listing, plan
from ring_core.errors import RingError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_COMMANDS = {"list": listing, "plan": plan, "doctor": doctor, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's own) and return the exit status.

    0: done. 1: an error of this library, told on stderr, or what the command found. 130: Ctrl-C.

    Raises:
        SystemExit: 2 for a command line that cannot be understood, 0 after ``--help``.
    """
    arguments = _parser().parse_args(argv)
    if arguments.verbose:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("ring_core").setLevel(logging.INFO)
    try:
        status: int = _COMMANDS[arguments.command].run(arguments)
    except RingError as error:
        if arguments.verbose:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
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
    for name, module in _COMMANDS.items():
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=summary, parents=[common])
        module.add_arguments(command)
    return parser

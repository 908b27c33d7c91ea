"""``ring-attention launch``: a script in many processes, by torch's elastic launcher."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from ring_core.cli.arguments import at_least
from ring_core.errors import ConfigError

SUMMARY = "run a script in several processes of one process group, by torch's elastic launcher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``launch``."""
    parser.allow_abbrev = False  # the script's own options follow
    parser.add_argument(
        "-n",
        "--processes",
        type=at_least(1),
        help="on this machine (default: one for each GPU, or 2 where there is none)",
    )
    parser.add_argument(
        "--max-restarts",
        type=at_least(0),
        default=0,
        help="how often all are started again when one of them fails (default: 0)",
    )
    parser.add_argument(
        "--nodes",
        type=at_least(1),
        default=1,
        help="machines, on each of which the same command is given (default: 1)",
    )
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", help="of the first machine, where there are several"
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT names a module")
    parser.add_argument("script", metavar="SCRIPT", help="what to run")
    parser.add_argument(
        "arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's own arguments"
    )


def run(arguments: argparse.Namespace) -> int:
    """Become the launcher; prints the command first, which may be given without this one."""
    settings, command = _command(arguments)
    before = [f"{name}={value}" for name, value in settings.items()]
    print(shlex.join([*before, *command]), file=sys.stderr, flush=True)
    os.execvpe(command[0], command, {**os.environ, **settings})


def _command(arguments: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Variables of the environment, and the launcher's command."""
    if (arguments.nodes > 1) != (arguments.endpoint is not None):
        raise ConfigError("--nodes and --endpoint go together: where do the machines meet?")
    processes = arguments.processes or _usual()
    # Of its own for each attempt: with the launcher's, ranks that are started again connect to
    # those before them (https://github.com/pytorch/pytorch/issues/135712).
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    meeting = ["--standalone"]
    if arguments.nodes > 1:
        meeting = [f"--nnodes={arguments.nodes}", "--rdzv-backend=c10d"]
        meeting.append(f"--rdzv-endpoint={arguments.endpoint}")
    command = [sys.executable, "-m", "torch.distributed.run", *meeting]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={arguments.max_restarts}"]
    # What follows is not looked at: of an option that two of its own begin with it would complain.
    script = ["--module", "--"] if arguments.module else ["--"]
    return settings, [*command, *script, arguments.script, *arguments.arguments]


def _usual() -> int:
    import torch

    return torch.cuda.device_count() or 2

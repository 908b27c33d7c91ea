"""Run a function in processes of one process group on this machine, with torch's own launcher."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ring_core.errors import RankFailedError

Task = Callable[..., Any]

_SECONDS_TO_STOP = 5
_TASK = "task.pickle"
_LAUNCHER_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing.spawn")


@dataclass(frozen=True)
class Worker:
    """What a task is told of its process: ``task(worker, *args)``."""

    rank: int
    world: int
    device: torch.device


def launch(task: Task, *args: Any, processes: int, device_type: str = "cpu") -> list[Any]:
    """Run ``task(worker, *args)`` in ``processes`` new processes; what each returned, by rank.

    They share this machine's cores evenly and are the default process group: gloo on the CPU, NCCL
    with ``device_type`` 'cuda'. One process alone has no process group.

    Args:
        task: a function that the processes can import by name.

    Raises:
        RankFailedError: a rank raised or died; says which, and the error's own text.
        KeyboardInterrupt: Ctrl-C; the processes have been stopped.
    """
    threads = max(1, _cores() // processes)
    with tempfile.TemporaryDirectory(prefix="ring-attention-") as folder:
        # Through a file: what does not fit into a pipe would make each process wait for the last
        # one's imports.
        Path(folder, _TASK).write_bytes(pickle.dumps((task, args)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.05,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **_where_known(
                signals_to_handle="SIGTERM",  # Ctrl-C stays Python's
                shutdown_timeout=_SECONDS_TO_STOP,
            ),
        )
        try:
            with _silent_launcher(), _own_signal_handlers(), _ctrl_c_here_alone():
                answers = elastic_launch(config, _work)(folder, device_type, threads)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _first_error(Path(folder), rank, failure, processes) from _cause(Path(folder))
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from error
        except (RendezvousError, RuntimeError, OSError) as error:
            raise RankFailedError(f"could not start {processes} processes: {error}") from error
    return [answers[rank] for rank in range(processes)]


def _where_known(**options: Any) -> dict[str, Any]:
    """Those of ``options`` that this torch's launcher has; the others came later."""
    known = {field.name for field in fields(LaunchConfig)}
    return {name: value for name, value in options.items() if name in known}


def _work(folder: str, device_type: str, threads: int) -> Any:
    """What each process runs."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        task, args = pickle.loads(Path(folder, _TASK).read_bytes())
        torch.set_num_threads(threads)
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
        if device_type == "cuda":
            torch.cuda.set_device(device)
        if world == 1:
            return task(Worker(rank, world, device), *args)
        _use_loopback()
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        answer = task(Worker(rank, world, device), *args)
        dist.barrier()  # nobody hangs up on a peer that is still sending
        dist.destroy_process_group()
        return answer
    except Exception as error:
        # Written here and not left to the launcher: it names whichever rank it looks at first, and
        # that is often one that only lost the connection to the rank that failed.
        record = {
            "rank": rank,
            "when": time.time(),
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        unfinished = Path(folder, f"unfinished-{rank}.json")
        unfinished.write_text(json.dumps(record))  # this process may be ended while it writes
        unfinished.rename(Path(folder, f"error-{rank}.json"))
        sys.stderr.flush()
        os._exit(1)  # a group that has lost a peer aborts, loudly, when it is taken down in order


class _RankTracebackError(Exception):
    """A rank's traceback as text, so that it shows where tracebacks are shown."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _earliest(folder: Path) -> dict[str, Any] | None:
    records = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    return min(records, key=lambda record: record["when"], default=None)


def _cause(folder: Path) -> _RankTracebackError | None:
    record = _earliest(folder)
    return None if record is None else _RankTracebackError(record["traceback"])


def _first_error(
    folder: Path, rank: int, failure: ProcessFailure, processes: int
) -> RankFailedError:
    """The error of the rank that failed first; of the one the launcher names if none told."""
    record = _earliest(folder)
    if record is not None:
        return RankFailedError(
            f"rank {record['rank']} of {processes} failed with {record['kind']}: "
            f"{record['message']}"
        )
    if failure.exitcode < 0:
        return RankFailedError(
            f"rank {rank} of {processes} was ended by signal {-failure.exitcode} "
            f"({failure.signal_name()}); the system does this to a process when memory runs out"
        )
    return RankFailedError(
        f"rank {rank} of {processes} ended with exit code {failure.exitcode} before it could say "
        "why; what it printed stands above"
    )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _use_loopback() -> None:
    """Let gloo talk over the loopback interface: all ranks are here, host names may not resolve."""
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextmanager
def _silent_launcher() -> Iterator[None]:
    """Keep the launcher's log to itself: what went wrong is said once, by the error raised here."""
    handler = logging.NullHandler()
    loggers = [logging.getLogger(name) for name in _LAUNCHER_LOGGERS]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back the handler that the launcher replaces for good."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _ctrl_c_here_alone() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach; the launcher then ends them.

    They inherit the main thread's blocked SIGINT. Here another thread takes it, and Python raises
    KeyboardInterrupt in the main thread as ever. Processes that the launcher was just starting, and
    does not know of yet, are ended here.
    """
    resource_tracker.ensure_running()  # later it would unblock SIGINT for the whole thread
    others = multiprocessing.active_children()
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()

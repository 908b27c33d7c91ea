"""Real processes in a real process group, kept alive and reused by many tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

Task = Callable[..., Any]


class RankError(AssertionError):
    """A task raised on one or more ranks; the message holds their tracebacks."""


@dataclass
class Worker:
    """What a task is told of its process: ``task(worker, *args)``."""

    rank: int
    world: int
    group: Any
    device: torch.device


class RankPool:
    """``size`` processes that run tasks in groups of any ranks.

    Args:
        size: processes.
        device_type: 'cpu' (gloo) or 'cuda': NCCL for GPU tensors and gloo for others, one process
            per GPU. With more processes than GPUs they share them, and there is no NCCL: only a
            communicator that needs none can serve, and only results mean anything, not times.
    """

    def __init__(self, size: int = 8, device_type: str = "cpu") -> None:
        self.size, self.device_type = size, device_type
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._groups: set[tuple[int, ...]] = set()

    def run(
        self,
        task: Task,
        *args: Any,
        world: int | None = None,
        ranks: Sequence[int] | None = None,
        timeout: float = 120.0,
        errors: bool = False,
        fresh: bool = False,
    ) -> list[Any]:
        """Run ``task(worker, *args)`` on each rank of a group and return what each returned.

        Args:
            task: a function that the processes can import by name.
            world: the first ``world`` processes; ``ranks``: these processes. Default: all.
            timeout: seconds for the slowest rank; then the processes are killed.
            errors: return the exception of a rank that raised in its place.
            fresh: in a group of its own, which the task may break.

        Raises:
            RankError: a rank raised (and ``errors`` is false).
            TimeoutError: a rank was not done in time.
        """
        members = tuple(ranks if ranks is not None else range(world or self.size))
        self._start()
        name = members if not fresh else (*members, -1 - time.monotonic_ns())
        if name not in self._groups:
            self._groups.add(name)
            for index in range(self.size):
                self._send(index, ("group", name, members))
            self._collect(range(self.size), timeout)
        for index in members:
            self._send(index, ("task", name, list(sys.path), task, args))
        answers = self._collect(members, timeout)
        if fresh:
            self._groups.discard(name)
            for index in members:
                self._send(index, ("leave", name))
            self._collect(members, timeout)
        failures = [
            f"--- rank {rank} ---\n{trace}"
            for rank, (_, _, trace) in zip(members, answers, strict=True)
            if trace
        ]
        if failures and not errors:
            raise RankError("\n".join(failures))
        return [error if error is not None else value for value, error, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it may have ended already
                connection.send_bytes(pickle.dumps(("stop",)))
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._connections, self._groups = [], [], set()

    def _start(self) -> None:
        if self._processes:
            return
        context: Any = multiprocessing.get_context("spawn")
        if self.device_type == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
            # One process imports torch and is forked, in place of eight that import it.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["ring_core.testing.preloaded"])
        port = _free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, rank, self.size, port, self.device_type), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(range(self.size), 120)

    def _send(self, index: int, message: tuple[Any, ...]) -> None:
        self._connections[index].send_bytes(pickle.dumps(message))

    def _collect(self, members: Sequence[int], timeout: float) -> list[tuple[Any, Any, str]]:
        deadline = time.monotonic() + timeout
        answers = []
        for index in members:
            connection = self._connections[index]
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"rank {index} was not done after {timeout:g} s")
                answers.append(pickle.loads(connection.recv_bytes()))
            except (EOFError, OSError, TimeoutError) as error:
                for process in self._processes:
                    process.kill()
                self.close()
                if isinstance(error, TimeoutError):
                    raise
                raise RankError(f"the process of rank {index} ended") from error
        return answers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(connection: Connection, rank: int, size: int, port: int, device_type: str) -> None:
    torch.set_num_threads(1)
    device, backend = torch.device("cpu"), "gloo"
    if device_type == "cuda":
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", rank % gpus)
        torch.cuda.set_device(device)
        if size > gpus:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        else:
            backend = "cpu:gloo,cuda:nccl"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    groups: dict[tuple[int, ...], Any] = {}
    connection.send_bytes(pickle.dumps((None, None, "")))
    while True:
        try:
            kind, *content = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if kind == "stop":
            return
        try:
            if kind == "group":
                name, members = content
                groups[name] = dist.new_group(list(members))
                value = None
            elif kind == "leave":
                (name,) = content
                # Its threads would look for messages a hundred times a second.
                value = dist.destroy_process_group(groups.pop(name))
            else:
                name, path, task, args = content
                sys.path[:] = path
                group = groups[name]
                worker = Worker(dist.get_rank(group), dist.get_world_size(group), group, device)
                value = task(worker, *args)
            answer = pickle.dumps((value, None, ""))
        except Exception as error:
            answer = pickle.dumps((None, _portable(error), traceback.format_exc()))
        connection.send_bytes(answer)


def _portable(error: Exception) -> Exception:
    """The exception itself if the other side can unpickle it, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

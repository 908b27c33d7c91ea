"""The conformance kit's fixtures, those of several modules, and hypothesis runs that repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from ring_core.launching import Worker
from ring_core.testing import RankPool
from ring_core.testing.fixtures import *  # noqa: F403
from scratch import Wheels

settings.register_profile("ring", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ring")

# Threads that wait for each other in a loop take the cores from the ranks and from each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # in processes that tests start

# torch asks the name server about each address that it connects to, 127.0.0.1 too. One that loses a
# question must not hold up for 5 s what has 2 s to end in.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a test module's function in a process of its own, with variables of its environment.

    Several that are started before the first is waited for share the cores.
    """
    started = []

    def start(function: Callable[[], None], **environment: str) -> subprocess.Popen[str]:
        module = function.__module__
        path = str(Path(__file__).parent)
        process = subprocess.Popen(
            [sys.executable, "-c", f"import {module}; {module}.{function.__name__}()"],
            env={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Wheels of this checkout, each built once."""
    return Wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def launch_here() -> Callable[..., list[Any]]:
    """In place of the launcher, whose processes each take seconds to import torch: forked ranks."""

    def launch(task: Callable[..., Any], *args: Any, processes: int, device_type: str) -> list[Any]:
        if processes == 1:
            return [task(Worker(0, 1, torch.device(device_type)), *args)]
        pool = RankPool(processes, device_type)
        try:
            return pool.run(task, *args)
        finally:
            pool.close()

    return launch

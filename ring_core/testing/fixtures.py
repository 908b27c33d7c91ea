"""pytest fixtures of the kit; a plugin's conftest imports them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ring_core.testing.conformance import pytest_generate_tests
from ring_core.testing.pool import RankPool

_POOLS = {"cpu_pool", "gpu_pool", "rank_pool"}


@pytest.fixture(scope="session")
def cpu_pool() -> Iterator[RankPool]:
    """Eight gloo processes of one thread each, for the whole test run."""
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_pool() -> Iterator[RankPool]:
    """One NCCL process per GPU; on a machine with one GPU, eight processes that share it."""
    gpus = torch.cuda.device_count()
    pool = RankPool(gpus if gpus > 1 else 8, "cuda")
    yield pool
    pool.close()


@pytest.fixture(params=["cpu", "cuda"])
def rank_pool(request: pytest.FixtureRequest) -> RankPool:
    """The pool to run on: processes on the CPU, and on GPUs where tests marked ``gpu`` run."""
    name = "cpu_pool" if request.param == "cpu" else "gpu_pool"
    pool: RankPool = request.getfixturevalue(name)
    return pool


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that the kit sets: a conftest imports the hooks, too."""
    config.addinivalue_line("markers", "gpu: needs CUDA devices; left out where there are none")
    config.addinivalue_line("markers", "xdist_group(name): tests for one worker of pytest-xdist")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests on GPUs ``gpu``, and leave out those that are where there is no GPU.

    Tests that ask for a pool are one group: with ``pytest -n 2 --dist loadgroup`` one worker runs
    them all, in one pool, and the other one what needs no ranks.
    """
    for item in items:  # not where the fixture stands: the marker may not be registered by then
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("rank_pool") == "cuda":
            item.add_marker("gpu")
        if _POOLS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ranks"))
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


__all__ = [
    "cpu_pool",
    "gpu_pool",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_generate_tests",
    "rank_pool",
]

"""What a third party does: wheels in an environment of its own, its plugin's tests there, the page.

The environment holds wheels of the core, of ``standard`` and of the plugins in ``examples``, and of
this one's packages those that the core and its conformance kit require.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import scratch
from scratch import ROOT, Environment, Job, Wheels, described, required

TEMPLATE = ROOT / "examples" / "plugin_template"
TRACING = ROOT / "examples" / "tracing_plugin"
PAGE = ROOT / "docs" / "write-a-plugin.md"

MODULES = [
    "ring_core",
    "ring_attention_standard",
    "ring_attention_prefix_lm",
    "ring_attention_tracing",
]

ENDS = [0, 3, 17, 37]
PREFIX = 5

SHORT = "not test_conformance or auto-2 and (odd or padded or packed) or padding_is_never_read"
"""Of the plugins' own tests: of the conformance kit some at 2 and 3 ranks, of others all."""

NAMES = """
import json, sys
from importlib.util import find_spec
from ring_core import registry
names = registry.names()
where = {name: find_spec(name).origin for name in sys.argv[1:]}
print(json.dumps([names, "torch" in sys.modules, where]))
"""

ONE_RANK = f"""
import sys
from pathlib import Path
from ring_core import registry
rows = {{row.name: [row.status, row.error] for row in registry.plugins()}}
loaded = "torch" in sys.modules

import torch
import torch.distributed as dist
from ring_core.rounds import elements_fetched, elements_sent
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
attention = registry.create("prefix_lm", prefix_length={PREFIX})
plan = attention.plan(cu_seqlens={ENDS})
q, k, v, dout = torch.load(folder / "tensors.pt")
shards = [plan.shard(x).requires_grad_() for x in (q, k, v)]
out = attention(*shards, plan=plan)
gradients = torch.autograd.grad(out, shards, plan.shard(dout))
whole = [plan.unshard(x.detach()) for x in (out, *gradients)]
heads, size = k.shape[2], (k.shape[3] + v.shape[3]) * k.shape[0] * k.itemsize
elements = [count(plan.plan, rank, heads) for count in (elements_fetched, elements_sent)]
compiler = "torch._dynamo" in sys.modules
found = [rows, [loaded, compiler], whole, [size * n for n in elements]]
torch.save(found, folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def environment(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With wheels that were built from this checkout."""
    built = wheels.of(ROOT, ROOT / "plugins" / "standard", TEMPLATE, TRACING)
    needs = required(described(built[0]), "testing")
    made = scratch.environment(tmp_path_factory.mktemp("third party"), needs)
    made.install("--no-index", *map(str, built))
    return made


@dataclass
class Ranks:
    """Two ranks that compute one small case, traced, with a broken plugin beside the others."""

    folder: Path
    jobs: list[Job]

    def found(self, rank: int) -> list[Any]:
        """What a rank has found out, once all have ended."""
        for job in self.jobs:
            job.said()
        found: list[Any] = torch.load(self.folder / f"{rank}.pt")
        return found

    def events(self, rank: int) -> list[dict[str, Any]]:
        """The transfers in a rank's trace."""
        text = (self.folder / f"trace.rank{rank}.json").read_text()
        return [event for event in json.loads(text) if event["ph"] == "X"]


@dataclass
class Jobs:
    """What goes on at once in the environment, to be waited for by one test each."""

    ranks: Ranks
    own_tests: Job


@pytest.fixture(scope="module")
def jobs(environment: Environment) -> Iterator[Jobs]:
    """Each kept from running on, should a test fail before it is waited for."""
    started = Jobs(two_ranks(environment), own_tests(environment))
    yield started
    for job in (*started.ranks.jobs, started.own_tests):
        job.process.kill()
        job.process.communicate()


def own_tests(environment: Environment) -> Job:
    """The plugins' own tests on the installed wheels, where their sources are not."""
    folders = [environment.folder / plugin.name for plugin in (TEMPLATE, TRACING)]
    for plugin, folder in zip((TEMPLATE, TRACING), folders, strict=True):
        shutil.copytree(plugin, folder, ignore=shutil.ignore_patterns("src", "__pycache__", ".*"))
    # In one process: most of the time goes into starting torch.
    config = str(folders[0] / "pyproject.toml")
    options = ["-q", "-p", "no:cacheprovider", "-c", config, "-k", SHORT]
    return environment.start("-m", "pytest", *options, *map(str, folders))


def two_ranks(environment: Environment) -> Ranks:
    folder = environment.folder / "ranks"
    site = folder / "site"
    info = site / "broken_dist-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "broken.py").write_text("import no_such_module\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ring_core.variants]\nbroken = broken\n")
    torch.save(tensors(), folder / "tensors.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "PYTHONPATH": str(site),
        "RING_TRACE": str(folder / "trace"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
    }
    jobs = [
        environment.start("-c", ONE_RANK, str(folder), RANK=str(rank), **variables)
        for rank in range(2)
    ]
    return Ranks(folder, jobs)


def tensors() -> list[torch.Tensor]:
    """q, k, v and a gradient of out, of 4 query heads and 2 KV heads: float64."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((4, 8), (2, 8), (2, 6), (4, 6))
    shapes = ((1, ENDS[-1], heads, size) for heads, size in sizes)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def by_definition() -> list[torch.Tensor]:
    """Out, dq, dk, dv of prefix attention in packed documents."""
    q, k, v, dout = tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seen = torch.zeros(ENDS[-1], ENDS[-1], dtype=torch.bool)
    for start, stop in pairwise(ENDS):
        for i in range(stop - start):
            for j in range(stop - start):
                seen[start + i, start + j] = j <= i or j < PREFIX
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_the_wheels_are_found_and_no_torch_is_imported(environment: Environment) -> None:
    names, torch_there, where = json.loads(environment.start("-c", NAMES, *MODULES).said())
    assert names == ["prefix_lm", "standard"]
    assert not torch_there
    assert where == {name: str(environment.packages / name / "__init__.py") for name in MODULES}
    assert all((environment.packages / name / "py.typed").is_file() for name in MODULES)


def test_a_broken_plugin_stops_no_other_one(jobs: Jobs) -> None:
    for rank in range(2):
        rows, *_ = jobs.ranks.found(rank)
        status, error = rows.pop("broken")
        assert status == "failed"
        assert "no_such_module" in error
        assert rows == {name: ["loaded", ""] for name in ("prefix_lm", "standard", "tracing")}


def test_a_process_loads_what_it_uses(jobs: Jobs) -> None:
    """No torch before there is an attention, and no compiler after one that nobody compiled."""
    for rank in range(2):
        _, loaded, *_ = jobs.ranks.found(rank)
        assert loaded == [False, False]


def test_two_ranks_compute_what_the_definition_says(jobs: Jobs) -> None:
    for rank in range(2):
        _, _, whole, _ = jobs.ranks.found(rank)
        for one, expected in zip(whole, by_definition(), strict=True):
            assert (one - expected).abs().max() < 1e-10


def test_the_trace_holds_the_bytes_of_the_plan(jobs: Jobs) -> None:
    """Keys are fetched by the forward and by the backward; gradients go back once."""
    for rank in range(2):
        *_, (fetched, sent) = jobs.ranks.found(rank)
        assert fetched > 0
        there = jobs.ranks.events(rank)
        moved = [
            (event["name"], event["args"]["bytes_received"], event["args"]["bytes_sent"])
            for event in there
        ]
        assert moved == [*2 * [("keys", fetched, sent)], ("gradients", sent, fetched)]
        for event in there:
            assert event["pid"] == rank
            assert event["args"]["from"] == event["args"]["to"] == [1 - rank]
            assert event["dur"] > 0


def test_the_plugins_own_tests_pass(jobs: Jobs) -> None:
    assert " passed" in jobs.own_tests.said()


# The page


def shown() -> Iterator[tuple[bool, Path, str]]:
    """Its blocks that belong to a file: whether they are the whole of it, the file, the text."""
    blocks = r"^(from )?`([\w./-]+)`\n\n```\w*\n(.*?)^```$"
    for part, name, text in re.findall(blocks, PAGE.read_text(), re.DOTALL | re.MULTILINE):
        yield not part, (ROOT if name.startswith("examples/") else TEMPLATE) / name, text


def test_the_page_shows_the_files_as_they_are() -> None:
    for whole, file, text in shown():
        there = file.read_text()
        assert text == there if whole else f"\n{text}" in f"\n{there}", file


def test_the_page_shows_all_that_the_plugin_is_made_of() -> None:
    there = {file for whole, file, _ in shown() if whole}
    source = set((TEMPLATE / "src" / "ring_attention_prefix_lm").glob("*.py"))
    tests = {TEMPLATE / "tests" / name for name in ("conftest.py", "test_conformance.py")}
    assert there == {TEMPLATE / "pyproject.toml", *source, *tests}


def test_the_pages_links_lead_somewhere() -> None:
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (PAGE.parent / target).exists(), target

"""Wheels of every distribution, environments that hold only some, and what plugins may get wrong.

In real environments: each holds what pip brings there, of wheels and of what those require.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import scratch
from ring_core import HOOK_API
from scratch import OFFLINE, ROOT, Environment, Job, Wheels, described, required

CORE = "core"
NEEDS = {
    "standard": {CORE},
    "blocksparse": {CORE, "standard"},
    "hilbert": {CORE, "standard", "blocksparse"},
    "distributed": {CORE, "standard"},
}
"""Each plugin, by its variant's name, and the distributions that it requires."""

ALL = [CORE, *NEEDS]
PACKAGES = {CORE: ROOT / "ring_core"} | {
    name: ROOT / "plugins" / name / "src" / f"ring_attention_{name}" for name in NEEDS
}
SOURCES = {name: ROOT if name == CORE else ROOT / "plugins" / name for name in ALL}

READ = {CORE: ("prediction/cpu.json", "prediction/h200.json")}
"""Files that are no code and that code reads."""

OPTIONAL = {
    *("pytest", "hypothesis", "matplotlib", "PIL", "prometheus_client"),  # of extras
    *("triton", "flash_attn", "cutlass", "cuda"),  # of kernels for GPUs
}
"""Modules that some module of the wheels imports, and that they do not require."""


def pip_name(name: str) -> str:
    return f"ring-attention-{name}"


def of_project(requirements: list[Requirement]) -> set[str]:
    prefix = pip_name("")
    return {one.name.removeprefix(prefix) for one in requirements if one.name.startswith(prefix)}


@pytest.fixture(scope="module")
def built(wheels: Wheels) -> dict[str, Path]:
    """The wheel of every distribution."""
    return dict(zip(ALL, wheels.of(*(SOURCES[name] for name in ALL)), strict=True))


# What wheels hold


@pytest.mark.parametrize("name", ALL)
def test_a_wheel_holds_its_package_and_nothing_else(name: str, built: dict[str, Path]) -> None:
    package, wheel = PACKAGES[name], ZipFile(built[name])
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    # What code reads at run time is named here, and read where wheels are installed.
    kept = {package / "py.typed", *(package / one for one in READ.get(name, ()))}
    assert {p for p in files if p.suffix != ".py"} == kept
    assert not [p for p in files if p.name.startswith(("test_", "conftest"))]
    info = f"ring_attention_{name}-{described(built[name]).version}.dist-info"
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert set(wheel.namelist()) == {
        *(p.relative_to(package.parent).as_posix() for p in files),
        *(f"{info}/{one}" for one in about),
    }
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_a_wheel_says_what_it_is_and_requires(name: str, built: dict[str, Path]) -> None:
    found, core = described(built[name]), described(built[CORE])
    assert found.version == core.version
    assert found.metadata["Name"] == pip_name(name)
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.metadata["Requires-Python"] == ">=3.11"
    assert found.metadata["Summary"]
    points = {(one.group, one.name, one.value) for one in found.entry_points}
    if name == CORE:
        assert points == {("console_scripts", "ring-attention", "ring_core.cli:main")}
    else:
        assert points == {("ring_core.variants", name, f"ring_attention_{name}.plugin")}
    needs = required(found)
    assert of_project(needs) == NEEDS.get(name, set())
    for one in needs:
        assert not {"==", "==="} & {part.operator for part in one.specifier}, one
        if one.name.startswith("ring-attention-"):
            assert one.specifier.contains(core.version), one
    assert [str(one.specifier) for one in needs if one.name == "torch"] == (
        [">=2.11"] if name == CORE else []
    )


# The core alone, and with each plugin


def holding(name: str, built: dict[str, Path], folder: Path) -> Environment:
    """An environment in which pip was asked for one distribution, and was free to take any."""
    needs = [one for wheel in built.values() for one in required(described(wheel))]
    made = scratch.environment(folder, needs)
    made.install("--no-index", f"--find-links={built[name].parent}", pip_name(name))
    return made


BARE = """
import contextlib, io, json, sys
from ring_core import registry
from ring_core.cli import main
from ring_core.errors import UnknownVariantError
from ring_core.prediction.rates import read, shipped

names, refused, said = registry.names(), {}, {}
for name in sys.argv[1].split():
    try:
        registry.create(name, causal=True)
    except UnknownVariantError as error:
        refused[name] = str(error)
for line in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = main(line.split())
        except SystemExit as ended:
            status = ended.code
    said[line] = [status, out.getvalue()]
rates = {name: read(name).version for name in shipped()}
print(json.dumps([names, refused, said, rates, "torch" in sys.modules]))
"""

COMMANDS = ("list", "show", "schema", "plan", "doctor", "bench", "demo", "launch")
WORKING = ["--version", "--help", "list", "list --json", *(f"{one} --help" for one in COMMANDS)]
WITHOUT_A_VARIANT = ["show standard", "schema standard", "plan --seq-len 64 --world 2"]


@pytest.mark.usefixtures("others")  # What takes longest is begun first.
def test_the_core_alone(built: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is there, torch stays where it is, and everything says what to install."""
    alone = holding(CORE, built, tmp_path)
    script = alone.start(str(alone.python.parent / "ring-attention"), "list")
    lines = [*WORKING, *WITHOUT_A_VARIANT]
    bare = alone.start("-c", BARE, " ".join([*NEEDS, "auto"]), *lines)
    names, refused, said, rates, torch_there = json.loads(bare.said())
    assert names == []
    assert rates == {Path(one).stem: 1 for one in READ[CORE]}
    assert not torch_there
    remedies = {name: f"Install it with: pip install {pip_name(name)}" for name in NEEDS}
    remedies["auto"] = remedies["standard"]
    assert refused.keys() == remedies.keys()
    assert all(refused[name].endswith(remedies[name]) for name in remedies), refused
    for line, (status, text) in said.items():
        assert status == (1 if line in WITHOUT_A_VARIANT else 0), text
    for line in WITHOUT_A_VARIANT:
        assert remedies["standard"] in said[line][1].splitlines()[0]
    listed = json.loads(said["list --json"][1])
    assert listed["plugins"] == []
    assert [one["name"] for one in listed["not_installed"]] == list(NEEDS)
    assert script.said() == said["list"][1]


ALONE = """
import importlib, json, os, pkgutil, sys, tempfile
import ring_core
from ring_core import registry

names = registry.names()
rows = {row.name: [row.distribution, row.status] for row in registry.plugins()}
early = "torch" in sys.modules
import torch
import torch.distributed as dist

attentions = {name: registry.create(name, causal=True) for name in names}
presets = {registry.create_from_preset(name).config.variant for name in registry.presets()}
folder = tempfile.mkdtemp(dir=".")
rank = 0 if os.fork() else 1  # what takes seconds to import is there for both
store = f"file://{os.path.abspath(folder)}/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 13, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
dense = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
).transpose(1, 2)
errors = {}
for name, attention in attentions.items():
    plan = attention.plan(13)
    out = plan.unshard(attention(*(plan.shard(x) for x in (q, k, v)), plan=plan))
    errors[name] = (out - dense).abs().max().item()
if "distributed" in names:
    from ring_attention_distributed import check_alike
    from ring_attention_distributed.checkpoints import Checkpoints

    model = torch.nn.Linear(2, 2)
    check_alike(model)
    checkpoints = Checkpoints(folder, model, torch.optim.SGD(model.parameters()))
    checkpoints.save(1)
    checkpoints.finish()
    assert checkpoints.load() == 1
dist.barrier()
dist.destroy_process_group()
if rank:
    os._exit(0)
missing, origins = set(), {}
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    origins[name] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                missing.add(error.name.partition(".")[0])
found = [names, rows, early, errors, sorted(presets), sorted(missing), origins]
print(json.dumps(found))
"""


@dataclass
class Alone:
    """The core with one plugin and what it requires, and a process that tries it."""

    environment: Environment
    job: Job


@pytest.fixture(scope="module")
def alone(
    built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Alone]]]:
    """Each plugin's, two made at a time."""
    started = []

    def start(name: str) -> Alone:
        made = holding(name, built, tmp_path_factory.mktemp(name))
        # The core's modules in one of them: some take seconds.
        packages = [PACKAGES[one].name for one in ((CORE, name) if name == "standard" else (name,))]
        job = made.start("-c", ALONE, *packages, GLOO_SOCKET_IFNAME="lo")
        started.append(job)
        return Alone(made, job)

    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(start, name) for name in NEEDS}
    for job in started:
        job.process.kill()
        job.process.communicate()


@pytest.mark.parametrize("name", NEEDS)
def test_the_core_with_one_plugin(name: str, alone: dict[str, Future[Alone]]) -> None:
    """All of it works with what it requires, and pip brought that."""
    there = alone[name].result()
    said = there.job.said().splitlines()[-1]
    names, rows, early, errors, presets, missing, origins = json.loads(said)
    variants = sorted({name, *NEEDS[name]} - {CORE})
    assert names == variants
    assert rows == {one: [pip_name(one), "loaded"] for one in variants}
    assert not early
    assert errors.keys() == set(variants)
    assert max(errors.values()) < 1e-10
    assert set(presets) <= set(variants)
    assert set(missing) <= OPTIONAL
    for package, origin in origins.items():
        assert origin == str(there.environment.packages / package / "__init__.py")


# Editable installs

FROM_SOURCE = """
import json
import ring_attention_standard, ring_core
from ring_core import registry
both = (ring_core, ring_attention_standard)
rows = [[row.name, row.status] for row in registry.plugins()]
print(json.dumps([rows, [one.__file__ for one in both], [hasattr(one, "edited") for one in both]]))
"""


def test_editable_installs(built: dict[str, Path], tmp_path: Path) -> None:
    """Of the core and one plugin; an edit of either is there at the next start."""
    names, files = (CORE, "standard"), []
    for name in names:
        source, package = tmp_path / name, PACKAGES[name].relative_to(SOURCES[name])
        shutil.copytree(PACKAGES[name], source / package)
        for beside in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(SOURCES[name] / beside, source)
        files.append(source / package / "__init__.py")
    needs = [*required(described(built[CORE])), Requirement("hatchling")]
    made = scratch.environment(tmp_path, needs)
    made.install(*OFFLINE, *(f"--editable={tmp_path / name}" for name in names))
    where = [str(file) for file in files]
    standard = [["standard", "loaded"]]
    said = json.loads(made.start("-c", FROM_SOURCE).said())
    assert said == [standard, where, [False, False]]
    for file in files:
        file.write_text(f"{file.read_text()}\nedited = True\n")
    said = json.loads(made.start("-c", FROM_SOURCE).said())
    assert said == [standard, where, [True, True]]


# Plugins of other people

PLUGIN = """
from ring_attention_standard import StandardConfig
from ring_core import Variant, hookimpl

RING_HOOK_API = {hook_api}

@hookimpl
def ring_variant():
    return Variant(
        config=StandardConfig,
        attention="ring_attention_standard:StandardRingAttention",
        summary="somebody's",
        retired_names={retired},
    )
"""

PYPROJECT = """
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "1.2"
dependencies = ["ring-attention-standard"]

[project.entry-points."ring_core.variants"]
{variant} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""


def write(
    folder: Path, distribution: str, variant: str, *, hook_api: int = 1, retired: Any = None
) -> Path:
    """The sources of a distribution that brings one variant."""
    module = distribution.replace("-", "_")
    source = folder / distribution
    source.mkdir()
    project = PYPROJECT.format(distribution=distribution, variant=variant, module=module)
    (source / "pyproject.toml").write_text(project)
    text = PLUGIN.format(hook_api=hook_api, retired=retired or {})
    (source / f"{module}.py").write_text(text)
    return source


OTHERS = """
import json, sys, warnings
from ring_core import registry
from ring_core.errors import PluginError

names = registry.names()
rows = {
    row.distribution: [row.name, row.version, row.status, row.error] for row in registry.plugins()
}
refused, made = {}, {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in [*names, "older"]:
        try:
            if sys.argv[1] == "variants":  # without torch, which takes seconds
                made[name] = registry.variant(name).summary
            else:
                made[name] = registry.create(name, causal=True).config.variant
        except PluginError as error:
            refused[name] = [type(error).__name__, str(error)]
told = [one for one in caught if "older" in str(one.message)]
warned = [[one.category.__name__, str(one.message), one.filename] for one in told]
found = {"names": names, "rows": rows, "refused": refused, "made": made, "warned": warned}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def others(
    wheels: Wheels, alone: dict[str, Future[Alone]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Job]]:
    """The core and ``standard`` with four more plugins, found in one order and in the other."""
    folder = tmp_path_factory.mktemp("others")
    first = wheels.of(
        write(folder, "outdated-dist", "outdated", hook_api=0),
        write(folder, "twin-a", "twin"),
        write(folder, "renamed-dist", "renamed", retired={"older": "2.0"}),
        write(folder, "twin-b", "twin"),
    )
    places = [folder / "one", folder / "two"]
    environment = alone["standard"].result().environment
    for place, files in zip(places, (first[:2], first[2:]), strict=True):
        environment.install("--no-index", "--no-deps", f"--target={place}", *map(str, files))
    jobs = [
        environment.start("-c", OTHERS, made, PYTHONPATH=os.pathsep.join(map(str, order)))
        for made, order in (("attentions", places), ("variants", places[::-1]))
    ]
    yield jobs
    for job in jobs:
        job.process.kill()
        job.process.communicate()


@pytest.fixture(scope="module", params=[0, 1], ids=["one order", "the other"])
def other(request: pytest.FixtureRequest, others: list[Job]) -> dict[str, Any]:
    """What became of them in one of the orders."""
    said: dict[str, Any] = json.loads(others[request.param].said())
    return said


def test_the_others_work(other: dict[str, Any]) -> None:
    assert other["names"] == ["outdated", "renamed", "standard", "twin"]
    assert other["made"].keys() == {"standard", "renamed", "older"}
    assert other["made"]["older"] == other["made"]["renamed"] != other["made"]["standard"]
    assert other["rows"].pop(pip_name("standard"))[2] == "loaded"
    assert {one: row[:3] for one, row in other["rows"].items()} == {
        "outdated-dist": ["outdated", "1.2", "outdated"],
        "renamed-dist": ["renamed", "1.2", "loaded"],
        "twin-a": ["twin", "1.2", "conflict"],
        "twin-b": ["twin", "1.2", "conflict"],
    }


def test_an_outdated_plugin_is_told_with_both_versions(other: dict[str, Any]) -> None:
    kind, text = other["refused"]["outdated"]
    assert kind == "HookApiError"
    error = other["rows"]["outdated-dist"][3]
    assert error == (
        f"built for hook API 0, and this core has hook API {HOOK_API}: upgrade outdated-dist"
    )
    assert text.startswith("plugin 'outdated' of outdated-dist 1.2 ")
    assert text.endswith(error)


def test_of_two_plugins_with_one_name_neither_wins(other: dict[str, Any]) -> None:
    kind, text = other["refused"]["twin"]
    assert kind == "DuplicateNameError"
    assert text == other["rows"]["twin-a"][3] == other["rows"]["twin-b"][3]
    assert text.startswith(
        "variant 'twin' is claimed by twin-a 1.2 (entry point 'twin = twin_a') "
        "and twin-b 1.2 (entry point 'twin = twin_b'); "
    )


def test_a_retired_name_works_and_names_its_successor(other: dict[str, Any]) -> None:
    """The warning points to the program's own line: elsewhere Python does not show it."""
    assert other["warned"] == [
        [
            "DeprecationWarning",
            "variant 'older' is now called 'renamed'; the old name goes in version 2.0",
            "<string>",
        ]
    ]

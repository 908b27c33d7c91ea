"""Environments made for a test: with wheels of this checkout, what they require, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

OFFLINE = [] if find_spec("hatchling") is None else ["--no-build-isolation", "--no-index"]
"""pip's options for a build: where the backend is at hand, nothing need be fetched for it."""


def pip(*arguments: str) -> None:
    """Run this environment's pip without questions or notices."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Wheels:
    """Wheels that are built where they are first asked for.

    Attributes:
        folder: where they lie.
    """

    folder: Path

    def of(self, *sources: Path) -> list[Path]:
        """Those of the distributions whose sources lie in these folders."""
        missing = [str(source) for source in sources if not self._built(source)]
        if missing:
            pip("wheel", "--no-deps", *OFFLINE, f"--wheel-dir={self.folder}", *missing)
        return [self._built(source)[0] for source in sources]

    def _built(self, source: Path) -> list[Path]:
        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        return list(self.folder.glob(f"{project['name'].replace('-', '_')}-*.whl"))


@dataclass
class Environment:
    """A virtual environment.

    Attributes:
        folder: for files beside it. python: its interpreter. packages: where pip installs.
    """

    folder: Path
    python: Path
    packages: Path

    def install(self, *arguments: str) -> None:
        """Run ``pip install`` in it."""
        pip(f"--python={self.python}", "install", "--no-compile", *arguments)

    def start(self, *arguments: str, **variables: str) -> Job:
        """A Python process in the environment, which knows nothing of this one."""
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "RING_"))
        }
        process = subprocess.Popen(
            [str(self.python), *arguments],
            cwd=self.folder,
            env={**own, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Job(process)


@dataclass
class Job:
    """A process under way."""

    process: subprocess.Popen[str]

    def said(self) -> str:
        """What it printed, once it has ended well."""
        text, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, text
        return text


def environment(folder: Path, needs: Iterable[Requirement]) -> Environment:
    """A new one in ``folder``; what ``needs`` ask for is lent from this environment's packages."""
    venv.create(folder / "venv", symlinks=True)
    base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    scripts = Path(sysconfig.get_path("scripts", "venv", base))
    lent = folder / "lent"  # beside it, where pip changes nothing
    lent.mkdir()
    for found in _files(needs):
        if not (lent / found.name).exists():
            (lent / found.name).symlink_to(found)
    (packages / "lent.pth").write_text(f"{lent}\n")
    return Environment(folder, scripts / Path(sys.executable).name, packages)


def described(wheel: Path) -> Distribution:
    """A wheel's metadata."""
    (found,) = distributions(path=[str(wheel)])
    return found


def required(distribution: Distribution, extra: str = "") -> list[Requirement]:
    """What a distribution requires on this machine, with an extra or without any."""
    found = map(Requirement, distribution.requires or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]


def _files(needs: Iterable[Requirement]) -> Iterator[Path]:
    """What belongs to the distributions asked for, however deep; to none of the project's."""
    queue, seen = list(needs), set()
    while queue:
        asked = queue.pop()
        name = canonicalize_name(asked.name)
        for extra in ("", *asked.extras):
            found = None if (name, extra) in seen else next(iter(distributions(name=name)), None)
            seen.add((name, extra))
            if found is None or name.startswith("ring-attention-"):
                continue
            queue += required(found, extra)
            tops = {file.parts[0] for file in found.files or ()} - {"..", "/", "__pycache__"}
            yield from (Path(str(found.locate_file(top))) for top in tops)

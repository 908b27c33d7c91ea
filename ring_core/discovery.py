"""Entry points to plugins: names first, code later, each failure kept to the plugin that failed."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from importlib_metadata import Distribution, EntryPoint, entry_points
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

VARIANTS = "ring_core.variants"
PLUGINS = "ring_core.plugins"

ALLOW = "RING_PLUGINS"
DISABLE = "RING_DISABLE_PLUGINS"

_ALIKE = 0.8
"""Groups that are alike to this degree are taken for one that was misspelled."""


@dataclass
class PluginRow:
    """One entry point (or registered object) and what became of it.

    ``status`` is ``found`` (not loaded yet), ``loaded``, ``disabled``, ``conflict``, ``outdated``
    or ``failed``; ``error`` says why for the last three.
    """

    name: str
    distribution: str
    version: str
    group: str
    entry_point: str
    status: str = "found"
    error: str = ""
    exception: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def origin(self) -> str:
        """``distribution version (entry point)``, for messages."""
        return f"{self.distribution} {self.version} (entry point {self.entry_point!r})"

    def fail(self, status: str, error: str, exception: BaseException | None = None) -> None:
        """Record why this plugin is not usable."""
        self.status, self.error, self.exception = status, error, exception


@dataclass
class Found:
    """A row with the entry point to load it from."""

    row: PluginRow
    entry_point: EntryPoint


def discover() -> list[Found]:
    """Every plugin entry point of this environment, sorted by name. Runs no plugin's code."""
    found = [
        Found(_row(entry_point, group), entry_point)
        for group in (VARIANTS, PLUGINS)
        for entry_point in entry_points(group=group)
    ]
    found.sort(key=lambda one: (one.row.name, one.row.distribution))
    _apply_environment(found)
    _mark_conflicts(found)
    return found


def misspelled() -> Iterator[tuple[PluginRow, str]]:
    """Entry points in which nobody looks, since their group is only almost one of ours; and which
    one that is. Runs no plugin's code."""
    for entry_point in entry_points():
        name = entry_point.group.lower().replace("attention", "core")  # as distributions are called
        meant = difflib.get_close_matches(name, (VARIANTS, PLUGINS), 1, _ALIKE)
        if meant and meant[0] != entry_point.group:
            yield _row(entry_point, entry_point.group), meant[0]


def _row(entry_point: EntryPoint, group: str) -> PluginRow:
    distribution = entry_point.dist
    return PluginRow(
        name=entry_point.name,
        distribution=distribution.name if distribution else "unknown",
        version=distribution.version if distribution else "?",
        group=group,
        entry_point=f"{entry_point.name} = {entry_point.value}",
    )


def _mark_conflicts(found: Iterable[Found]) -> None:
    by_name: dict[str, list[PluginRow]] = {}
    for one in found:
        if one.row.group == VARIANTS and one.row.status == "found":
            by_name.setdefault(one.row.name, []).append(one.row)
    for name, rows in by_name.items():
        if len(rows) > 1:
            origins = " and ".join(row.origin for row in rows)
            for row in rows:
                row.fail(
                    "conflict",
                    f"variant {name!r} is claimed by {origins}; uninstall one of them, "
                    f"or name the distribution to leave out in {DISABLE}",
                )


def _apply_environment(found: Iterable[Found]) -> None:
    """Leave out what ``RING_PLUGINS`` does not allow and what ``RING_DISABLE_PLUGINS`` names.

    Both take variant, plugin or distribution names.
    """
    found = list(found)
    allowed, disabled = _names(ALLOW), _names(DISABLE)
    known = {alias for one in found for alias in _aliases(one.row)}
    for variable, names in ((ALLOW, allowed), (DISABLE, disabled)):
        for name in sorted((names or set()) - known):
            warnings.warn(f"{variable} names {name!r}, which no installed plugin is", stacklevel=4)
    if allowed is not None:
        wanted = [one for one in found if _aliases(one.row) & allowed]
        needed = _requirements(one.entry_point.dist for one in wanted)
        for one in found:
            if one not in wanted and canonicalize_name(one.row.distribution) not in needed:
                one.row.fail("disabled", f"left out by {ALLOW}={os.environ[ALLOW]}")
    for one in found:
        if disabled and _aliases(one.row) & disabled:
            one.row.fail("disabled", f"left out by {DISABLE}={os.environ[DISABLE]}")


def _names(variable: str) -> set[str] | None:
    text = os.environ.get(variable, "")
    names = {canonicalize_name(name.strip()) for name in text.split(",") if name.strip()}
    return {str(name) for name in names} or None


def _aliases(row: PluginRow) -> set[str]:
    return {str(canonicalize_name(row.name)), str(canonicalize_name(row.distribution))}


def _requirements(distributions: Iterable[Any]) -> set[str]:
    """Canonical names of the distributions that these require, however deep."""
    needed: set[str] = set()
    queue = [distribution for distribution in distributions if distribution]
    while queue:
        for name in _required_names(queue.pop()):
            if name not in needed:
                needed.add(name)
                queue.extend(Distribution.discover(name=name))
    return needed


def _required_names(distribution: Any) -> Iterator[str]:
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # somebody else's metadata; it cannot name a plugin we know
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield str(canonicalize_name(requirement.name))

"""Plugins' code: imported, checked and registered with pluggy, each failure kept to its own row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pluggy

from ring_core import hookspecs
from ring_core.config import RingAttentionConfig
from ring_core.discovery import PLUGINS, VARIANTS, Found, PluginRow
from ring_core.errors import (
    DuplicateNameError,
    HookApiError,
    PluginLoadError,
    RingError,
    did_you_mean,
)
from ring_core.hookspecs import HOOK_API, PROJECT, Observer, Variant

logger = logging.getLogger("ring_core")

THIS_PROCESS = "this process"
"""The distribution of plugins that were registered by hand."""


@dataclass
class _Loaded:
    row: PluginRow
    plugin: object


class Plugins:
    """The plugins of a set of entry points and of objects registered by hand.

    Attributes:
        rows: one per plugin, known without running its code.
    """

    def __init__(self, found: list[Found], by_hand: Mapping[str, object]) -> None:
        self._sources: list[tuple[PluginRow, Callable[[], object]]] = [
            (one.row, one.entry_point.load) for one in found
        ]
        for name, plugin in by_hand.items():
            group = VARIANTS if hasattr(plugin, "ring_variant") else PLUGINS
            row = PluginRow(name, THIS_PROCESS, "-", group, f"register({name!r})")
            self._sources.append((row, partial(_itself, plugin)))
        self.rows = [row for row, _ in self._sources]
        self._loaded: list[_Loaded] | None = None
        self._variants: dict[str, Variant] = {}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def row(self, name: str, group: str = VARIANTS) -> PluginRow | None:
        """The row of that name, a usable one if there are several."""
        rows = [row for row in self.rows if row.name == name and row.group == group]
        rows.sort(key=lambda row: row.status not in ("found", "loaded"))
        return rows[0] if rows else None

    @property
    def variants(self) -> dict[str, Variant]:
        """Every usable plugin's variant, by name."""
        self.load()
        return self._variants

    def load(self) -> None:
        """Import and register every enabled plugin; once."""
        if self._loaded is not None:
            return
        self._loaded = []
        for row, source in self._sources:
            if row.status == "found" and _import(row, source, self._loaded):
                row.status = "loaded"
        for loaded in self._usable():
            self._add_hookspecs_of(loaded)
        for loaded in self._usable():
            with _blame(loaded.row, "registering"):
                # Two entry points may name one module: one registration serves both.
                if not self._manager.is_registered(loaded.plugin):
                    self._manager.register(loaded.plugin)
        for loaded in self._usable():
            self._check_hooks_of(loaded)
        for loaded in self._usable():
            self._ask_variant_of(loaded)

    def ask(self, hook: str, **arguments: Any) -> list[tuple[PluginRow, Any]]:
        """Each plugin's answer to ``hook``; one that raises is marked failed and left out."""
        self.load()
        answers: list[tuple[PluginRow, Any]] = []
        asked: set[int] = set()
        for loaded in self._usable():
            if id(loaded.plugin) in asked or not self._implements(loaded.plugin, hook):
                continue
            asked.add(id(loaded.plugin))
            given = arguments
            if isinstance(config := given.get("config"), RingAttentionConfig):
                given = {**given, "config": config.of_variant(loaded.row.name)}
            with _blame(loaded.row, hook):
                answer = self._call(loaded.plugin, hook, **given)
                _check(hook, answer)
                answers.append((loaded.row, answer))
        return answers

    def _usable(self) -> list[_Loaded]:
        return [loaded for loaded in self._loaded or () if loaded.row.status == "loaded"]

    def _implements(self, plugin: object, hook: str) -> bool:
        callers = self._manager.get_hookcallers(plugin) or ()
        return any(caller.name == hook for caller in callers)

    def _call(self, plugin: object, hook: str, **arguments: Any) -> Any:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        result = self._manager.subset_hook_caller(hook, others)(**arguments)
        if isinstance(result, list):
            return result[0] if result else None
        return result

    def _add_hookspecs_of(self, loaded: _Loaded) -> None:
        """Specifications come before registrations: another plugin may implement them."""
        bring = getattr(loaded.plugin, "ring_hookspecs", None)
        if self._manager.parse_hookimpl_opts(loaded.plugin, "ring_hookspecs") is not None:
            with _blame(loaded.row, "ring_hookspecs"):
                assert callable(bring)
                self._manager.add_hookspecs(bring())

    def _check_hooks_of(self, loaded: _Loaded) -> None:
        """A hook that nobody specified is a misspelled one: its plugin fails, and says which."""
        callers = self._manager.get_hookcallers(loaded.plugin) or ()
        unknown = [caller.name for caller in callers if not caller.has_spec()]
        if unknown:
            known = [name for name, caller in vars(self._manager.hook).items() if caller.has_spec()]
            hints = " ".join(
                f"implements {name!r}, which is no hook.{did_you_mean(name, known)}"
                for name in unknown
            )
            loaded.row.fail("failed", hints)
            self._manager.unregister(loaded.plugin)

    def _ask_variant_of(self, loaded: _Loaded) -> None:
        if loaded.row.group != VARIANTS:
            return
        with _blame(loaded.row, "ring_variant"):
            variant = self._call(loaded.plugin, "ring_variant", name=loaded.row.name)
            if isinstance(variant, Variant):
                self._variants[loaded.row.name] = variant
            elif variant is not None or loaded.row.distribution != THIS_PROCESS:
                # Only an object registered by hand may bring hooks and no variant.
                raise TypeError(f"returned {variant!r} for {loaded.row.name!r}, not a Variant")


_WANTED: dict[str, tuple[type[Any], Callable[[Any], bool], str]] = {
    "ring_observers": (Sequence, lambda one: isinstance(one, Observer), "a list of observers"),
    "ring_kernels": (
        Sequence,
        lambda one: all(hasattr(one, name) for name in ("name", "priority", "refuse", "forward")),
        "a list of kernels",
    ),
    "ring_communicators": (
        Sequence,
        lambda one: isinstance(one, type) and hasattr(one, "refuse"),
        "a list of communicator classes",
    ),
    "ring_presets": (Mapping, lambda one: isinstance(one, str), "a mapping of names to presets"),
    "ring_commands": (Mapping, lambda one: isinstance(one, str), "a mapping of names to modules"),
}


def _check(hook: str, answer: Any) -> None:
    """
    Raises:
        TypeError: the answer to one of the core's hooks is something else than it asks for.
    """
    if hook not in _WANTED or answer is None:
        return
    kind, fits, text = _WANTED[hook]
    if not isinstance(answer, kind) or isinstance(answer, str) or not all(fits(x) for x in answer):
        raise TypeError(f"returned {answer!r}, not {text}")


def _itself(plugin: object) -> object:
    return plugin


def error_of(row: PluginRow) -> RingError:
    """The error that tells why the plugin of ``row`` cannot be used."""
    if row.status == "conflict":
        return DuplicateNameError(row.error)
    kind = HookApiError if row.status == "outdated" else PluginLoadError
    error = kind(f"plugin {row.name!r} of {row.origin}: {row.error}")
    error.__cause__ = row.exception
    return error


def _import(row: PluginRow, source: Callable[[], object], into: list[_Loaded]) -> bool:
    # A plugin is other people's code: whatever it raises is its own failure and nobody else's.
    try:
        plugin = source()
    except (Exception, SystemExit) as error:
        row.fail("failed", f"failed to import: {type(error).__name__}: {error}", error)
        return False
    built_for = getattr(plugin, "RING_HOOK_API", None)
    if built_for != HOOK_API:
        row.fail("outdated", _outdated(row, built_for))
        return False
    into.append(_Loaded(row, plugin))
    return True


def _outdated(row: PluginRow, built_for: object) -> str:
    if built_for is None:
        return (
            f"declares no hook API version, and this core has hook API {HOOK_API}: "
            f"write RING_HOOK_API = {HOOK_API} in the plugin"
        )
    newer = isinstance(built_for, int) and built_for > HOOK_API
    return (
        f"built for hook API {built_for}, and this core has hook API {HOOK_API}: "
        f"upgrade {'ring-attention-core' if newer else row.distribution}"
    )


@contextmanager
def _blame(row: PluginRow, hook: str) -> Iterator[None]:
    """Turn an exception of a plugin's hook into its row's failure."""
    try:
        yield
    except Exception as error:
        row.fail("failed", f"{hook} raised {type(error).__name__}: {error}", error)
        logger.warning("plugin %s: %s", row.origin, row.error)

"""Variants by name: list them, build them, and say clearly when one cannot be built."""

from __future__ import annotations

import copy
import logging
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from ring_core import hookspecs
from ring_core.catalogue import PIP_NAMES
from ring_core.config import RingAttentionConfig, common_fields
from ring_core.discovery import DISABLE, VARIANTS, PluginRow, discover
from ring_core.errors import (
    ConfigError,
    DuplicateNameError,
    HookApiError,
    PluginLoadError,
    RingError,
    UnknownPresetError,
    UnknownVariantError,
    did_you_mean,
)
from ring_core.hookspecs import HOOK_API, PROJECT, Observer, Preset, Variant

if TYPE_CHECKING:
    from ring_core.attention import BaseRingAttention
    from ring_core.protocols import AttentionKernel, Communicator

logger = logging.getLogger("ring_core")


@dataclass
class _Plugin:
    """A loaded plugin object with its row."""

    row: PluginRow
    plugin: object


class Registry:
    """The plugins of this process: those installed, and those registered by hand.

    Plugins are found at the first question and loaded at the first one that needs their code.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manual: dict[str, object] = {}
        self._clear()

    def _clear(self) -> None:
        self._rows: list[PluginRow] | None = None
        self._loaded: list[_Plugin] | None = None
        self._entry_points: dict[int, Callable[[], Any]] = {}
        self._variants: dict[str, Variant] = {}
        self._manager = pluggy.PluginManager(PROJECT)

    def refresh(self) -> None:
        """Forget what was found and loaded, so that the next question looks again."""
        with self._lock:
            self._clear()

    # What there is

    def names(self) -> list[str]:
        """Sorted names of the variants that are installed and enabled. Runs no plugin's code."""
        return sorted(
            {row.name for row in self._found() if row.group == VARIANTS and row.status != "disabled"}
        )

    def plugins(self) -> list[PluginRow]:
        """A row per entry point: name, distribution, version, status, error. Loads every plugin."""
        self._plugins()
        return [copy.copy(row) for row in self._found()]

    def presets(self) -> dict[str, Preset]:
        """Every preset of the loaded plugins, by name.

        Raises:
            DuplicateNameError: two plugins bring a preset of one name.
        """
        presets: dict[str, Preset] = {}
        origins: dict[str, str] = {}
        for row, brought in self._ask("ring_presets"):
            for name, preset in (brought or {}).items():
                if name in presets:
                    raise DuplicateNameError(
                        f"preset {name!r} is brought by {origins[name]} and by {row.origin}; "
                        f"leave one out with {DISABLE}"
                    )
                presets[name], origins[name] = preset, row.origin
        return presets

    def variant(self, name: str) -> Variant:
        """The variant of that name, with its schema; imports no torch.

        Raises:
            UnknownVariantError, DuplicateNameError, PluginLoadError, HookApiError.
        """
        with self._lock:
            self._plugins()
            name = self._current_name(name)
            if name not in self._variants:
                raise self._no_variant(name)
            return self._variants[name]

    # Building

    def create(
        self,
        variant: str | Mapping[str, Any] | RingAttentionConfig,
        *,
        config: RingAttentionConfig | Mapping[str, Any] | None = None,
        group: Any = None,
        **fields: Any,
    ) -> BaseRingAttention:
        """Build an attention: by name, from a config, or from a mapping with a ``variant`` key.

        Args:
            variant: a variant's name, ``"auto"``, or a config (object or mapping) that names one.
            config: fields to start from; a base config is widened to the variant's own schema.
            group: ProcessGroup or 1-D DeviceMesh; None takes the default group at each plan.
            fields: override those of ``config``.

        Raises:
            ConfigError: a field is unknown or out of range, or a combination has no meaning.
            UnknownVariantError, DuplicateNameError, PluginLoadError, HookApiError: see there.
        """
        if not isinstance(variant, str):
            if config is not None:
                raise ConfigError("give the config either as the first argument or as config=, not both")
            config, variant = variant, "auto"
        given = {**_given(config), **fields}
        named = given.pop("variant", "auto")
        if "auto" not in (variant, named) and self._current_name(variant) != self._current_name(named):
            raise ConfigError(
                f"variant: asked for {variant!r}, and the config is for {named!r}; name one of them"
            )
        name = named if variant == "auto" else variant
        if name == "auto":
            name, reason = self._choose(given, group)
            logger.info("auto chose variant %r: %s", name, reason)
        described = self.variant(name)
        checked = described.config(variant=self._current_name(name), **given)
        attention: BaseRingAttention = self._attention_class(name, described)(
            checked, group=group, registry=self
        )
        return attention

    def create_from_preset(self, preset: str, *, group: Any = None, **fields: Any) -> BaseRingAttention:
        """Build the attention of a preset; ``fields`` override the preset's and are validated alike.

        Raises:
            UnknownPresetError: no installed, enabled plugin brings that preset.
            ConfigError: a field is unknown or out of range.
        """
        presets = self.presets()
        if preset not in presets:
            brought = ", ".join(sorted(presets)) or "none"
            raise UnknownPresetError(
                f"unknown preset {preset!r}.{did_you_mean(preset, presets)} "
                f"Presets of the installed plugins: {brought}."
            )
        chosen = presets[preset]
        return self.create(chosen.variant, group=group, **{**chosen.fields, **fields})

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin object of this process under ``name``; its variant, if any, gets that name.

        Raises:
            DuplicateNameError: the name is taken.
            PluginLoadError, HookApiError: the object is no usable plugin; nothing is registered.
        """
        with self._lock:
            taken = [row for row in self._found() if row.name == name and row.status != "disabled"]
            if taken:
                raise DuplicateNameError(
                    f"{name!r} is taken by {taken[0].origin}; register under another name"
                )
            self._manual[name] = plugin
            self.refresh()
            row = next(row for row in self.plugins_unsafe() if row.name == name)
            if row.status != "loaded":
                del self._manual[name]
                self.refresh()
                raise _error_of(row)

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` added under ``name``."""
        with self._lock:
            if name not in self._manual:
                raise UnknownVariantError(
                    f"nothing was registered as {name!r}; registered: {sorted(self._manual)}"
                )
            del self._manual[name]
            self.refresh()

    # What the attention asks for while it is built

    def kernels(self, config: RingAttentionConfig) -> list[AttentionKernel]:
        """Every kernel the plugins bring for ``config``."""
        return [one for _, brought in self._ask("ring_kernels", config=config) for one in brought or ()]

    def communicators(self, config: RingAttentionConfig) -> list[type[Communicator]]:
        """Every communicator class the plugins bring for ``config``."""
        return [
            one for _, brought in self._ask("ring_communicators", config=config) for one in brought or ()
        ]

    def observers(self, config: RingAttentionConfig) -> list[Observer]:
        """Every observer the plugins bring for ``config``."""
        return [one for _, brought in self._ask("ring_observers", config=config) for one in brought or ()]

    def origin(self, name: str) -> str:
        """Distribution and version that bring variant ``name``; what ranks compare."""
        current = self._current_name(name)
        rows = [row for row in self._found() if row.name == current and row.group == VARIANTS]
        return f"{rows[0].distribution} {rows[0].version}" if rows else "not a plugin"

    # Finding and loading

    def _found(self) -> list[PluginRow]:
        with self._lock:
            if self._rows is None:
                self._rows = []
                for one in discover():
                    self._rows.append(one.row)
                    self._entry_points[id(one.row)] = one.entry_point.load
                for name, plugin in self._manual.items():
                    row = PluginRow(name, "this process", "-", VARIANTS, f"register({name!r})")
                    self._rows.append(row)
                    self._entry_points[id(row)] = lambda plugin=plugin: plugin
            return self._rows

    def plugins_unsafe(self) -> list[PluginRow]:
        """The rows themselves after loading."""
        self._plugins()
        return self._found()

    def _plugins(self) -> list[_Plugin]:
        """Load and register every enabled plugin, once."""
        with self._lock:
            if self._loaded is None:
                self._manager.add_hookspecs(hookspecs)
                self._loaded = [
                    _Plugin(row, plugin)
                    for row in self._found()
                    if row.status == "found"
                    for plugin in self._load(row)
                ]
                self._add_own_hookspecs()
                self._check_hooks()
                self._ask_variants()
            return self._loaded

    def _load(self, row: PluginRow) -> Iterator[object]:
        # A plugin is other people's code: whatever it raises is its own failure and nobody else's.
        try:
            plugin = self._entry_points[id(row)]()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | GeneratorExit):
                raise
            row.fail("failed", f"failed to import: {type(error).__name__}: {error}", error)
            return
        built_for = getattr(plugin, "RING_HOOK_API", None)
        if built_for is None:
            row.fail(
                "outdated",
                f"declares no hook API version; this core has version {HOOK_API}: "
                f"write RING_HOOK_API = {HOOK_API} in the plugin",
            )
            return
        if built_for != HOOK_API:
            older = isinstance(built_for, int) and built_for < HOOK_API
            row.fail(
                "outdated",
                f"built for hook API {built_for}, and this core has hook API {HOOK_API}: "
                f"upgrade {row.distribution if older else 'ring-attention-core'}",
            )
            return
        row.status = "loaded"
        yield plugin

    def _add_own_hookspecs(self) -> None:
        """Register the plugins, taking in first the hook specifications that they bring themselves."""
        for loaded in self._loaded or ():
            bring = getattr(loaded.plugin, "ring_hookspecs", None)
            if callable(bring) and hasattr(bring, f"{PROJECT}_impl"):
                with _blame(loaded.row, "ring_hookspecs"):
                    specs = bring()
                    if specs is not None:
                        self._manager.add_hookspecs(specs)
        for loaded in self._usable():
            with _blame(loaded.row, "register"):
                # Two entry points may name one module: the first registration serves both.
                if not self._manager.is_registered(loaded.plugin):
                    self._manager.register(loaded.plugin)

    def _check_hooks(self) -> None:
        """A hook that nobody specified is a misspelled one: its plugin fails, and says which."""
        for loaded in self._usable():
            for caller in self._manager.get_hookcallers(loaded.plugin) or ():
                if not caller.has_spec():
                    known = [name for name in dir(self._manager.hook) if name.startswith("ring_")]
                    loaded.row.fail(
                        "failed",
                        f"implements {caller.name!r}, which is no hook."
                        f"{did_you_mean(caller.name, known)}",
                    )
        for loaded in self._loaded or ():
            if loaded.row.status != "loaded" and self._manager.is_registered(loaded.plugin):
                self._manager.unregister(loaded.plugin)

    def _ask_variants(self) -> None:
        for loaded in self._usable():
            if loaded.row.group != VARIANTS:
                continue
            with _blame(loaded.row, "ring_variant"):
                variant = self._call(loaded.plugin, "ring_variant", name=loaded.row.name)
                if variant is not None:
                    if not isinstance(variant, Variant):
                        raise TypeError(f"ring_variant returned {type(variant).__name__}, not Variant")
                    self._variants[loaded.row.name] = variant
                elif loaded.row.distribution != "this process":
                    raise TypeError(f"ring_variant(name={loaded.row.name!r}) returned no Variant")

    def _usable(self) -> Iterator[_Plugin]:
        return (loaded for loaded in self._loaded or () if loaded.row.status == "loaded")

    def _call(self, plugin: object, hook: str, **arguments: Any) -> Any:
        """Call one plugin's implementation of ``hook``; None where it has none."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        result = self._manager.subset_hook_caller(hook, others)(**arguments)
        if isinstance(result, list):
            return result[0] if result else None
        return result

    def _ask(self, hook: str, **arguments: Any) -> Iterator[tuple[PluginRow, Any]]:
        """Each plugin's answer to ``hook``; one that raises is marked failed and left out."""
        self._plugins()
        asked: set[int] = set()
        for loaded in list(self._usable()):
            if id(loaded.plugin) in asked:
                continue
            asked.add(id(loaded.plugin))
            with _blame(loaded.row, hook):
                yield loaded.row, self._call(loaded.plugin, hook, **arguments)

    # Names and errors

    def _current_name(self, name: str) -> str:
        """``name``, or the successor of a retired one, with a warning."""
        self._plugins()
        if name in self._variants:
            return name
        for current, variant in self._variants.items():
            if name in variant.retired_names:
                warnings.warn(
                    f"variant {name!r} is now called {current!r}; the old name goes in version "
                    f"{variant.retired_names[name]}",
                    DeprecationWarning,
                    stacklevel=4,
                )
                return current
        return name

    def _no_variant(self, name: str) -> RingError:
        rows = [row for row in self._found() if row.name == name and row.group == VARIANTS]
        broken = [row for row in rows if row.status not in ("disabled", "loaded")]
        if broken:
            return _error_of(broken[0])
        installed = self.names()
        parts = [f"unknown variant {name!r}.{did_you_mean(name, [*installed, *PIP_NAMES])}"]
        parts.append(f"Installed: {', '.join(installed) or 'none'}.")
        if rows and rows[0].status == "disabled":
            parts = [f"variant {name!r} of {rows[0].origin} is disabled: {rows[0].error}."]
        elif name in PIP_NAMES:
            parts.append(f"Install it with: pip install {PIP_NAMES[name]}")
        return UnknownVariantError(" ".join(parts))

    def _choose(self, given: Mapping[str, Any], group: Any) -> tuple[str, str]:
        """The variant that ``auto`` takes, and why."""
        self._plugins()
        special = set(given) - common_fields()
        if special:
            knowing = [
                name
                for name, variant in sorted(self._variants.items())
                if special <= set(variant.config.model_fields)
            ]
            if len(knowing) == 1:
                return knowing[0], f"only its schema knows {', '.join(sorted(special))}"
            if not knowing:
                fields = {field for one in self._variants.values() for field in one.config.model_fields}
                hints = "".join(did_you_mean(name, fields) for name in sorted(special - fields))
                raise ConfigError(
                    f"no installed variant knows the field(s) {', '.join(sorted(special))}.{hints} "
                    f"Installed: {', '.join(sorted(self._variants)) or 'none'}"
                )
            raise ConfigError(
                f"{', '.join(sorted(special))}: known to {', '.join(knowing)}; name the variant"
            )
        if "distributed" in self._variants and _spans_hosts(group):
            return "distributed", "the group spans hosts"
        return "standard", "no field asks for another variant"

    def _attention_class(self, name: str, variant: Variant) -> type[BaseRingAttention]:
        try:
            found = pkgutil.resolve_name(variant.attention)
        except Exception as error:
            current = self._current_name(name)
            row = next(row for row in self._found() if row.name == current and row.group == VARIANTS)
            raise PluginLoadError(
                f"{row.origin} failed to import {variant.attention!r}: {type(error).__name__}: {error}"
            ) from error
        return found  # type: ignore[no-any-return]


class _blame:  # noqa: N801 (reads as a verb: with _blame(row, hook))
    """Turn an exception of a plugin's hook into its row's failure."""

    def __init__(self, row: PluginRow, hook: str) -> None:
        self.row, self.hook = row, hook

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.row.fail("failed", f"{self.hook} raised {type(error).__name__}: {error}", error)
            logger.warning("plugin %s: %s", self.row.origin, self.row.error)
            return True
        return False


def _error_of(row: PluginRow) -> RingError:
    """The error that tells why the plugin of ``row`` cannot be used."""
    if row.status == "conflict":
        return DuplicateNameError(row.error)
    kind = HookApiError if row.status == "outdated" else PluginLoadError
    error = kind(f"plugin {row.name!r} of {row.origin}: {row.error}")
    error.__cause__ = row.exception
    return error


def _given(config: RingAttentionConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, RingAttentionConfig):
        return config.given()
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"a config is a RingAttentionConfig or a mapping, not {type(config).__name__}")


def _spans_hosts(group: Any) -> bool:
    """Whether the ranks of ``group`` run on more than one host, as torch's launcher tells it."""
    import os

    ranks, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    if not (ranks and local and int(ranks) > int(local)):
        return False
    from ring_core.groups import ranks_of

    hosts = {rank // int(local) for rank in ranks_of(group)}
    return len(hosts) > 1


registry = Registry()
"""The registry of this process."""


def create_ring_attention(
    variant: str | Mapping[str, Any] | RingAttentionConfig, **options: Any
) -> BaseRingAttention:
    """:meth:`Registry.create` on the registry of this process."""
    return registry.create(variant, **options)


def create_ring_attention_from_preset(preset: str, **options: Any) -> BaseRingAttention:
    """:meth:`Registry.create_from_preset` on the registry of this process."""
    return registry.create_from_preset(preset, **options)


__all__: Sequence[str] = (
    "Registry",
    "create_ring_attention",
    "create_ring_attention_from_preset",
    "registry",
)
